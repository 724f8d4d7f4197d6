"""Collapse alarms: what a curve says about a run that goes wrong, in one sentence, once per kind.

They see logged steps only and keep a few numbers, so feeding them the log of an interrupted run again brings them to
where they were: a resumed run warns of the same things at the same steps as a whole one.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.logs.lines import LossLines

SETTLED_STEPS = 1_000
"""Steps after warm-up in which a loss must have begun to fall; half of the run where that is shorter."""
LEAST_STEPS = 50
"""A run of fewer steps after warm-up is too short to judge."""
WINDOW = (5, 50)
"""Fewest and most logged steps that are averaged."""
WINDOWS_IN_A_RUN = 20
RISE = 0.10
"""Share by which the loss must lie above the best it had, twice in a row."""
ERRORS = 4.0
"""… and by that many standard errors, so that noise is no rise."""
EXPLOSION = 10.0
"""Growth of the median gradient norm, against the typical one before, that is no noise."""
TOTAL = "loss"
"""The sum of a stage's losses."""


@dataclass(frozen=True)
class Alarm:
    """Something a curve shows."""

    kind: str
    step: int
    text: str
    """What is seen, what it means, what to try."""


@dataclass(frozen=True)
class _Window:
    mean: float
    variance: float
    size: int

    def rises_above(self, other: "_Window") -> bool:
        error = math.sqrt(self.variance / self.size + other.variance / other.size)
        return self.mean - other.mean > max(RISE * abs(other.mean), ERRORS * error)


class Alarms:
    """Watches the losses and the gradient norm of one stage."""

    def __init__(self, lines: Mapping[str, LossLines], *, steps: int, warmup_steps: int, log_every: int) -> None:
        self._lines = lines
        self._judged_from = warmup_steps + max(LEAST_STEPS, min(SETTLED_STEPS, steps // 2))
        fewest, most = WINDOW
        self._window = min(max(steps // log_every // WINDOWS_IN_A_RUN, fewest), most)
        self._recent = {name: deque[float](maxlen=self._window) for name in lines}
        self._block: list[float] = []
        self._norms: list[float] = []
        self._best: _Window | None = None
        self._worse = 0
        self._typical_norms: list[float] = []
        self._after_warmup = warmup_steps
        self.raised: list[Alarm] = []
        """All there were, oldest first."""

    def see(self, step: int, losses: Mapping[str, float], gradient_norm: float) -> list[Alarm]:
        """Take in one logged step (1-based); returns what it shows for the first time."""
        found = [*self._stuck(step, losses), *self._rising(step, losses[TOTAL]), *self._exploding(step, gradient_norm)]
        known = {alarm.kind for alarm in self.raised}
        new = [alarm for alarm in found if alarm.kind not in known]
        self.raised += new
        return new

    def _stuck(self, step: int, losses: Mapping[str, float]) -> list[Alarm]:
        found = []
        for name, recent in self._recent.items():
            recent.append(losses[name])
            lines, full = self._lines[name], len(recent) == self._window
            if lines.stuck is None or not full or step < self._judged_from:
                continue
            mean = statistics.fmean(recent)
            if mean > lines.stuck:
                what = f"{name} is {mean:.4f} on average over the last {self._window} logged steps, {_beside(lines)}"
                found.append(Alarm(f"{name}_stuck", step, f"{what}: {lines.hint}"))
        return found

    def _rising(self, step: int, loss: float) -> list[Alarm]:
        """Compare whole windows with the best one: a loss that grows means that training undoes what it did."""
        if step <= self._after_warmup:
            return []
        self._block.append(loss)
        if len(self._block) < self._window:
            return []
        now = _Window(statistics.fmean(self._block), statistics.variance(self._block), len(self._block))
        self._block = []
        if self._best is None or now.mean < self._best.mean:
            self._best, self._worse = now, 0
            return []
        self._worse = self._worse + 1 if now.rises_above(self._best) else 0
        if self._worse < 2:
            return []
        return [
            Alarm(
                "loss_rising",
                step,
                f"the loss rose from {self._best.mean:.4f} to {now.mean:.4f} (averages of {now.size} logged steps): "
                f"training undoes what it had learned; lower learning_rate, set clip_norm, and go on from an earlier "
                f"checkpoint",
            )
        ]

    def _exploding(self, step: int, norm: float) -> list[Alarm]:
        self._norms.append(norm)
        if len(self._norms) < self._window:
            return []
        median = statistics.median(self._norms)
        self._norms = []
        typical = statistics.median(self._typical_norms) if self._typical_norms else None
        if typical is None or not median > EXPLOSION * typical:
            self._typical_norms.append(median)
            return []
        return [
            Alarm(
                "gradient_exploding",
                step,
                f"the gradient norm grew to {median:.3g} (median of {self._window} logged steps), from {typical:.3g} "
                f"before: steps are no longer small corrections; lower learning_rate, lengthen warmup_steps or set "
                f"clip_norm",
            )
        ]


def _beside(lines: LossLines) -> str:
    known = "" if lines.prior is None else f", the prior's entropy is {lines.prior:.4f}"
    return f"where chance is {lines.chance:.4f}{known} and the floor {lines.floor:.4f}"
