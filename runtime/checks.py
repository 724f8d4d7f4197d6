"""One output beside what eager PyTorch gave: how far apart, and whether that is allowed."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Check:
    """One output compared with eager's."""

    graph: str
    """Graph and case, as `language/step`; `chain` for whole answers, `retrieval` for whole scores."""
    output: str
    max_error: float
    """Largest error over largest value; for greedy tokens the fraction of rows that differ. Infinite for NaN."""
    tolerance: float
    """As recorded by the exporter, in the same unit."""

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance."""
        return self.max_error <= self.tolerance


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest absolute error over the largest expected magnitude; infinite for NaN or another shape."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found - expected).max(initial=0.0)) / scale
