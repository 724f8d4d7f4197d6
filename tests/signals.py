"""Signals in tests and their child processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


def hears_ctrl_c() -> None:
    """For `preexec_fn`: a shell makes its background jobs, and so a test suite run as one, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def hearing_ctrl_c() -> Iterator[None]:
    """The same for this process, where a test interrupts itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
