"""Model-FLOP utilisation: the share of what the device can do that a step's matrix products use.

The floating-point operations of a step (forward and backward, 2 per multiply-add, PaLM's definition: arXiv 2204.02311,
appendix B) are counted by PyTorch's FlopCounterMode while the first step runs, so they are those of the model as it is
trained: a frozen tower whose features are stored costs nothing, and neither does a head that is switched off. What
gradient checkpointing computes again is counted too.

Peaks are those of NVIDIA's data sheets, dense (half of the "with sparsity" figures), FP32 without TF32. A device that
is not listed, the CPU among them, is measured: the fastest of some large matrix products. Others may have had the
device just then, so a measured peak is the least that the device can do, and a share of it the most that it may be.
"""

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Shape = tuple[int, ...]

DATA_SHEETS: tuple[tuple[frozenset[str], float, float], ...] = (
    # The more specific name comes first.
    (frozenset({"H200", "NVL"}), 60, 835.5),
    (frozenset({"H200"}), 67, 989.5),
    (frozenset({"GH200"}), 67, 989.5),
    (frozenset({"H100", "NVL"}), 60, 835.5),
    (frozenset({"H100", "PCIe"}), 51, 756.5),
    (frozenset({"H100"}), 67, 989.5),
    (frozenset({"A100"}), 19.5, 312),
    (frozenset({"A10"}), 31.2, 125),
    (frozenset({"L40S"}), 91.6, 362),
    (frozenset({"L4"}), 30.3, 121),
    (frozenset({"T4"}), 8.1, 65),
    (frozenset({"V100", "SXM2"}), 15.7, 125),
    (frozenset({"V100", "PCIE"}), 14, 112),
)
"""Words of the name that torch.cuda.get_device_name gives; TFLOP/s in FP32; TFLOP/s in 16 bits on tensor cores."""
NO_BF16 = frozenset({"T4", "V100"})
"""Their tensor cores know FP16 only."""
GEMM_SIDE = {"cpu": 1024, "cuda": 8192}
MEASURED_S = 0.3
"""How long products are timed, after one to warm up."""


@dataclass(frozen=True)
class Peak:
    """What a device can do at most."""

    flops: float
    """Floating-point operations per second."""
    source: Literal["data sheet", "measured"]


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak of matrix products in `dtype` on the device, with as many threads as torch uses here on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = published(name, dtype)
        if known is not None:
            return Peak(known, "data sheet")
    return Peak(_measured(device, dtype, torch.get_num_threads()), "measured")


def raised(peak: Peak, seen: float, device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of a device that did `seen` FLOP/s in a step: a measured one was too low and is measured again.

    A data sheet stays what it says.
    """
    if peak.source == "data sheet" or seen <= peak.flops:
        return peak
    return Peak(max(seen, _measure(device, dtype)), "measured")


def published(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak (FLOP/s) from the data sheet; None for what is not listed, and for a slice of a device (MIG)."""
    words = set(re.split(r"[\s-]+", device_name))
    if "MIG" in words or (dtype is torch.bfloat16 and words & NO_BF16):
        return None
    for name, fp32, half in DATA_SHEETS:
        if name <= words:
            return (fp32 if dtype is torch.float32 else half) * 1e12
    return None


@cache
def _measured(device: torch.device, dtype: torch.dtype, _threads: int) -> float:
    """`_measure`, once in a process."""
    return _measure(device, dtype)


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of square products (FLOP/s), in `dtype` and in FP32, in which autocast leaves some.

    A CPU without instructions for a 16-bit type is faster in FP32.
    """
    return max(_fastest_product(device, kind) for kind in {dtype, torch.float32})


def _fastest_product(device: torch.device, dtype: torch.dtype) -> float:
    """The fastest of square products timed for `MEASURED_S` (FLOP/s)."""
    side = GEMM_SIDE[device.type]
    left = torch.ones(side, side, dtype=dtype, device=device)
    times: list[float] = []
    deadline = time.perf_counter() + MEASURED_S
    while len(times) < 2 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(left, left)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def flop_counter() -> FlopCounterMode:
    """Counts what runs inside the `with`, attention on the CPU included, which PyTorch's own table lacks."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={attention: _attention_forward, backward: _attention_backward})


def _attention_forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_output_gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Twice the forward: gradients of both factors of both products. The scores computed again do not count."""
    return 2 * sdpa_flop_count(query, key, value)
