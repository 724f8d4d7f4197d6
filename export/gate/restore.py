"""Nodes of a written graph put back as they were traced, without writing the graph anew.

The search asks for the error of every block; calibrating anew for each would take hours. A written graph names its
tensors as the traced one does, so a node is restored by letting the traced node make its tensor again, from its traced
inputs: whatever the writer put between (rounding, smoothing, packed weights) is bypassed and dropped.
"""

from collections.abc import Collection
from typing import Any

import onnx

from export.ranges import WEIGHTED
from runtime.errors import CheckFailed

RESTORED = "_restored"
"""Ends the names of traced weights that are put back beside written ones."""


def restored(written: onnx.ModelProto, traced: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy of `written` with the traced nodes `names`, and the bias added to each, in place of what was written.

    Raises:
        CheckFailed: the written graph lacks a tensor that a restored node reads or makes.
    """
    wanted = [node for node in traced.graph.node if node.name in names]
    wanted += _biases(traced, {output for node in wanted for output in node.output})
    back = {node.output[0]: node for node in wanted}
    unrounded = _Unrounded(written, traced, back)
    model, nodes = onnx.ModelProto(), list[onnx.NodeProto]()
    model.CopyFrom(written)
    for node in model.graph.node:
        original = next((back.pop(output) for output in node.output if output in back), None)
        nodes += [node] if original is None else unrounded.copies(original, own_outputs=False)
    if back:
        raise CheckFailed(f"node '{next(iter(back.values())).name}': its output is not in the written graph")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, tensor in unrounded.constants.items():
        twin = model.graph.initializer.add()
        twin.CopyFrom(tensor)
        twin.name = name + RESTORED
    _drop_unused(model)
    return model


class _Unrounded:
    """Traced nodes as they are put among written ones.

    A writer may round a tensor before it is reshaped or sliced for the node that reads it. The nodes between are then
    traced ones too, beside those of the written graph, which the others still read.
    """

    def __init__(self, written: onnx.ModelProto, traced: onnx.ModelProto, back: Collection[str]) -> None:
        self._known = {tensor.name: tensor for tensor in traced.graph.initializer}
        self.constants: dict[str, onnx.TensorProto] = {}
        """Traced weights that are read again."""
        made_by = {output: node for node in written.graph.node for output in node.output}
        self._available = {value.name for value in written.graph.input} | made_by.keys()
        self._twins: dict[str, onnx.NodeProto] = {}
        self._done = set[str]()
        for node in traced.graph.node:
            now = made_by.get(node.output[0])
            if (node.op_type in WEIGHTED and self._known.keys() & set(node.input)) or node.output[0] in back:
                continue  # lowered or restored: its output is what the written graph makes of it
            as_written = now is not None and now.op_type == node.op_type and list(now.input) == list(node.input)
            as_written |= node.op_type == "Shape"  # rounding changes no size
            if not as_written or self._twins.keys() & set(node.input):
                self._twins |= dict.fromkeys(node.output, node)

    def copies(self, node: onnx.NodeProto, own_outputs: bool) -> list[onnx.NodeProto]:
        """The node, after those it needs that are not there yet; `own_outputs` names its outputs anew."""
        nodes, copy = list[onnx.NodeProto](), onnx.NodeProto()
        copy.CopyFrom(node)
        for place, name in enumerate(node.input):
            if name in self._known:
                self.constants[name] = self._known[name]
                copy.input[place] = name + RESTORED
            elif name in self._twins:
                twin = self._twins[name]
                if twin.output[0] not in self._done:
                    self._done.add(twin.output[0])
                    nodes += self.copies(twin, own_outputs=True)
                copy.input[place] = name + RESTORED
            elif name and name not in self._available:
                raise CheckFailed(f"node '{node.name}': its input '{name}' is not in the written graph")
        if own_outputs:
            copy.name += RESTORED
            for place, name in enumerate(node.output):
                copy.output[place] = name and name + RESTORED
        return [*nodes, copy]


def _biases(traced: onnx.ModelProto, products: Collection[str]) -> list[onnx.NodeProto]:
    """Adds of a constant to a product: a quantiser may have moved its own error into that constant."""
    constants = {tensor.name for tensor in traced.graph.initializer}
    return [
        node
        for node in traced.graph.node
        if node.op_type == "Add" and constants & set(node.input) and set(products) & set(node.input)
    ]


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and constants that nothing reads any more."""
    needed, kept = {value.name for value in model.graph.output}, list[Any]()
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
            for attribute in node.attribute:
                if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                    graphs = [attribute.g, *attribute.graphs]
                    needed |= {name for graph in graphs for inner in graph.node for name in inner.input}
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(constants)
