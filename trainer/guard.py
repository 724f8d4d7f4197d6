"""A loss that is no number stops training with everything at hand that is needed to find out why."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import QforgeError
from runtime.files import atomic_folder
from trainer.blip2 import Blip2
from trainer.checkpoint import write_checkpoint
from trainer.config import StageConfig
from trainer.ranks import Ranks
from trainer.shard import whole
from trainer.stepper import Stepped


class TrainingFailed(QforgeError, ArithmeticError):
    """The loss, or its gradient, is no longer a number."""

    exit_code = 1


def stop(
    stage: str,
    step: int,
    model: Blip2,
    config: StageConfig,
    stepped: Stepped,
    image_ids: Sequence[str],
    *,
    folder: Path,
    recipe_yaml: str,
    ranks: Ranks,
) -> TrainingFailed:
    """Write the weights before step `step` (1-based) as a checkpoint into `folder`, with the batch that failed.

    All processes call this, each with the images of its own rows; returns the error to raise.
    """
    batches = ranks.collect(list(image_ids))
    facts = {
        "stage": stage,
        "step": step,
        "loss": str(stepped.loss),
        "figures": {name: str(value) for name, value in stepped.figures.items()},
        "gradient_norm": str(stepped.gradient_norm),
        "image_ids_by_process": batches,
    }
    with whole(model):
        if ranks.is_main:
            with atomic_folder(folder) as work:
                write_checkpoint(model, work, stage=stage, metrics={"failure": facts}, recipe_yaml=recipe_yaml)
                (work / "failure.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    wrong = ("the loss", stepped.loss) if not math.isfinite(stepped.loss) else ("the norm", stepped.gradient_norm)
    return TrainingFailed(
        f"{stage}: {wrong[0]} is {wrong[1]} at step {step} of {config.steps}. {folder} has the checkpoint before it "
        f"and, in failure.json, the images of its batch; nothing is lost. The same command tries the step again; to go "
        f"on otherwise, lower learning_rate ({config.learning_rate}) or clip_norm ({config.clip_norm}) and start a new "
        f"run with --init {folder} --stage {stage}"
    )
