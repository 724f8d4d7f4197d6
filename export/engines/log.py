"""What a builder says while it works: errors are kept for our one sentence, progress moves our bar."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

KEPT = 20
"""Messages kept; the last ones say why a build failed."""


@cache
def log_of(trt: Any) -> Any:
    """The one logger of a builder's module, which keeps the first it is given for the whole process.

    `messages` holds its last errors.
    """

    class Log(trt.ILogger):  # type: ignore[misc]  # a class of the builder's own module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.messages = [*self.messages, message][-KEPT:]

    return Log()


class Interrupted:
    """Whether Ctrl-C was pressed while the builder worked."""

    pressed = False


@contextmanager
def interruptible() -> Iterator[Interrupted]:
    """Ctrl-C as a note instead of an exception, which must not pass through the builder's own code.

    Raises:
        KeyboardInterrupt: at the end, when it was pressed.
    """
    noted = Interrupted()
    if threading.current_thread() is not threading.main_thread():
        yield noted  # no signal arrives here
        return

    def note(*_: object) -> None:
        noted.pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
    if noted.pressed:
        raise KeyboardInterrupt


def monitor_of(trt: Any, moved: Callable[[float], None], interrupted: Interrupted) -> Any:
    """A monitor that reports the share of the outermost phase that is done, and stops the build when asked to."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of the builder's own module
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost, self.steps = "", 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost, self.steps = phase, max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost:
                moved((step + 1) / self.steps)
            return not interrupted.pressed

        def phase_finish(self, phase: str) -> None:
            if phase == self.outermost:
                moved(1.0)

    return Monitor()
