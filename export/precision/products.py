"""Products of narrow weights with fewer nodes around them: biases and factors go in, one input is read once.

A step of one position computes little and starts every node anew, so beside memory it is nodes that it spends its time
on. Exact but for the order in which a bias is added: scales take a factor in, weights are put side by side.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

PRODUCT = "MatMulNBits"
WEIGHTS, SCALES, BIAS = 1, 2, 5
"""Places of a MatMulNBits' inputs; between the last two lie zero points and an order that symmetric blocks have not."""


def fold_products(model: onnx.ModelProto) -> None:
    """Take biases and constant factors into the products, and make one of those that read the same tensor."""
    nodes = _Folding(model).nodes()
    nodes = _merged(model, nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)


class _Folding:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._results = {value.name for value in model.graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def nodes(self) -> list[onnx.NodeProto]:
        """The graph's nodes without those that went into a product."""
        taken = set[str]()
        for node in self._model.graph.node:
            if node.op_type == PRODUCT and len(node.input) <= BIAS:
                taken |= self._take_in(node)
        return [node for node in self._model.graph.node if node.op_type == PRODUCT or not taken & set(node.output)]

    def _take_in(self, product: onnx.NodeProto) -> set[str]:
        """Let the product make what was made of it, by a bias and then a factor; returns the tensors of those nodes."""
        gone = set[str]()
        made, columns = product.output[0], _settings(product)["N"]
        bias = self._alone(made, "Add", (columns,))
        if bias is not None:
            made, array = bias
            gone.add(made)
            self._set(product, BIAS, array)
        factor = self._alone(made, "Mul", ())
        if factor is not None:
            made, array = factor
            gone.add(made)
            for place in (SCALES,) if bias is None else (SCALES, BIAS):
                self._set(product, place, self._array(product.input[place]) * array)
        product.output[0] = made
        return gone

    def _alone(self, tensor: str, kind: str, shape: tuple[int, ...]) -> tuple[str, npt.NDArray[Any]] | None:
        """What the only reader of a tensor makes and the constant it adds or multiplies; None for any other reader."""
        readers = self._readers.get(tensor, [])
        if tensor in self._results or len(readers) != 1 or readers[0].op_type != kind:
            return None
        others = [name for name in readers[0].input if name != tensor]
        if len(others) != 1 or others[0] not in self._constants:
            return None
        array = self._array(others[0])
        return (readers[0].output[0], array) if array.shape == shape else None

    def _array(self, name: str) -> npt.NDArray[Any]:
        return numpy_helper.to_array(self._constants[name])

    def _set(self, product: onnx.NodeProto, place: int, array: npt.NDArray[Any]) -> None:
        name = f"{product.name}_input_{place}"
        if name not in self._constants:
            self._constants[name] = self._model.graph.initializer.add()
        self._constants[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))
        product.input.extend([""] * (place + 1 - len(product.input)))
        product.input[place] = name


def _merged(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes with one product, and a Split behind it, in place of those that read the same tensor alike."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    alike: dict[tuple[Any, ...], list[onnx.NodeProto]] = {}
    for node in nodes:
        if node.op_type == PRODUCT:
            rest = tuple(sorted((key, value) for key, value in _settings(node).items() if key != "N"))
            alike.setdefault((node.input[0], len(node.input), rest), []).append(node)
    instead: dict[str, list[onnx.NodeProto]] = {}
    for group in alike.values():
        if len(group) > 1:
            instead[group[0].output[0]] = _one_of(model, constants, group)
            instead |= {node.output[0]: [] for node in group[1:]}
    return [new for node in nodes for new in instead.get(node.output[0] if node.output else "", [node])]


def _one_of(
    model: onnx.ModelProto, constants: Mapping[str, onnx.TensorProto], group: Sequence[onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """A product of all columns of a group, and the Split that gives each its own."""
    name, columns = f"{group[0].name}_merged", [_settings(node)["N"] for node in group]
    inputs = list(group[0].input)
    for place in (WEIGHTS, SCALES, *([BIAS] if len(inputs) > BIAS else [])):
        inputs[place] = f"{name}_input_{place}"
        parts = [numpy_helper.to_array(constants[node.input[place]]) for node in group]
        model.graph.initializer.append(numpy_helper.from_array(np.concatenate(parts), inputs[place]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(columns, np.int64), f"{name}_columns"))
    settings = _settings(group[0]) | {"N": sum(columns)}
    product = helper.make_node(PRODUCT, inputs, [f"{name}_all"], name, domain=group[0].domain, **settings)
    outputs = [node.output[0] for node in group]
    return [product, helper.make_node("Split", [f"{name}_all", f"{name}_columns"], outputs, f"{name}_split", axis=-1)]


def _settings(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
