"""One loop, three stages. A killed run goes on from its last resume point and ends with the same bits.

All randomness of a step (rows, captions, dropout, negatives) is a function of seed, stage and step, so a resume
point holds weights, optimiser state and a step number, nothing else.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from runtime.dataset import Row
from runtime.errors import CheckpointError, QforgeError
from runtime.evaluate import evaluate
from runtime.files import atomic_folder
from runtime.progress import Progress
from trainer.blip2 import Blip2, new_blip2
from trainer.bridge import PARTS, Part
from trainer.checkpoint import load_bridge, read_config, require_halves, write_checkpoint
from trainer.config import ModelConfig, Stage1Config, StageConfig, VqaConfig
from trainer.data import FeatureSource, ImageRows, ResolvedData, rows_at
from trainer.demo_world import scorers_for
from trainer.generate import EagerPipeline
from trainer.generative import CaptionObjective, VqaObjective
from trainer.optimiser import learning_rate, make_optimiser
from trainer.stage1 import Stage1

StageName = Literal["stage1", "stage2", "vqa"]
STAGES: tuple[StageName, ...] = ("stage1", "stage2", "vqa")
NEEDED: dict[StageName, tuple[Part, ...]] = {
    "stage1": ("text", "contrast", "matching", "generation", "temperature"),
    "stage2": ("language",),
    "vqa": ("text", "language"),
}
"""What of the bridge a stage trains beyond its core."""
EVAL_BATCH = 64


class TrainingFailed(QforgeError, ArithmeticError):
    """The loss is no longer a number."""

    exit_code = 1


class Objective(Protocol):
    """What a stage minimises."""

    def loss(self, model: Blip2, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of the rows at `indices`, and figures to show beside it."""
        ...


@dataclass(frozen=True)
class Plan:
    """One stage made ready: what to minimise over which rows, and how to measure it on held-out data."""

    objective: Objective
    rows: tuple[ImageRows, ...]
    """What is trained on; a step draws from the first."""
    evaluate: Callable[[Blip2], dict[str, float]]


def run_stage(
    stage: StageName,
    *,
    model: ModelConfig,
    data: ResolvedData,
    config: StageConfig,
    seed: int,
    init: Path | None,
    out: Path,
    recipe_yaml: str,
    store: FeatureSource,
    progress: Progress,
) -> Path:
    """Train one stage from the bridge of checkpoint `init` (None: a fresh one) and write the checkpoint `out`.

    An interrupted run of the same stage is resumed from `.OUT.partial` beside `out`. `store` keeps image features
    from stage to stage.
    """
    torch.manual_seed(seed)
    began = None if init is None else read_config(init)
    given = PARTS if began is None else began.parts
    fresh = _fresh_parts(model, given)
    blip2 = new_blip2(model, stage == "vqa", (*given, *fresh))
    blip2.bridge.need(*NEEDED[stage])
    if init is not None and began is not None:
        require_halves(init, began, model)
        load_bridge(blip2, init, fresh)
    if fresh:
        progress.note(f"{stage}: {init} has no {', '.join(fresh)} part; it starts from random weights")
    plan = _plan(blip2, data, config, store, progress)
    partial = out.with_name(f".{out.name}.partial")
    history = _fit(stage, blip2, plan, config, seed, partial, progress)
    broken = {path: why for rows in plan.rows for path, why in rows.broken().items()}
    metrics: dict[str, Any] = {"stage": stage, "held_out": history, "broken_images": broken}
    if features := store.statistics():
        metrics["features"] = features
        progress.note(f"{stage}: image features {', '.join(f'{name} {count:,}' for name, count in features.items())}")
    with atomic_folder(out) as folder:
        write_checkpoint(blip2, folder, stage=stage, metrics=metrics, recipe_yaml=recipe_yaml)
    shutil.rmtree(partial, ignore_errors=True)
    if broken:
        progress.note(f"{stage}: {len(broken)} images could not be read and were replaced; metrics.json names them")
    return out


def _fresh_parts(model: ModelConfig, given: Sequence[Part]) -> tuple[Part, ...]:
    """Only the projection into a language model may be new: a retrieval checkpoint that is given one has none yet."""
    return ("language",) if model.language is not None and "language" not in given else ()


def _plan(model: Blip2, data: ResolvedData, config: StageConfig, store: FeatureSource, progress: Progress) -> Plan:
    def with_images(rows: list[Row]) -> ImageRows:
        return ImageRows(model.vision, rows, store, progress)

    caption_rows, described = data.captions()
    described = described[: config.eval_items]
    captions = with_images(caption_rows)
    if isinstance(config, Stage1Config):
        stage1 = Stage1(config, captions, with_images(described))
        return Plan(stage1, (captions,), stage1.evaluate)
    if not isinstance(config, VqaConfig):
        return Plan(CaptionObjective(captions), (captions,), lambda blip2: _captions(blip2, described))
    question_rows, asked = data.questions()
    asked = asked[: config.eval_items]
    questions = with_images(question_rows)

    def both(blip2: Blip2) -> dict[str, float]:
        answers = evaluate(EagerPipeline(blip2), asked, task="vqa", batch_size=EVAL_BATCH).metrics
        return {"vqa_accuracy": answers["accuracy"], **_captions(blip2, described)}

    return Plan(VqaObjective(questions, captions, config.caption_fraction), (questions, captions), both)


def _captions(model: Blip2, rows: list[Row]) -> dict[str, float]:
    metrics = evaluate(
        EagerPipeline(model), rows, task="caption", batch_size=EVAL_BATCH, scorers=scorers_for(rows)
    ).metrics
    return {f"caption_{name}": value for name, value in metrics.items()}


def _fit(
    stage: StageName, model: Blip2, plan: Plan, config: StageConfig, seed: int, partial: Path, progress: Progress
) -> list[dict[str, float]]:
    """Run the steps that are left; returns every held-out measurement, oldest first."""
    model.train()
    optimiser = make_optimiser(model.bridge, config)
    done, history = _resume(partial, model, optimiser)
    with progress.bar(stage, config.steps, done=done, items_per_step=config.batch_size) as bar:
        for step in range(done, config.steps):
            step_seed = np.random.SeedSequence([seed, STAGES.index(stage), step])
            torch.manual_seed(int(step_seed.generate_state(1)[0]))
            indices = rows_at(step, config.batch_size, len(plan.rows[0]), seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                loss, figures = plan.objective.loss(model, indices, np.random.default_rng(step_seed))
            value = float(loss.detach())
            if not np.isfinite(value):
                raise TrainingFailed(
                    f"{stage}: the loss is {value} at step {step + 1} of {config.steps}; lower learning_rate "
                    f"({config.learning_rate}) or set clip_norm, then run again: it goes on from the last resume point"
                )
            _update(model, optimiser, loss, step, config)
            bar.advance(loss=value, **figures)
            last = step + 1 == config.steps
            if last or (step + 1) % config.eval_every == 0:
                history.append({"step": step + 1, "train_loss": value, **_measure(model, plan)})
                progress.note(f"{stage} {step + 1}/{config.steps} held out: {_line(history[-1])}")
            if not last and (step + 1) % config.save_every == 0:
                _save(partial, model, optimiser, step + 1, history)
    return history


def _update(model: Blip2, optimiser: torch.optim.Optimizer, loss: Tensor, step: int, config: StageConfig) -> None:
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, config)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if config.clip_norm:
        nn.utils.clip_grad_norm_(model.bridge.parameters(), config.clip_norm)
    optimiser.step()


def _measure(model: Blip2, plan: Plan) -> dict[str, float]:
    model.eval()
    metrics = plan.evaluate(model)
    model.train()
    return metrics


def _line(entry: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in entry.items() if name != "step")


def _save(
    partial: Path, model: Blip2, optimiser: torch.optim.Optimizer, step: int, history: list[dict[str, float]]
) -> None:
    state: dict[str, Any] = {
        "step": step,
        "bridge": model.bridge.state_dict(),
        "optimiser": optimiser.state_dict(),
        "history": history,
    }
    with atomic_folder(partial) as folder:
        torch.save(state, folder / "resume.pt")


def _resume(partial: Path, model: Blip2, optimiser: torch.optim.Optimizer) -> tuple[int, list[dict[str, float]]]:
    """Steps already done and their measurements; 0 and none when there is nothing to resume."""
    path = partial / "resume.pt"
    if not path.is_file():
        return 0, []
    try:
        state = torch.load(path, weights_only=True)
        model.bridge.load_state_dict(state["bridge"])
        optimiser.load_state_dict(state["optimiser"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this model ({error}); delete {partial} to train the stage anew"
        ) from error
    return int(state["step"]), list(state["history"])
