"""Traces of one process share what they translate with: torch makes its table of operators anew for every graph."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

MAKE = "from_torchlib"


@pytest.fixture(scope="session", autouse=True)
def shared_operators() -> Iterator[None]:
    """One table per opset instead of one per graph, half a second each; nobody here writes into it."""
    make = getattr(ONNXRegistry, MAKE, None)  # a private name, which another torch may not have

    @cache
    def shared(**options: Any) -> Any:
        return make(**options) if make is not None else None

    with pytest.MonkeyPatch.context() as patch:
        if make is not None:
            patch.setattr(ONNXRegistry, MAKE, staticmethod(shared))
        yield
