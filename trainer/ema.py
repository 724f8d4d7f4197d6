"""An exponential moving average of what is trained: measured and saved in place of the last step's weights.

The average itself is PyTorch's (`torch.optim.swa_utils`); here is which weights it is of, and when they change places.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Averages of a model's trained parameters, kept in the parameters' own types and places."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`decay`: how much of the average stays at each step, 0 to 1."""
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._averages = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        self._average_into = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimiser step."""
        self._average_into(list(self._averages.values()), [p.detach() for p in self._trained.values()], 0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages; afterwards its own weights again."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and their averages."""
        for name, parameter in self._trained.items():
            own = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the model's parameter names."""
        return dict(self._averages)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Averages of a resume point; KeyError or RuntimeError when they are of another model."""
        if state.keys() != self._averages.keys():
            raise KeyError(f"averages of other weights: {sorted(state.keys() ^ self._averages.keys())[:3]}")
        for name, average in self._averages.items():
            average.copy_(state[name])
