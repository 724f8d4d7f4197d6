"""The table and the plot say what was measured."""

from pathlib import Path

import pytest
from PIL import Image

from export.gate import pareto
from export.gate.metric import Accuracy
from export.gate.pareto import best_of, can_plot, draw, require_plot, table
from export.gate.trials import Candidate
from runtime.errors import BackendUnavailable


def candidate(what: str, drop: float, size: int, ms: float, nodes: int = 0) -> Candidate:
    restored = {"vision": tuple(f"n{i}" for i in range(nodes))} if nodes else {}
    return Candidate(what, restored, Accuracy(100 - drop, drop, drop - 1, drop + 1, "wilson"), size, ms, 10.0)


PLAIN = candidate("as written", 5.0, 100, 4.0)
SLOW = candidate("slow and bad", 5.0, 101, 5.0, 1)
ALL = candidate("all restored", 0.0, 400, 10.0, 9)
SOME = candidate("some restored", 0.2, 120, 4.5, 2)
EVERY = [PLAIN, SLOW, ALL, SOME]


def test_what_another_beats_is_not_on_the_front() -> None:
    assert best_of(EVERY) == [PLAIN, ALL, SOME]
    assert best_of([PLAIN, PLAIN]) == [PLAIN, PLAIN], "equals do not beat each other"


def test_the_table_has_every_candidate() -> None:
    lines = table(EVERY, SOME, 0.5).splitlines()
    assert len(lines) == 2 + len(EVERY)
    assert lines[2] == "| as written | 0 | 5.00 | 4.00 to 6.00 | 0.00 | 4.00 | 10.00 | loses too much, unbeaten |"
    assert lines[5].endswith("| **in this bundle**, unbeaten |")


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    draw(EVERY, SOME, 0.5, "accuracy", tmp_path / "pareto.png")
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.size[0] > 800


def test_without_matplotlib_the_plot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise BackendUnavailable("The plot needs 'matplotlib.figure'. Install it: pip install 'qforge[bench]'")

    monkeypatch.setattr(pareto, "require", missing)
    assert not can_plot()
    with pytest.raises(BackendUnavailable, match=r"qforge\[bench\]"):
        require_plot()
