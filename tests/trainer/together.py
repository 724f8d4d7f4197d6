"""Trainings of a few steps, run by one process in the tests and by two in `python -m tests.trainer.together FOLDER`.

FOLDER/given.json says model and data; each training leaves its steps and errors in FOLDER/NAME.PROCESSES.json.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from runtime.progress import Progress
from trainer.blip2 import Blip2
from trainer.config import ModelConfig, QFormerConfig, StageName
from trainer.data import FeatureStore, ResolvedData, resolve
from trainer.data_config import AugmentConfig, DataConfig
from trainer.guard import TrainingFailed
from trainer.ranks import Ranks, join
from trainer.speaking import Stage2
from trainer.stage_config import CaptionConfig, RetrievalConfig, Stage1Config, Stage2Config, StageConfig, VqaConfig
from trainer.stepper import Stepper
from trainer.train import run_stage
from trainer.watch import StepReport, Watcher

SHORT: dict[str, Any] = dict(
    steps=4,
    batch_size=8,
    warmup_steps=1,
    eval_every=4,
    eval_items=4,
    save_every=2,
    learning_rate=1e-3,
    precision="fp32",
)
TRAININGS: dict[str, tuple[StageName, StageConfig]] = {
    "stage1": ("stage1", Stage1Config(**SHORT)),
    "stage1_parts": ("stage1", Stage1Config(**SHORT, accumulation=2)),
    "stage1_faithful": ("stage1", Stage1Config(**SHORT, itc_key_gradient=False, itc_queue=16)),
    "stage2": ("stage2", Stage2Config(**SHORT)),
    "stage2_parts": ("stage2", Stage2Config(**SHORT, accumulation=2)),
    "stage2_contrast": ("stage2", Stage2Config(**SHORT, itc_weight=0.5)),
    "vqa": ("vqa", VqaConfig(**SHORT)),
    "caption": ("caption", CaptionConfig(**SHORT)),
    "retrieval": ("retrieval", RetrievalConfig(**SHORT, candidates=10)),
    "retrieval_tower": ("retrieval", RetrievalConfig(**SHORT, candidates=10, train_vision=True)),
    "sharded": ("stage2", Stage2Config(**SHORT, shard=("vision", "language"))),
    "sharded_tower": ("stage2", Stage2Config(**SHORT, shard=("vision",), train_vision=True)),
    "whole_tower": ("stage2", Stage2Config(**SHORT, train_vision=True)),
    "broken": ("stage2", Stage2Config(**SHORT)),
    "changed": ("stage2", Stage2Config(**SHORT)),
}
CHANGES = AugmentConfig(crop_scale=(0.5, 1.0), flip=True, operations=2)
"""Of the images of the training so called."""
SAME_ON_BOTH = [name for name in TRAININGS if name not in ("sharded", "sharded_tower")]
"""Those that one process can do too."""
RESUMED = ("stage1", "stage2", "caption", "vqa", "retrieval_tower")
"""Those that are cut short and go on, with dropout."""


class Notes(Watcher):
    """Keeps what the loop tells."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def after_step(self, model: Blip2, report: StepReport) -> None:
        self.steps.append(asdict(report))


class Given:
    """Model and data of all trainings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        given = json.loads((folder / "given.json").read_text())
        self.model = ModelConfig.model_validate(given["model"])
        world, broken = Path(given["world"]), Path(given["broken_world"])
        self.data, self.other_data = resolve(DataConfig(), world), dict[str, ResolvedData]()
        self.other_data["broken"] = resolve(DataConfig(), broken)
        self.other_data["changed"] = resolve(DataConfig(augment=CHANGES), world)

    @staticmethod
    def write(folder: Path, model: ModelConfig, world: Path, broken_world: Path) -> None:
        """What `Given(folder)` reads; the model is given no dropout, which differs between processes."""
        small = model.model_copy(update={"qformer": QFormerConfig(**model.qformer.model_dump() | {"dropout": 0.0})})
        tree = {"model": small.model_dump(mode="json"), "world": str(world), "broken_world": str(broken_world)}
        (folder / "given.json").write_text(json.dumps(tree))

    def train(self, name: str, ranks: Ranks, *, out: str | None = None, dropout: float = 0.0) -> Path:
        """One training; returns its checkpoint and leaves its steps beside it."""
        stage, config = TRAININGS[name]
        qformer = self.model.qformer.model_copy(update={"dropout": dropout})
        notes, folder = Notes(), self.folder / f"{out or name}.{ranks.count}"
        run_stage(
            stage,
            model=self.model.model_copy(update={"qformer": qformer}),
            data=self.other_data.get(name, self.data),
            config=config,
            seed=3,
            init=None,
            out=folder,
            recipe_yaml="{}\n",
            store=FeatureStore(),
            progress=Progress(quiet=True),
            ranks=ranks,
            watchers=[notes],
        )
        if ranks.is_main:
            folder.with_suffix(f".{ranks.count}.json").write_text(json.dumps(notes.steps))
        return folder


class Poisoned(Stage2):
    """Stage 2 whose loss in the third step is no number, on the last process alone."""

    calls = 0

    def loss(self, model: Blip2, indices: Any, draws: Any, ranks: Ranks) -> tuple[torch.Tensor, dict[str, float]]:
        loss, figures = super().loss(model, indices, draws, ranks)
        Poisoned.calls += 1
        bad = Poisoned.calls == 3 and ranks.index == ranks.count - 1
        return (loss * float("nan") if bad else loss), figures


class Killed(Exception):
    """Stands for what ends all processes between two steps."""


def cut(given: Given, ranks: Ranks, name: str, out: str, dropout: float = 0.0) -> None:
    """A training that ends after three of its four steps, the last resume point being that after the second."""
    step = Stepper.step

    def dying(self: Stepper, number: int, *rest: Any) -> Any:
        if number == 3:
            raise Killed
        return step(self, number, *rest)

    Stepper.step = dying  # type: ignore[method-assign]
    try:
        given.train(name, ranks, out=out, dropout=dropout)
    except Killed:
        Stepper.step = step  # type: ignore[method-assign]


def main(folder: Path) -> None:
    """All trainings on the processes of the launcher."""
    import trainer.plans

    given, ranks = Given(folder), join()
    for name in TRAININGS:
        given.train(name, ranks)
    cut(given, ranks, "stage1", "cut")
    for name in RESUMED:
        given.train(name, ranks, out=f"{name}_whole", dropout=0.1)
        cut(given, ranks, name, f"{name}_cut", dropout=0.1)
        given.train(name, ranks, out=f"{name}_cut", dropout=0.1)
    trainer.plans.Stage2 = Poisoned  # type: ignore[misc]
    try:
        given.train("stage2", ranks, out="poisoned")
    except TrainingFailed as error:
        (folder / f"failed.{ranks.index}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
