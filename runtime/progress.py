"""Progress of long work on stderr: a bar with loss, rate and time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_EVERY_S = 20.0
"""Seconds between lines when stderr is not a terminal."""


class Bar:
    """One running bar; `advance` after each step."""

    def __init__(self, title: str, total: int, done: int, items_per_step: int, rich: RichProgress | None) -> None:
        self._title, self._total, self._done, self._items = title, total, done, items_per_step
        self._rich = rich
        self._task = rich.add_task(title, total=total, completed=done, figures="") if rich else None
        self._first, self._start, self._last_line = done, time.monotonic(), time.monotonic()

    def advance(self, **figures: float) -> None:
        """One more step; `figures` are shown beside the bar (loss and the like)."""
        self._done += 1
        elapsed = max(time.monotonic() - self._start, 1e-9)
        per_second = (self._done - self._first) / elapsed
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        if self._items > 1:
            text += f"  {per_second * self._items:.0f} samples/s"
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=self._done, figures=text)
            return
        if time.monotonic() - self._last_line >= LINE_EVERY_S or self._done == self._total:
            left_s = (self._total - self._done) / per_second
            print(
                f"{self._title}: {self._done}/{self._total}  {text}  {left_s:.0f} s left", file=sys.stderr, flush=True
            )
            self._last_line = time.monotonic()


class Progress:
    """Makes bars; quiet (`Progress(quiet=True)`) shows nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)

    def note(self, text: str) -> None:
        """One line of lasting information; it does not disturb a running bar."""
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, *, done: int = 0, items_per_step: int = 1) -> Iterator[Bar]:
        """A bar of `total` steps of which `done` are finished; `items_per_step` turns steps/s into samples/s."""
        if self._quiet or not self._console.is_terminal:
            yield Bar(title, total, done, items_per_step, None) if not self._quiet else _Silent()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console, transient=False) as rich:
            yield Bar(title, total, done, items_per_step, rich)


class _Silent(Bar):
    def __init__(self) -> None:
        super().__init__("", 0, 0, 1, None)

    def advance(self, **figures: float) -> None:
        return
