"""What the loop tells those who look on: logs, alarms, weight averages."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
    learning_rate: float
    """Peak of the optimiser's groups."""
    gradient_norm: float | None
    """Before clipping; None when clipping is off."""
    data_s: float
    """Seconds this process waited for rows and image features."""
    compute_s: float
    """Seconds of the rest of the step."""


class Watcher(Protocol):
    """Called on every process, in the same order; it must not change the weights."""

    def after_step(self, model: Blip2, report: StepReport) -> None:
        """One step is done."""
        ...

    def after_measurement(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out metrics after `step` steps."""
        ...
