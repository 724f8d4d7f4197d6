"""FP16 and BF16: rules decide what stays FP32 (rules.py), the caster writes it (cast.py)."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from export.graphs import Arrays
from export.precision.cast import cast_graph
from export.precision.files import lift_constants, read_structure
from export.precision.kept import Kept
from export.precision.ranges import largest_values
from export.precision.rules import Situation, sensitive
from runtime.errors import CheckFailed

Half = Literal["fp16", "bf16"]
CACHES = ("past_", "present_", "cross_")
"""How the graphs' names of cached keys and values begin."""


def write_half(file: Path, feeds: Sequence[Arrays], keep: Collection[str], *, low: Half, bridge: bool) -> list[Kept]:
    """Rewrite a graph in place in FP16 or BF16; returns what stayed FP32.

    Inputs and outputs stay fp32, cached keys and values excepted: FP16 graphs hand them on as they are (numpy has no
    BF16). FP16 needs real feeds, because its range ends at 65,504.

    Raises:
        CheckFailed: FP16 without feeds, or the result is not valid ONNX.
    """
    if low == "fp16" and not feeds:
        raise CheckFailed(f"graph '{file.stem}': FP16 needs real feeds to find what exceeds its range, found none")
    largest = largest_values(file, feeds) if low == "fp16" else {}
    model = read_structure(file)
    lift_constants(model)
    reasons = sensitive(model, file.parent, Situation(low, bridge, largest, keep))
    ops = {node.name: node.op_type for node in model.graph.node}
    ends = [value.name for value in (*model.graph.input, *model.graph.output)]
    caches = [name for name in ends if name.startswith(CACHES)] if low == "fp16" else []
    cast_graph(model, file, low, reasons, caches)
    return [Kept(name, ops[name], "fp32", why) for name, why in reasons.items()]
