"""The loop: the steps of one stage that are left, with held-out measurements and resume points between them."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.errors import InputError, QforgeError
from runtime.progress import Progress
from trainer import resume
from trainer.blip2 import Blip2
from trainer.config import StageConfig, StageName
from trainer.data import rows_at
from trainer.draws import StepDraws
from trainer.ema import Ema
from trainer.optimiser import make_optimiser, set_rates
from trainer.plans import STAGE_KINDS, Plan
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

    `partial` is the folder of the resume point. With an average of weights, that is what is measured and what the model
    has in the end.
    """
    local = rows_per_rank(stage, config, ranks)
    model.train()
    optimiser = make_optimiser(model, config)
    ema = Ema(model, config.ema_decay) if config.ema_decay else None
    done, history = resume.resume(partial, model, optimiser, ema)
    with progress.bar(stage, config.steps, done=done, items_per_step=config.batch_size) as bar:
        for step in range(done, config.steps):
            began = time.monotonic()
            draws = StepDraws((seed, STAGE_KINDS[stage].number, step), ranks.index * local, config.batch_size)
            torch.manual_seed(draws.torch_seed(ranks.index))
            indices = rows_at(step, config.batch_size, len(plan.rows[0]), seed)[draws.first :][:local]
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, figures = plan.objective.loss(model, indices, draws, ranks)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise TrainingFailed(
                    f"{stage}: the loss is {value} at step {step + 1} of {config.steps}; lower learning_rate "
                    f"({config.learning_rate}) or set clip_norm, then run again: it goes on from the last resume point"
                )
            norm = _update(model, optimiser, loss, step, config)
            if ema is not None:
                ema.update()
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
                with ema.in_place() if ema is not None else nullcontext():
                    metrics = _measure(model, plan)
                history.append({"step": step + 1, "train_loss": value, **metrics})
                progress.note(f"{stage} {step + 1}/{config.steps} held out: {_line(history[-1])}")
                for watcher in watchers:
                    watcher.after_measurement(stage, step + 1, metrics)
            if not last and (step + 1) % config.save_every == 0:
                resume.save(partial, model, optimiser, step + 1, history, ema)
    if ema is not None:
        ema.replace()
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
    set_rates(optimiser, step, config)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = None
    if config.clip_norm:
        norm = float(nn.utils.clip_grad_norm_(model.trained().parameters(), config.clip_norm))
    optimiser.step()
    return norm


def _measure(model: Blip2, plan: Plan) -> dict[str, float]:
    model.eval()
    metrics = plan.evaluate(model)
    model.train()
    return metrics


def _line(entry: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in entry.items() if name != "step")
