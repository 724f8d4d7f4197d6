"""Planted curves: collapsed ones alarm, once and with a way out; healthy ones never do."""

from collections.abc import Callable

import numpy as np
import pytest

from trainer.logs.alarms import Alarm, Alarms
from trainer.logs.lines import contrast_lines, generation_lines, language_lines, matching_lines

STAGE1 = {"itc": contrast_lines(1024, 0.1), "itm": matching_lines(), "itg": generation_lines(30_523, 0.1)}
STEPS = 20_000
Curve = Callable[[int], float]


def learning(start: float, end: float, steps: float = 1_500) -> Curve:
    return lambda step: end + (start - end) * float(np.exp(-step / steps))


HEALTHY: dict[str, Curve] = {"itc": learning(6.93, 1.6), "itm": learning(0.69, 0.2), "itg": learning(10.3, 2.9)}


def raised(
    curves: dict[str, Curve],
    *,
    lines=STAGE1,
    norm: Curve = lambda _: 1.0,
    steps: int = STEPS,
    warmup: int = 2_000,
    noise: float = 0.05,
    total: Curve | None = None,
) -> list[Alarm]:
    rng = np.random.default_rng(0)
    alarms = Alarms(lines, steps=steps, warmup_steps=warmup, log_every=10)
    returned = []
    for step in range(10, steps + 1, 10):
        losses = {name: curve(step) * (1 + noise * float(rng.normal())) for name, curve in curves.items()}
        losses["loss"] = sum(losses.values()) if total is None else total(step) * (1 + noise * float(rng.normal()))
        returned += alarms.see(step, losses, norm(step) * float(rng.lognormal(0, 0.3)))
    assert returned == alarms.raised
    return returned


def kinds(alarms: list[Alarm]) -> list[str]:
    return [alarm.kind for alarm in alarms]


def test_a_healthy_run_is_left_alone() -> None:
    assert raised(HEALTHY) == []


def test_a_short_healthy_run_is_left_alone() -> None:
    curves = {"itc": learning(6.9, 1.6, 30), "itm": learning(0.69, 0.3, 30), "itg": learning(10.3, 2.9, 30)}
    assert raised(curves, steps=300, warmup=30) == []


@pytest.mark.parametrize(
    ("name", "stuck_at", "says"),
    [
        ("itc", 6.93, "every image is as similar to every text"),
        ("itm", 0.6365, "one pair in three is true"),
        ("itm", 0.693, "the prior's entropy is 0.6365"),
        ("itg", 6.8, "how common they are"),
    ],
)
def test_a_loss_that_never_begins_to_fall_alarms_once(name: str, stuck_at: float, says: str) -> None:
    alarms = raised(HEALTHY | {name: lambda _: stuck_at}, noise=0.01)
    assert kinds(alarms) == [f"{name}_stuck"]
    assert alarms[0].step == 3_000, "judged as soon as warm-up and 1,000 steps are over"
    assert says in alarms[0].text


def test_a_loss_that_falls_late_is_not_judged_before_it_had_time() -> None:
    late = HEALTHY | {"itc": lambda step: 6.93 if step < 2_400 else 3.0}
    assert raised(late) == []


def test_a_plateau_just_below_the_prior_is_learning() -> None:
    assert raised(HEALTHY | {"itm": lambda _: 0.61}, noise=0.01) == []


@pytest.mark.parametrize("growth", [1.2, 3.0])
def test_a_rising_loss_alarms(growth: float) -> None:
    """Stage 2 falls to 2.2 and rises again, slowly."""

    def loss(step: int) -> float:
        return learning(6.7, 2.2)(step) if step < 12_000 else 2.2 * (1 + (growth - 1) * (step - 12_000) / 8_000)

    alarms = raised({}, lines={"loss": language_lines(50_272)}, total=loss)
    assert kinds(alarms) == ["loss_rising"]
    assert 12_000 < alarms[0].step < STEPS
    assert "lower learning_rate" in alarms[0].text


def test_noise_and_a_plateau_are_no_rise() -> None:
    assert raised({}, lines={"loss": language_lines(50_272)}, total=lambda _: 2.2, noise=0.3) == []


def test_warmup_may_rise() -> None:
    bump = lambda step: 7.0 + step / 1_000 if step <= 2_000 else learning(9.0, 2.2)(step - 2_000)  # noqa: E731
    assert raised({}, lines={"loss": language_lines(50_272)}, total=bump) == []


def test_exploding_gradients_alarm_and_single_spikes_do_not() -> None:
    spiky = lambda step: 100.0 if step % 1_000 == 0 else 1.0  # noqa: E731
    assert raised(HEALTHY, norm=spiky) == []
    alarms = raised(HEALTHY, norm=lambda step: 1.0 if step < 9_000 else 40.0)
    assert kinds(alarms) == ["gradient_exploding"]
    assert 9_000 < alarms[0].step <= 10_000
    assert kinds(raised(HEALTHY, norm=lambda step: 1.0 if step < 9_000 else float("inf"))) == ["gradient_exploding"]


def test_a_run_too_short_to_judge_never_alarms() -> None:
    assert raised({"itc": lambda _: 6.93, "itm": lambda _: 0.69, "itg": lambda _: 10.3}, steps=40, warmup=2) == []
