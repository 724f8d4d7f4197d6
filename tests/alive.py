"""How many rows of manifests are held at once: what takes a sample must not hold all of them."""

import weakref

import pytest

from runtime.dataset import Row
from trainer.sources.rows import ManifestRows


class Alive:
    """Counts rows that are held now, and the most there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = self.given = 0
        at = ManifestRows.at

        def counted(rows: ManifestRows, place: int) -> Row:
            row = at(rows, place)
            self.now, self.given = self.now + 1, self.given + 1
            self.most = max(self.most, self.now)
            weakref.finalize(row, self._gone)
            return row

        monkeypatch.setattr(ManifestRows, "at", counted)

    def _gone(self) -> None:
        self.now -= 1
