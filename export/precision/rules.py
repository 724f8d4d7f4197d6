"""Which nodes of a graph stay FP32 when the rest becomes FP16 or BF16, each with its reason.

The rules look at structure first, because calibration shows only what it happens to meet:

- what is computed from integers alone (positions, relative-position buckets, masks): 11 bits do not hold a position,
  and the most negative number of fp32 is minus infinity in FP16, which makes a row that is hidden whole NaN;
- the attention scores from the product up to the softmax, mask included, so that a hidden row stays finite;
- sums and roots: softmax, normalisation, powers, means;
- in the bridge, the sums that a normalisation reads (the Q-Former's residual);
- in FP16, what calibration saw near the end of FP16's range, and constants beyond it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from export.precision.cast import MADE_IN
from export.precision.files import array_of, element_types
from export.precision.kept import ASKED

HALF_MAX = float(np.finfo(np.float16).max)
HALF_LEAST = float(np.finfo(np.float16).smallest_normal)
LIMIT = HALF_MAX / 16
"""Largest value that calibration may show in an FP16 node: other images may show more, and sums begin here."""
SENSITIVE = {
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "LpNormalization", "Softmax", "LogSoftmax", "Pow", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp", "ReduceProd", "Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos", "CumSum",
    "Range", *MADE_IN,
}  # fmt: skip
NORMS = {"Sqrt", "Reciprocal", "ReduceL2"}
"""What a vector is divided by, or multiplied with, when it is normalised by hand."""
ON_THE_WAY = {"Clip", "Max", "Add", "Expand", "Unsqueeze", "Reshape"}
"""What may stand between a norm and that division."""
BEFORE_SOFTMAX = {
    "Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip", "Expand", "Reshape", "Transpose", "Unsqueeze",
    "Squeeze", "Slice", "Concat", "Cast", "Identity",
}  # fmt: skip
"""What may stand between a product and its softmax: scale, mask, bias, and changes of shape."""


@dataclass(frozen=True)
class Situation:
    """What the rules need beside the graph."""

    low: str
    """fp16 or bf16."""
    bridge: bool
    """Whether the graph is the Q-Former or a retrieval head."""
    largest: Mapping[str, float]
    """Tensor → the largest magnitude that calibration saw (empty for BF16, whose range is that of fp32)."""
    keep: Collection[str]
    """Nodes that the caller wants kept."""


def sensitive(model: onnx.ModelProto, folder: Path, situation: Situation) -> dict[str, str]:
    """Node → why it stays FP32, in the graph's order; only nodes that touch a float tensor."""
    types = element_types(model)
    graph = _Graph(model, {name for name, kind in types.items() if kind == TensorProto.FLOAT})
    found: dict[str, str] = {}
    for reasons in (
        _asked(graph, situation),
        _of_integers(graph),
        _before_softmax(graph),
        _sums(graph),
        _residual(graph) if situation.bridge else {},
        _out_of_range(graph, folder, situation) if situation.low == "fp16" else {},
    ):
        found = reasons | found  # the first reason stands
    return {node.name: found[node.name] for node in model.graph.node if node.name in found}


class _Graph:
    def __init__(self, model: onnx.ModelProto, floats: set[str]) -> None:
        self.floats = floats
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.nodes = [node for node in model.graph.node if floats & {*node.input, *node.output}]
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def computed(self, node: onnx.NodeProto) -> list[str]:
        """Float inputs that are no constants."""
        return [name for name in node.input if name in self.floats and name not in self.constants]


def _asked(graph: _Graph, situation: Situation) -> dict[str, str]:
    return {node.name: ASKED for node in graph.nodes if node.name in situation.keep}


def _of_integers(graph: _Graph) -> dict[str, str]:
    found, made = dict[str, str](), set[str]()
    for node in graph.nodes:
        computed = graph.computed(node)
        starts = node.op_type in {"Cast", "Where", "Range", "ConstantOfShape"} and not computed
        if (computed and made.issuperset(computed)) or starts:
            found[node.name] = "computed from integers alone: positions or a mask"
            made.update(name for name in node.output if name in graph.floats)
    return found


def _before_softmax(graph: _Graph) -> dict[str, str]:
    found = dict[str, str]()
    for softmax in (node for node in graph.nodes if node.op_type == "Softmax"):
        names = graph.computed(softmax)
        while names:
            node = graph.made_by.get(names.pop())
            if node is not None and node.op_type in BEFORE_SOFTMAX and node.name not in found:
                found[node.name] = "attention scores: a mask's most negative number must not become minus infinity"
                names += graph.computed(node)
    return found


def _sums(graph: _Graph) -> dict[str, str]:
    found = {
        node.name: f"{node.op_type} loses too much in 16 bits" for node in graph.nodes if node.op_type in SENSITIVE
    }
    for norm in (node for node in graph.nodes if node.op_type in NORMS):
        names = list(norm.output)
        while names:
            for reader in graph.readers.get(names.pop(), []):
                if reader.op_type in {"Mul", "Div"}:
                    found.setdefault(reader.name, "normalisation: what is divided may be large, the factor small")
                elif reader.op_type in ON_THE_WAY and reader.name not in found:
                    found[reader.name] = "normalisation: a norm on its way to the division"
                    names += reader.output
    return found


def _residual(graph: _Graph) -> dict[str, str]:
    found = dict[str, str]()
    for norm in (node for node in graph.nodes if node.op_type == "LayerNormalization"):
        adder = graph.made_by.get(norm.input[0])
        if adder is not None and adder.op_type == "Add":
            found[adder.name] = "the Q-Former's residual is summed in FP32"
    return found


def _out_of_range(graph: _Graph, folder: Path, situation: Situation) -> dict[str, str]:
    found, worst = dict[str, str](), _Constants(graph, folder)
    for node in graph.nodes:
        names = [name for name in (*node.input, *node.output) if name in graph.floats]
        largest = max((situation.largest.get(name, 0.0) for name in names), default=0.0)
        if not largest <= LIMIT:  # NaN too
            found[node.name] = f"reaches {largest:,.0f} in calibration; FP16 ends at {HALF_MAX:,.0f}"
        elif any(worst.largest(name) > HALF_MAX for name in names if name in graph.constants):
            found[node.name] = f"holds a constant beyond {HALF_MAX:,.0f}, where FP16 ends"
        elif node.op_type in {"QuantizeLinear", "DequantizeLinear"} and worst.least(node.input[1]) < HALF_LEAST:
            found[node.name] = f"its scale is below {HALF_LEAST:.1e}, where FP16 loses bits"
    return found


class _Constants:
    """Largest and smallest magnitudes of constants, each read once and forgotten."""

    def __init__(self, graph: _Graph, folder: Path) -> None:
        self._graph, self._folder = graph, folder
        self._known: dict[str, tuple[float, float]] = {}

    def largest(self, name: str) -> float:
        """Infinity does not count: FP16 has it too."""
        return self._of(name)[1]

    def least(self, name: str) -> float:
        """Smallest magnitude."""
        return self._of(name)[0] if name in self._graph.constants else HALF_LEAST

    def _of(self, name: str) -> tuple[float, float]:
        if name not in self._known:
            values = np.abs(array_of(self._graph.constants[name], self._folder))
            finite = values[np.isfinite(values)]
            self._known[name] = (float(finite.min(initial=np.inf)), float(finite.max(initial=0.0)))
        return self._known[name]
