"""Frozen weights that lie in a file instead of in memory: the system reads what is computed with, and lets go of it.

A frozen half is read, never written, so its pages need no room of their own. An export loads one half after the other
this way, and what it holds at a time is the half it works on.
"""

from pathlib import Path

import torch
from torch import nn

from runtime.files import scratch_folder

ALIGNED = 16
"""Each tensor begins at a multiple of so many numbers (64 bytes), as matrix kernels like it."""


@torch.no_grad()
def map_weights(frozen: nn.Module, beside: Path) -> None:
    """Move the fp32 parameters of a module to a file on the disk of `beside`, and map it.

    The file has no name afterwards: it takes disk space as long as the module lives, and a killed process leaves
    nothing. Parameters that are one (tied tables) stay one. A write to a mapped parameter stays in memory.

    Raises:
        OutOfSpace: the disk ran full.
    """
    parameters = list(frozen.parameters())
    if wrong := {str(p.dtype) for p in parameters} - {"torch.float32"}:
        raise TypeError(f"expected fp32 parameters, which load_pretrained gives, found {', '.join(sorted(wrong))}")
    places, numbers = list[int](), 0
    with scratch_folder(beside) as scratch:
        file = scratch / "weights"
        with file.open("wb") as target:
            for parameter in parameters:
                target.write(parameter.detach().contiguous().numpy().data)
                places.append(numbers)
                numbers += -(-parameter.numel() // ALIGNED) * ALIGNED
                target.seek(4 * numbers)
            target.truncate(4 * numbers)
        mapped = torch.from_file(str(file), shared=False, size=numbers, dtype=torch.float32)
    for parameter, place in zip(parameters, places, strict=True):
        parameter.data = mapped[place : place + parameter.numel()].view(parameter.shape)
