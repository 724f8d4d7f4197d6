"""The stages: what each needs of the bridge, what it minimises over which rows, how it is measured on held-out data.

A new stage is a row of `STAGE_KINDS` and its section in the recipe; the loop knows none by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from torch import Tensor

from runtime.dataset import Row
from runtime.evaluate import evaluate
from runtime.progress import Progress
from trainer.blip2 import Blip2
from trainer.bridge import Part
from trainer.config import Stage1Config, StageConfig, VqaConfig
from trainer.data import FeatureStore, ImageRows, ResolvedData
from trainer.demo_world import scorers_for
from trainer.draws import StepDraws
from trainer.generate import EagerPipeline
from trainer.generative import CaptionObjective, VqaObjective
from trainer.momentum import MomentumEncoder
from trainer.ranks import Ranks
from trainer.resume import Stateful
from trainer.stage1 import Stage1

StageName = Literal["stage1", "stage2", "vqa"]
STAGES: tuple[StageName, ...] = get_args(StageName)
EVAL_BATCH = 64


class Objective(Protocol):
    """What a stage minimises."""

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Loss of this process' rows, at `indices`, and figures to show beside it.

        The mean of the losses of all processes is the loss of the global batch.
        """
        ...


@dataclass(frozen=True)
class Plan:
    """One stage made ready."""

    objective: Objective
    rows: tuple[ImageRows, ...]
    """What is trained on; a step draws from the first."""
    evaluate: Callable[[Blip2], dict[str, float]]
    """Held-out metrics; every process calls it."""
    state: Mapping[str, Stateful] = field(default_factory=dict)
    """What a resume point holds beside weights and optimiser (a momentum encoder and its queue), by name."""


@dataclass(frozen=True)
class Ingredients:
    """What a plan is made from."""

    model: Blip2
    data: ResolvedData
    store: FeatureStore
    progress: Progress
    ranks: Ranks

    def with_images(self, rows: list[Row]) -> ImageRows:
        """The rows with their image features."""
        return ImageRows(self.model.vision, rows, self.store, self.progress)


@dataclass(frozen=True)
class StageKind:
    """What tells one stage from another."""

    number: int
    """Part of the seed of every step; never given to another stage."""
    needs: tuple[Part, ...]
    """What of the bridge it trains beyond its core."""
    question_conditioned: bool
    """Whether the question conditions the Q-Former."""
    plan: Callable[[Ingredients, StageConfig], Plan]


def _stage1(given: Ingredients, config: StageConfig) -> Plan:
    assert isinstance(config, Stage1Config)
    caption_rows, described = given.data.captions()
    captions = given.with_images(caption_rows)
    momentum = None
    if config.itc_queue:
        momentum = MomentumEncoder(given.model.bridge, config.itc_momentum, config.itc_queue)
    objective = Stage1(config, captions, given.with_images(described[: config.eval_items]), momentum)
    state: dict[str, Stateful] = {} if momentum is None else {"momentum": momentum}
    return Plan(objective, (captions,), objective.evaluate, state)


def _stage2(given: Ingredients, config: StageConfig) -> Plan:
    caption_rows, described = given.data.captions()
    captions = given.with_images(caption_rows)
    return Plan(CaptionObjective(captions), (captions,), lambda model: _captions(model, described[: config.eval_items]))


def _vqa(given: Ingredients, config: StageConfig) -> Plan:
    assert isinstance(config, VqaConfig)
    caption_rows, described = given.data.captions()
    question_rows, asked = given.data.questions()
    captions, questions = given.with_images(caption_rows), given.with_images(question_rows)

    def both(model: Blip2) -> dict[str, float]:
        items = asked[: config.eval_items]
        answers = evaluate(EagerPipeline(model), items, task="vqa", batch_size=EVAL_BATCH).metrics
        return {"vqa_accuracy": answers["accuracy"], **_captions(model, described[: config.eval_items])}

    return Plan(VqaObjective(questions, captions, config.caption_fraction), (questions, captions), both)


def _captions(model: Blip2, rows: list[Row]) -> dict[str, float]:
    metrics = evaluate(
        EagerPipeline(model), rows, task="caption", batch_size=EVAL_BATCH, scorers=scorers_for(rows)
    ).metrics
    return {f"caption_{name}": value for name, value in metrics.items()}


STAGE_KINDS: dict[StageName, StageKind] = {
    "stage1": StageKind(0, ("text", "contrast", "matching", "generation", "temperature"), False, _stage1),
    "stage2": StageKind(1, ("language",), False, _stage2),
    "vqa": StageKind(2, ("text", "language"), True, _vqa),
}
