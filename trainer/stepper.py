"""One optimiser step: forward and backward in parts, gradients averaged over the processes, clipped and applied.

Batch sizes are global. Each process has an equal share of the rows; with accumulation it takes them in equal parts, and
only the last part's backward pass exchanges gradients (DistributedDataParallel's `no_sync`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from runtime.errors import InputError
from trainer import grad_cache
from trainer.blip2 import Blip2
from trainer.config import StageConfig
from trainer.draws import StepDraws
from trainer.optimiser import make_optimiser, set_rates
from trainer.plans import Objective
from trainer.ranks import Ranks

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 2.0**-14
"""Of fp16's loss: gradients that still overflow at this scale are not numbers for another reason."""
Loss = Callable[[], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Stepped:
    """One step that was done or, where `finite` is false, left undone: the weights are those before it."""

    loss: float
    """Mean over the processes."""
    figures: dict[str, float]
    """Means over the processes."""
    gradient_norm: float
    """Before clipping."""
    finite: bool


class Stepper:
    """The steps of one stage, with their optimiser and (fp16) loss scale."""

    def __init__(self, stage: str, model: Blip2, objective: Objective, config: StageConfig, ranks: Ranks) -> None:
        self.rows = rows_per_process(stage, config, ranks)
        self._model, self._objective, self._config, self._ranks = model, objective, config, ranks
        self.optimiser = make_optimiser(model, config)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
        self._replica = _replica(model, ranks)

    def step(self, step: int, indices: list[int], draws: StepDraws) -> Stepped:
        """Optimiser step `step` (0-based) with this process' rows."""
        set_rates(self.optimiser, step, self._config)
        self.optimiser.zero_grad(set_to_none=True)
        loss, figures = self._backward(indices, draws)
        self.scaler.unscale_(self.optimiser)
        trained = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        norm = gradient_norm(trained)
        shown = torch.tensor([loss, *figures.values()], dtype=torch.float64, device=self._ranks.device)
        loss, *means = self._ranks.mean(shown).tolist()
        overflow_is_handled = self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE
        finite = math.isfinite(loss) and (math.isfinite(norm) or overflow_is_handled)
        if finite:
            clip(trained, norm, self._config.clip_norm)
            self.scaler.step(self.optimiser)
            self.scaler.update()
        return Stepped(loss, dict(zip(figures, means, strict=True)), norm, finite)

    def _backward(self, indices: list[int], draws: StepDraws) -> tuple[float, dict[str, float]]:
        """Gradients of this process' rows; returns their loss and figures."""
        size = len(indices) // self._config.accumulation
        parts = [range(first, first + size) for first in range(0, len(indices), size)]
        if len(parts) > 1 and isinstance(self._objective, grad_cache.CoupledObjective):
            return grad_cache.backward(self._objective, self._model, indices, parts, draws, self._ranks, self)
        sums: dict[str, float] = {}
        total = 0.0
        for number, places in enumerate(parts):
            self.seed(draws, number)
            rows, of_part = [indices[place] for place in places], draws.at(places)
            run = partial(self._objective.loss, self._model, rows, of_part, self._ranks)
            loss, figures = self.backward(run, share=1 / len(parts), last=number == len(parts) - 1)
            total += loss / len(parts)
            sums = {name: sums.get(name, 0.0) + value / len(parts) for name, value in figures.items()}
        return total, sums

    def seed(self, draws: StepDraws, part: int) -> None:
        """Seed dropout of one part of this process' rows."""
        torch.manual_seed(draws.torch_seed(self._ranks.index, part))

    def autocast(self) -> torch.autocast:
        """The precision of forward passes; weights, gradients and optimiser state stay fp32."""
        precision = self._config.precision
        return torch.autocast(self._ranks.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is taken."""
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def backward(
        self, loss: Loss, *, share: float, last: bool, extra: Callable[[], Tensor] | None = None
    ) -> tuple[float, dict[str, float]]:
        """Forward and backward of one part that counts `share`; the last of a step exchanges the gradients.

        `extra` gives a term that is added as it is, scaled already. Returns loss and figures of the part.
        """
        distributed = isinstance(self._replica, DistributedDataParallel)
        with self._replica.no_sync() if distributed and not last else nullcontext():

            def forward() -> tuple[Tensor, Tensor, dict[str, float]]:
                part, figures = loss()
                total = self.scaled(part * share)
                return (total if extra is None else total + extra()), part.detach(), figures

            with self.autocast():
                total, part, figures = self._replica(forward)
            total.backward()
        return float(part), figures


class _Replica(nn.Module):
    """What DistributedDataParallel wraps: it must see the forward pass, whatever that is."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def _replica(model: Blip2, ranks: Ranks) -> Any:
    replica = _Replica(model)
    if ranks.count == 1:
        return replica
    elsewhere = [name for name, tensor in replica.named_parameters() if not tensor.requires_grad or _sharded(tensor)]
    elsewhere += [name for name, _ in replica.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(replica, elsewhere)
    return DistributedDataParallel(replica, find_unused_parameters=True)


def rows_per_process(stage: str, config: StageConfig, ranks: Ranks) -> int:
    """Rows of a step on each process; InputError unless the global batch divides evenly into all parts."""
    if config.batch_size % (ranks.count * config.accumulation):
        raise InputError(
            f"{stage}.batch_size: expected a multiple of {ranks.count} processes x {config.accumulation} parts "
            f"({stage}.accumulation), found {config.batch_size}; it is the batch of all processes together"
        )
    return config.batch_size // ranks.count


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Norm over all gradients; of sharded ones over all their shards (every process calls this)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    kinds = [[g for g in gradients if not _sharded(g)], [g for g in gradients if _sharded(g)]]
    norms = [nn.utils.get_total_norm(kind) for kind in kinds if kind]
    return math.hypot(*(float(norm.full_tensor() if isinstance(norm, DTensor) else norm) for norm in norms))


def clip(parameters: Sequence[nn.Parameter], norm: float, largest: float) -> None:
    """Scale all gradients, of norm `norm`, down to `largest`; 0: leave them."""
    if not largest or norm <= largest:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(largest / norm)


def _sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)
