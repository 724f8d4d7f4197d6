"""Resume points: all that a stage's next step depends on, in one file that appears whole or not at all.

The randomness of a step is a function of seed, stage and step, so a point holds weights, optimiser state, a step
number and the measurements so far. Nothing in it depends on the number of processes.
"""

from pathlib import Path
from typing import Any

import torch

from runtime.errors import CheckpointError
from runtime.files import atomic_folder
from trainer.blip2 import Blip2
from trainer.ema import Ema

FILE = "resume.pt"


def save(
    folder: Path,
    model: Blip2,
    optimiser: torch.optim.Optimizer,
    step: int,
    history: list[dict[str, float]],
    ema: Ema | None,
) -> None:
    """Write the point after `step` steps into `folder`, in place of the one before."""
    state: dict[str, Any] = {
        "step": step,
        "trained": model.trained().state_dict(),
        "optimiser": optimiser.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "history": history,
    }
    with atomic_folder(folder) as work:
        torch.save(state, work / FILE)


def resume(
    folder: Path, model: Blip2, optimiser: torch.optim.Optimizer, ema: Ema | None
) -> tuple[int, list[dict[str, float]]]:
    """Steps already done and their measurements; 0 and none when there is nothing to resume."""
    path = folder / FILE
    if not path.is_file():
        return 0, []
    try:
        state = torch.load(path, weights_only=True)
        model.trained().load_state_dict(state["trained"])
        optimiser.load_state_dict(state["optimiser"])
        if ema is not None:
            ema.load_state_dict(state["ema"] or {})
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this model ({error}); delete {folder} to train the stage anew"
        ) from error
    return int(state["step"]), list(state["history"])
