"""The loop that pre-trains the demo's small halves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from runtime.progress import Progress


def optimise(
    modules: list[nn.Module], step: Callable[[], Tensor], steps: int, rate: float, progress: Progress, title: str
) -> None:
    """AdamW with one rise and fall of the rate; `step` gives the next loss."""
    parameters = [p for module in modules for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=max(0.05, 2 / steps))
    with progress.bar(title, steps) as bar:
        for _ in range(steps):
            loss = step()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            bar.advance(loss=float(loss.detach()))
