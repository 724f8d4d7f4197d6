"""What the loop tells those who look on: logs, alarms, weight averages."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from trainer.blip2 import Blip2


@dataclass(frozen=True)
class StepReport:
    """One optimiser step that is done."""

    stage: str
    step: int
    """Steps done, this one included."""
    steps: int
    """Steps of the stage."""
    loss: float
    """Mean over the global batch."""
    figures: Mapping[str, float]
    """What the objective shows beside its loss, means over the processes."""
    rows: int
    """Rows of the global batch."""
    learning_rates: tuple[float, ...]
    """Of the optimiser's groups, in their order."""
    gradient_norm: float
    """Before clipping."""
    data_s: float
    """Seconds this process waited for rows and image features."""
    compute_s: float
    """Seconds of the rest of the step."""


class Watcher:
    """Called on every process, in the same order; it must not change the weights. A watcher overrides what it needs."""

    def begin(self, done: int) -> None:
        """The loop goes on after step `done`; 0 for a stage that is trained from its start."""

    def after_step(self, model: Blip2, report: StepReport) -> None:
        """One step is done."""

    def after_measurement(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics after `step` steps."""

    def before_resume_point(self) -> None:
        """A resume point is about to be written: what was told so far will not be told again."""

    def end(self) -> None:
        """The loop is over, or failed."""


@contextmanager
def watched(watchers: Sequence[Watcher], done: int) -> Iterator[None]:
    """Tell the watchers that the loop begins, and whatever happens that it ended."""
    with ExitStack() as stack:
        for watcher in watchers:
            stack.callback(watcher.end)
            watcher.begin(done)
        yield
