"""Kernel timings that TensorRT keeps from build to build; most of its time is measuring them."""

from pathlib import Path
from typing import Any, Self

from runtime.errors import InputError
from runtime.files import write_bytes_atomic


class TimingCache:
    """The content of one file, or nothing at all."""

    def __init__(self, known: bytes | None) -> None:
        self._known = known

    @classmethod
    def read(cls, file: Path | None) -> Self:
        """The file's content, empty when there is no such file yet."""
        return cls(None if file is None else file.read_bytes() if file.exists() else b"")

    def lend(self, config: Any) -> None:
        """Hand it to the next build; InputError when it is another version's or no timing cache."""
        if self._known is not None and not config.set_timing_cache(config.create_timing_cache(self._known), False):
            raise InputError("--timing-cache: the file is of another builder version or GPU; name a new file")

    def take_back(self, config: Any) -> None:
        """With what the build has measured."""
        if self._known is not None:
            self._known = bytes(config.get_timing_cache().serialize())

    def write(self, file: Path | None) -> None:
        """For the next time."""
        if file is not None and self._known is not None:
            write_bytes_atomic(file, self._known)
