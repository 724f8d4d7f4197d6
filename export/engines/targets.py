"""GPUs by compute capability: which builder reaches them, and which numeric types they have. Imports nothing heavy.

What is said of TensorRT-RTX was measured with 1.7.1 on a machine without GPU (reference/export.md §2.1).
"""

import re
from dataclasses import dataclass

from runtime.engine_manifest import EngineName
from runtime.errors import InputError


@dataclass(frozen=True, order=True)
class ComputeCapability:
    """A generation of NVIDIA GPUs, as 8.6."""

    major: int
    minor: int

    @property
    def sm(self) -> str:
        """As in names: sm86."""
        return f"sm{self.major}{self.minor}"

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def _all(*numbers: str) -> tuple[ComputeCapability, ...]:
    return tuple(ComputeCapability(*map(int, number.split("."))) for number in numbers)


REACHES: dict[EngineName, tuple[ComputeCapability, ...]] = {
    "tensorrt": _all("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "10.7", "11.0", "12.0", "12.1"),
    "tensorrt-rtx": _all("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
}
"""Builder → GPUs that it builds for. TensorRT builds on the GPU itself, TensorRT-RTX on any machine."""
PORTABLE = _all("8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX builds for when nothing is said: one plan for RTX cards from Ampere on."""
BF16_FROM, INT4_FROM, FP8_FROM = _all("8.0", "8.0", "8.9")
"""First GPUs with arithmetic on these types."""
NO_FP32_PRODUCTS: dict[EngineName, tuple[ComputeCapability, ...]] = {
    "tensorrt": (),
    "tensorrt-rtx": _all("7.5"),
}
"""GPUs for which a builder has no matrix product in FP32."""


def parse_capability(text: str) -> ComputeCapability:
    """ "8.6" → 8.6; InputError for anything else, with what was probably meant."""
    if match := re.fullmatch(r"(\d+)\.(\d)", text.strip()):
        return ComputeCapability(int(match[1]), int(match[2]))
    meant = re.fullmatch(r"(?:sm_?)?(\d+)(\d)", text.strip(), re.IGNORECASE)
    hint = f"; did you mean {meant[1]}.{meant[2]}?" if meant else ""
    raise InputError(f"--compute-capability: expected a number such as 8.6, found {text!r}{hint}")


def require_reached(engine: EngineName, wanted: tuple[ComputeCapability, ...]) -> None:
    """InputError when a builder has nothing for one of these GPUs, with the builder that does."""
    missing = [capability for capability in wanted if capability not in REACHES[engine]]
    if not missing:
        return
    others = [name for name, reached in REACHES.items() if set(missing) <= set(reached)]
    way_out = f"build with --engine {others[0]} on that GPU" if others else "choose another GPU"
    raise InputError(
        f"{engine} builds for compute capability {', '.join(map(str, REACHES[engine]))}, found "
        f"{', '.join(map(str, missing))}; {way_out}"
    )
