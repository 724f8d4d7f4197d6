"""One data set of a recipe, with its paths resolved."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import DataError
from trainer.config import Format, SourceConfig

ALL = "all"
"""Names every split at once."""


@dataclass(frozen=True)
class Source:
    """What `SourceConfig` says, with paths that lead somewhere."""

    path: Path
    format: Format | None = None
    split: str | None = None
    images: Path | None = None
    answers: Path | None = None
    weight: float = 1.0

    @property
    def image_folder(self) -> Path:
        """What image paths in the file are relative to."""
        return self.images if self.images is not None else self.path.parent


def resolve_source(config: SourceConfig, root: Path) -> Source:
    """The source below `root`."""
    return Source(
        path=root / config.path,
        format=config.format,
        split=config.split,
        images=None if config.images is None else root / config.images,
        answers=None if config.answers is None else root / config.answers,
        weight=config.weight,
    )


def chosen_splits(source: Source, found: Iterable[str]) -> set[str]:
    """Which of the splits `found` in a file are to be read.

    Raises:
        DataError: there are several and none was named, or one was named that is not there.
    """
    there = sorted(set(found))
    if source.split is None and len(there) > 1:
        raise DataError(
            f"{source.path}: expected a split to be named, as it has {len(there)} ({', '.join(there)}); "
            f"name one (split: {there[0]}), several (split: {'+'.join(there[:2])}) or all"
        )
    wanted = set(there) if source.split in (None, ALL) else set(str(source.split).split("+"))
    absent = sorted(wanted - set(there))
    if absent:
        raise DataError(f"{source.path}: expected the split {absent[0]!r}, found {', '.join(there) or 'none'}")
    return wanted
