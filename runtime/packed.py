"""Images that lie inside a larger file (a tar shard, an Arrow file) as paths, so that a row names them like any other.

    shards/000.tar/@1536+20480/00001.jpg      20,480 bytes from byte 1,536 of shards/000.tar, called 00001.jpg

Such a path needs no open archive and no list of members: whoever holds it reads those bytes, from any process or
thread. It is made by the readers of `trainer.sources` and understood by `runtime.preprocess`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

_PLACE = re.compile(r"/@(\d+)\+(\d+)/")


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file."""

    file: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file cannot be opened (FileNotFoundError: it is gone).
            EOFError: it ends before them.
        """
        with self.file.open("rb") as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) != self.size:
            raise EOFError(f"{self.file}: expected {self.size} bytes at {self.offset}, found {len(content)}")
        return content


def packed_path(file: Path, offset: int, size: int, name: str) -> Path:
    """The path of `size` bytes at `offset` of `file`; `name` is what they are called there."""
    return file / f"@{offset}+{size}" / name.lstrip("/")


def piece_of(path: Path | str) -> Piece | None:
    """What a packed path names; None for the path of a file of its own."""
    found = _PLACE.search(str(path))
    if found is None:
        return None
    return Piece(Path(str(path)[: found.start()]), int(found[1]), int(found[2]))
