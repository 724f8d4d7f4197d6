"""The parts of a graph that the search restores together, found in its structure; no model's name is known here.

Every transformer normalises before or after each of its blocks, so the nodes between two normalisations are one block:
an attention when there is a Softmax among them, else a feed-forward network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from export.ranges import WEIGHTED

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "GroupNormalization", "ReduceMean")
"""Where a block ends; ReduceMean is a normalisation that the exporter took apart."""


@dataclass(frozen=True)
class Block:
    """Nodes of one graph between two normalisations, those alone that were written in a lower precision."""

    graph: str
    name: str
    """Its place and kind, such as `vision 7: feed-forward`."""
    nodes: tuple[str, ...]
    """Names in the traced graph, in its order."""


def blocks_of(graph: str, traced: onnx.ModelProto, written: onnx.ModelProto) -> list[Block]:
    """The blocks of a graph that hold a node of lower precision, in the graph's order."""
    lowered, parts = set(lowered_nodes(traced, written)), [list[onnx.NodeProto]()]
    for node in traced.graph.node:
        if node.op_type in NORMS:
            parts.append([])
        parts[-1].append(node)
    kinds = [(part, [node.name for node in part if node.name in lowered]) for part in parts]
    found = [(part, names) for part, names in kinds if names]
    return [Block(graph, f"{graph} {n}: {_kind(part)}", tuple(names)) for n, (part, names) in enumerate(found, 1)]


def lowered_nodes(traced: onnx.ModelProto, written: onnx.ModelProto) -> list[str]:
    """Names of the products (MatMul, Gemm, Conv) that are no longer computed as they were traced.

    A node is known by the tensor that it makes, which no writer renames.
    """
    before, after = _types(traced), _types(written)
    made_by = {output: node for node in written.graph.node for output in node.output}
    found = []
    for node in traced.graph.node:
        if node.op_type not in WEIGHTED:
            continue
        now = made_by.get(node.output[0])
        same = now is not None and now.op_type == node.op_type and list(now.input) == list(node.input)
        if not same or any(before.get(name) != after.get(name) for name in node.input):
            found.append(node.name)
    return found


def count_products(traced: Sequence[onnx.ModelProto]) -> int:
    """MatMuls, Gemms and Convs with constant weights."""
    count = 0
    for model in traced:
        constants = set(_types(model))
        count += sum(n.op_type in WEIGHTED and bool(constants & set(n.input[:2])) for n in model.graph.node)
    return count


def _types(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def _kind(part: Sequence[onnx.NodeProto]) -> str:
    operators = [node.op_type for node in part]
    if "Softmax" in operators:
        return "attention"
    if "Conv" in operators:
        return "stem"
    return "feed-forward" if sum(operator in WEIGHTED for operator in operators) > 1 else "projection"
