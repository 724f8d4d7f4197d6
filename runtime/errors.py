"""Errors that a user can act on, and the door for optional packages.

Each error is one clear sentence: the file, what was expected, what was found, what to do next. Each class derives
from `QforgeError`, which the command line prints without a traceback, and from the built-in that fits, so a caller
who knows only Python can catch it too. `assert` stays for our own mistakes.
"""

import importlib
from pathlib import Path
from types import ModuleType


class QforgeError(Exception):
    """Base of everything that is the user's to mend; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(QforgeError, ValueError):
    """An argument, a setting or data that cannot be used."""


class MissingFile(QforgeError, FileNotFoundError):
    """A file that was asked for and is not there."""


class ImageError(InputError):
    """An image that cannot be read."""


class DataError(InputError):
    """A data set or its manifest that cannot be used."""


class BundleError(QforgeError, ValueError):
    """A bundle that is damaged, incomplete, foreign or of another format."""


class CheckpointError(QforgeError, ValueError):
    """A checkpoint that is damaged, incomplete or of another model."""


class BackendUnavailable(QforgeError, ImportError):
    """An optional package that is not installed."""


class CheckFailed(QforgeError):
    """A gate or verification that did not hold."""

    exit_code = 1


class OutOfMemory(QforgeError, MemoryError):
    """The engine found no memory for one request."""


class PipelineClosed(InputError):
    """A bundle that was closed before it answered; a ValueError, as for a file that is closed."""


class OutOfSpace(QforgeError, OSError):
    """The file system took no more bytes while something was written."""

    def __init__(self, folder: Path, free_bytes: int) -> None:
        super().__init__(
            f"{folder}: no space left while writing ({free_bytes:,} bytes are free there); nothing half-written was "
            f"kept. Free some space or write elsewhere, then run the same command again."
        )
        self.folder = folder
        self.free_bytes = free_bytes


def require(module: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        BackendUnavailable: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(f"{why} needs '{module}'. Install it: pip install 'qforge[{extra}]'") from error
