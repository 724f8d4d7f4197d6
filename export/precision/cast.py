"""The caster: an fp32 graph → the same graph in FP16 or BF16, but for the nodes that stay FP32.

Why not ModelOpt's AutoCast: it holds a whole graph in memory several times, it decides by values alone, so that T5's
positions and the squares of an RMS norm become FP16 unless calibration happens to overflow there, and it does not
return what it kept. This one reads and writes weight by weight, and rules decide (rules.py); see LOG.md.

Between nodes of unlike types stands a Cast, one per tensor and type. Weights are stored in the type that is read.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from export.precision.files import Weights, array_of, element_types, is_large, require_opset
from export.trace import check
from runtime.errors import CheckFailed

ONNX_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NUMPY_TYPES: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
}
LEAST_OPSET = {"fp16": 20, "bf16": 22}
"""BF16 convolutions came with opset 22."""
MADE_IN = {"ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform", "Resize"}
"""Operators whose float type stands in an attribute, or that need fp32 beside their data: rules.py keeps them FP32."""


def cast_graph(model: onnx.ModelProto, file: Path, low: str, kept: Collection[str], caches: Collection[str]) -> None:
    """Rewrite `file`, whose structure `model` is, with every float tensor in `low` except around `kept` nodes.

    Args:
        kept: Names of nodes that compute in FP32.
        caches: Names of graph inputs and outputs that take the low type themselves; all others stay fp32.

    Raises:
        CheckFailed: the result is not valid ONNX.
    """
    caster = _Caster(model, ONNX_TYPES[low], low, kept, caches)
    caster.rewrite()
    require_opset(model, LEAST_OPSET[low])
    store(model, file, caster.constants)
    check(file)


def store(model: onnx.ModelProto, file: Path, constants: dict[str, tuple[str, int]]) -> None:
    """Write the graph with these constants: new name → (name of the one it is made from, element type)."""
    folder, old = file.parent, {tensor.name: tensor for tensor in model.graph.initializer}
    used = {name for node in model.graph.node for name in node.input}
    with Weights(file, is_large(file)) as weights:
        stored = [
            weights.tensor(array_of(tensor, folder), name) if tensor.data_location == TensorProto.EXTERNAL else tensor
            for name, tensor in old.items()
            if name in used
        ]
        stored += [
            weights.tensor(_converted(array_of(old[source], folder), kind), name)
            for name, (source, kind) in constants.items()
        ]
        del model.graph.initializer[:]
        model.graph.initializer.extend(stored)
        weights.finish()
    onnx.save(model, str(file))


def _converted(array: npt.NDArray[Any], kind: int) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # rules.py has kept FP32 what overflows
        return array.astype(NUMPY_TYPES[kind])


class _Caster:
    def __init__(
        self, model: onnx.ModelProto, low: int, suffix: str, kept: Collection[str], caches: Collection[str]
    ) -> None:
        self._graph, self._low, self._suffix, self._kept = model.graph, low, suffix, kept
        types = element_types(model)
        self._floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
        self._stored = {tensor.name for tensor in model.graph.initializer}
        self._caches = caches
        self._made: dict[str, int] = {}
        """Float tensor → the type that it has in the new graph."""
        self._called: dict[str, str] = {}
        """Graph output → the name it is computed under, where another type was promised."""
        self._casts: dict[tuple[str, int], str] = {}
        self._nodes = list[onnx.NodeProto]()
        self.constants: dict[str, tuple[str, int]] = {}

    def rewrite(self) -> None:
        promised = {value.name: self._promised(value) for value in self._graph.output if value.name in self._floats}
        for value in self._graph.input:
            if value.name in self._floats:
                self._made[value.name] = self._promised(value)
        for node in self._graph.node:
            if any(attribute.type in {onnx.AttributeProto.GRAPH} for attribute in node.attribute):
                raise CheckFailed(f"node {node.name} ({node.op_type}): a graph inside a node cannot be cast; report it")
            wanted = TensorProto.FLOAT if node.name in self._kept else self._low
            for place, name in enumerate(node.input):
                if name in self._floats:
                    node.input[place] = self._as(name, wanted)
            self._nodes.append(node)
            for place, name in enumerate(node.output):
                if name in self._floats:
                    self._made[name] = wanted
                    if promised.get(name, wanted) != wanted:
                        self._called[name] = node.output[place] = f"{name}_{self._suffix}"
                        self._nodes.append(_cast(self._called[name], name, promised[name]))
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = wanted
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(self._nodes)

    def _promised(self, value: onnx.ValueInfoProto) -> int:
        if value.name in self._caches:
            value.type.tensor_type.elem_type = self._low
            return self._low
        return int(TensorProto.FLOAT)

    def _as(self, name: str, wanted: int) -> str:
        """The name under which a float tensor is found in the wanted type; makes it where it is not there yet."""
        if name in self._stored:
            if wanted == TensorProto.FLOAT:
                return name
            low_name = f"{name}_{self._suffix}"
            self.constants[low_name] = (name, wanted)
            return low_name
        source = self._called.get(name, name)
        if self._made[name] == wanted:
            return source
        key = (source, wanted)
        if key not in self._casts:
            self._casts[key] = f"{source}_as_{'fp32' if wanted == TensorProto.FLOAT else self._suffix}"
            self._nodes.append(_cast(source, self._casts[key], wanted))
        return self._casts[key]


def _cast(source: str, to_name: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [to_name], name=f"cast_{to_name}", to=kind)
