"""The loop: the steps of one stage that are left, with held-out measurements and resume points between them."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import InputError, QforgeError
from runtime.progress import Progress
from trainer import resume
from trainer.blip2 import Blip2
from trainer.config import StageConfig
from trainer.draws import StepDraws
from trainer.optimiser import learning_rate, make_optimiser
from trainer.plans import STAGE_KINDS, Plan, StageName
from trainer.ranks import Ranks
from trainer.watch import StepReport, Watcher


class TrainingFailed(QforgeError, ArithmeticError):
    """The loss is no longer a number."""

    exit_code = 1


def fit(
    stage: StageName,
    model: Blip2,
    plan: Plan,
    config: StageConfig,
    *,
    seed: int,
    partial: Path,
    ranks: Ranks,
    progress: Progress,
    watchers: Sequence[Watcher] = (),
) -> list[dict[str, float]]:
    """Run the steps that are left; returns every held-out measurement, oldest first.

    `partial` is the folder of the resume point.
    """
    local = rows_per_rank(stage, config, ranks)

    def drawn(step: int) -> tuple[list[int], StepDraws]:
        """Rows of this process in a step, and its draws."""
        draws = StepDraws((seed, STAGE_KINDS[stage].number, step), ranks.index * local, config.batch_size)
        return plan.rows[0].at_step(step, config.batch_size, seed)[draws.first :][:local], draws

    model.train()
    optimiser = make_optimiser(model, config)
    done, history = resume.resume(partial, model, optimiser)
    with progress.bar(stage, config.steps, done=done, items_per_step=config.batch_size) as bar:
        for step in range(done, config.steps):
            began = time.monotonic()
            indices, draws = drawn(step)
            plan.rows[0].ahead(*drawn(step + 1))
            torch.manual_seed(draws.torch_seed(ranks.index))
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, figures = plan.objective.loss(model, indices, draws, ranks)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise TrainingFailed(
                    f"{stage}: the loss is {value} at step {step + 1} of {config.steps}; lower learning_rate "
                    f"({config.learning_rate}) or set clip_norm, then run again: it goes on from the last resume point"
                )
            norm = _update(model, optimiser, loss, step, config)
            bar.advance(loss=value, **figures)
            data_s = sum(rows.take().seconds for rows in plan.rows)
            report = StepReport(
                stage=stage,
                step=step + 1,
                steps=config.steps,
                loss=value,
                figures=figures,
                rows=config.batch_size,
                learning_rate=max(group["lr"] for group in optimiser.param_groups),
                gradient_norm=norm,
                data_s=data_s,
                compute_s=time.monotonic() - began - data_s,
            )
            for watcher in watchers:
                watcher.after_step(model, report)
            last = step + 1 == config.steps
            if last or (step + 1) % config.eval_every == 0:
                metrics = _measure(model, plan)
                history.append({"step": step + 1, "train_loss": value, **metrics})
                progress.note(f"{stage} {step + 1}/{config.steps} held out: {_line(history[-1])}")
                for watcher in watchers:
                    watcher.after_measurement(stage, step + 1, metrics)
            if not last and (step + 1) % config.save_every == 0:
                resume.save(partial, model, optimiser, step + 1, history)
    return history


def rows_per_rank(stage: str, config: StageConfig, ranks: Ranks) -> int:
    """Rows of a step on each process; InputError unless the global batch divides evenly."""
    if config.batch_size % ranks.count:
        raise InputError(
            f"{stage}.batch_size: expected a multiple of the {ranks.count} processes, found {config.batch_size}: it is "
            f"the batch of all processes together"
        )
    return config.batch_size // ranks.count


def _update(
    model: Blip2, optimiser: torch.optim.Optimizer, loss: Tensor, step: int, config: StageConfig
) -> float | None:
    """One step of the optimiser; returns the norm of the gradient when it is clipped."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, config)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = None
    if config.clip_norm:
        norm = float(nn.utils.clip_grad_norm_(model.bridge.parameters(), config.clip_norm))
    optimiser.step()
    return norm


def _measure(model: Blip2, plan: Plan) -> dict[str, float]:
    model.eval()
    metrics = plan.evaluate(model)
    model.train()
    return metrics


def _line(entry: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in entry.items() if name != "step")
