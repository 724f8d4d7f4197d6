"""Resume points: all that a stage's next step depends on, in one file that appears whole or not at all.

The randomness of a step is a function of seed, stage and step, so a point holds weights, optimiser state, loss scale,
averages, a step number and the measurements so far. Sharded tensors are saved whole: nothing depends on the number of
processes, and a run goes on with more or fewer of them.
"""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.errors import CheckpointError, InputError
from runtime.files import scratch_file
from runtime.settings import changed
from trainer.stage_config import deciding

FILE = "resume.pt"


class Stateful(Protocol):
    """Weights, optimiser, loss scale, averages: whatever goes on where it stopped."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state over."""
        ...


@dataclass
class Progressed:
    """How far a stage is."""

    step: int = 0
    """Steps done."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Held-out measurements, oldest first."""
    cut_texts: int = 0
    """Rows trained on, of all processes and epochs, that had a text of more than 50 words."""


class ResumePoints:
    """The resume point of one stage, written in the background: training waits for a copy in memory, not for the disk.

    One write is in flight at most; what goes wrong with it is raised at the next. Leaving the context waits for it.
    """

    def __init__(
        self, folder: Path, parts: Mapping[str, Stateful], settings: Mapping[str, Any], *, writes: bool
    ) -> None:
        """`parts` by name; `settings` by section, which say what is trained; the process that `writes` is the first."""
        self.path = folder / FILE
        self._parts, self._settings, self._writes = parts, settings, writes
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="resume-point")
        self._flight: Future[None] | None = None

    def __enter__(self) -> "ResumePoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.settle()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"The resume point could not be written either: {failed}")
        finally:
            self._pool.shutdown()

    def save(self, done: Progressed) -> None:
        """Take the point now and write it meanwhile. All processes call this; the first writes."""
        self.settle()
        state = {name: _snapshot(part.state_dict(), keep=self._writes) for name, part in self._parts.items()}
        if not self._writes:
            return
        about = {"step": done.step, "history": [dict(entry) for entry in done.history], "cut_texts": done.cut_texts}
        whole = {**about, "settings": dict(self._settings), "parts": state}
        self._flight = self._pool.submit(_write, self.path, whole)

    def settle(self) -> None:
        """Wait for the write in flight; raises what it raised."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            flight.result()

    def restore(self) -> Progressed:
        """Go on from the point there is, or from the beginning.

        Raises:
            InputError: it was made with other settings. CheckpointError: it does not fit this model.
        """
        if not self.path.is_file():
            return Progressed()
        again = f"delete {self.path.parent} to train the stage anew"
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            step, history, settings = int(state["step"]), list(state["history"]), state["settings"]
        except (RuntimeError, KeyError, ValueError, EOFError) as error:
            raise CheckpointError(f"{self.path} is damaged or of another version ({error}); {again}") from error
        if differences := changed(deciding(settings), deciding(self._settings)):
            raise InputError(
                f"{self.path} has {step:,} steps of training with other settings: {'; '.join(differences)}. Nothing "
                f"is lost: set it back to go on from there, choose another --out, or {again}"
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(_like(state["parts"][name], part.state_dict()))
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{self.path} does not fit this model ({error}); {again}") from error
        return Progressed(step, history, state.get("cut_texts", 0))  # a point of an earlier version has none


class OptimiserState:
    """An optimiser whose state is sharded as its parameters are."""

    def __init__(self, optimiser: torch.optim.Optimizer) -> None:
        self._optimiser = optimiser

    def state_dict(self) -> dict[str, Any]:
        """Of the optimiser."""
        return self._optimiser.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Whole tensors; each is sharded as its parameter is."""
        parameters = [parameter for group in self._optimiser.param_groups for parameter in group["params"]]
        for number, of_parameter in state["state"].items():
            for name, value in of_parameter.items():
                if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                    of_parameter[name] = _like(value, parameters[number])
        self._optimiser.load_state_dict(state)


def _write(path: Path, state: dict[str, Any]) -> None:
    with scratch_file(path) as work:
        torch.save(state, work)
        with work.open("rb") as written:
            os.fsync(written.fileno())
        work.replace(path)


def _snapshot(tree: Any, *, keep: bool) -> Any:
    """A copy in CPU memory; sharded tensors are gathered, by all processes, of which some do not `keep` it."""
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True) if keep else None
    if isinstance(tree, Mapping):
        return {key: _snapshot(value, keep=keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_snapshot(value, keep=keep) for value in tree]
    return tree


def _like(saved: Any, now: Any) -> Any:
    """What was saved, sharded where the state `now` is."""
    if isinstance(now, DTensor):
        return distribute_tensor(saved.to(now.device), now.device_mesh, now.placements)
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        return {key: _like(value, now.get(key)) for key, value in saved.items()}
    return saved
