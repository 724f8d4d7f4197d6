"""The stages: what each needs of the bridge, what it minimises over which rows, how it is measured on held-out data.

A new stage is a row of `STAGE_KINDS` and its section in the recipe; the loop knows none by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from runtime.dataset import Row
from runtime.evaluate import evaluate
from runtime.progress import Progress
from trainer.blip2 import Blip2
from trainer.bridge import Part
from trainer.config import RetrievalConfig, Stage1Config, Stage2Config, StageConfig, StageName, VqaConfig
from trainer.data import FeatureStore, ImageRows, ResolvedData
from trainer.demo_world import scorers_for
from trainer.draws import StepDraws
from trainer.generate import EagerPipeline
from trainer.momentum import MomentumEncoder
from trainer.ranks import Ranks
from trainer.reranking import reranked_recall
from trainer.resume import Stateful
from trainer.speaking import CaptionObjective, Stage2, VqaObjective
from trainer.stage1 import Stage1

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

    def with_images(self, rows: Sequence[Row]) -> ImageRows:
        """The rows with their image features."""
        return ImageRows(self.model.vision, rows, self.store, self.progress, self.data.augment)


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
    assert isinstance(config, Stage2Config)
    if config.itc_weight:
        given.model.bridge.need("text", "contrast", "temperature")
    caption_rows, described = given.data.captions()
    captions, watched = given.with_images(caption_rows), described[: config.eval_items]
    return Plan(Stage2(config, captions), (captions,), lambda model: _captions(model, watched))


def _caption(given: Ingredients, config: StageConfig) -> Plan:
    caption_rows, described = given.data.captions()
    captions, watched = given.with_images(caption_rows), described[: config.eval_items]
    return Plan(CaptionObjective(captions), (captions,), lambda model: _captions(model, watched))


def _vqa(given: Ingredients, config: StageConfig) -> Plan:
    assert isinstance(config, VqaConfig)
    caption_rows, described = given.data.captions()
    question_rows, asked = given.data.questions()
    captions, questions = given.with_images(caption_rows), given.with_images(question_rows)
    items = [row for row in asked[: config.eval_items] if row.question is not None]
    watched = described[: config.eval_items]

    def both(model: Blip2) -> dict[str, float]:
        captioned = _captions(model, watched)
        if not items:  # dialogues alone, which have no metric
            return captioned
        answers = evaluate(EagerPipeline(model), items, task="vqa", batch_size=EVAL_BATCH).metrics
        return {"vqa_accuracy": answers["accuracy"], **captioned}

    objective = VqaObjective(questions, captions, config.caption_fraction, config.dialogue_tokens)
    return Plan(objective, (questions, captions), both)


def _retrieval(given: Ingredients, config: StageConfig) -> Plan:
    assert isinstance(config, RetrievalConfig)
    plan, watched = _stage1(given, config), given.data.captions()[1][: config.eval_items]

    def both(model: Blip2) -> dict[str, float]:
        found = reranked_recall(
            model, watched, candidates=config.candidates, ranks=given.ranks, progress=given.progress
        )
        return {**plan.evaluate(model), **found}

    return replace(plan, evaluate=both)


def _captions(model: Blip2, rows: list[Row]) -> dict[str, float]:
    metrics = evaluate(
        EagerPipeline(model), rows, task="caption", batch_size=EVAL_BATCH, scorers=scorers_for(rows)
    ).metrics
    return {f"caption_{name}": value for name, value in metrics.items()}


HEADS: tuple[Part, ...] = ("text", "contrast", "matching", "generation", "temperature")
STAGE_KINDS: dict[StageName, StageKind] = {
    "stage1": StageKind(0, HEADS, False, _stage1),
    "stage2": StageKind(1, ("language",), False, _stage2),
    "caption": StageKind(3, ("language",), False, _caption),
    "vqa": StageKind(2, ("text", "language"), True, _vqa),
    "retrieval": StageKind(4, HEADS, False, _retrieval),
}
"""Which stage each one starts from says `trainer.config.STARTS_FROM`."""
