"""What no builder, or no GPU that was asked for, can do with a graph: found in the ONNX file, before anything is built.

A builder says such things late, after minutes, in its own words. Here each is one sentence with the graph, the node
and the way out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.engines.targets import BF16_FROM, FP8_FROM, INT4_FROM, NO_FP32_PRODUCTS, ComputeCapability
from runtime.engine_manifest import EngineName
from runtime.errors import BundleError, InputError

STANDARD = ("", "ai.onnx")
PRODUCTS = {"MatMul", "Gemm", "Einsum"}
FP8_TYPES = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
INT4_TYPES = {TensorProto.INT4, TensorProto.UINT4}
QUANTISES_AT_RUN_TIME = {"DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
SMALL_BYTES = 1 << 12
"""Larger weights are not looked at: only their type matters, and a copy of them would cost memory."""
EXPORT_AGAIN = "export the bundle again with --target tensorrt"


@dataclass(frozen=True)
class Scene:
    """One graph, and for whom it is to be built."""

    engine: EngineName
    capabilities: tuple[ComputeCapability, ...]
    types: Mapping[str, int]
    """Tensor → ONNX element type, as far as shape inference tells."""
    constants: Mapping[str, TensorProto]
    """Small constants."""
    last_sizes: Mapping[str, int]
    """Tensor → size of its last axis, where that is fixed."""

    def below(self, first: ComputeCapability) -> str:
        """The wanted GPUs that come before `first`, as text; empty when there are none."""
        return ", ".join(str(capability) for capability in self.capabilities if capability < first)


Rule = Callable[[onnx.NodeProto, Scene], str | None]
"""What is wrong with a node and the way out, or None."""


def require_buildable(file: Path, name: str, engine: EngineName, capabilities: Sequence[ComputeCapability]) -> None:
    """Look at every node of a graph.

    Raises:
        BundleError: not an ONNX file. InputError: something that the builder or a GPU cannot do.
    """
    model = _light(file)
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise BundleError(f"{file}: expected a valid ONNX graph, shape inference found: {error}") from error
    graph = inferred.graph
    scene = Scene(engine, tuple(capabilities), _types(graph), _constants(graph), _last_sizes(graph))
    for node in _nodes(graph):
        for rule in RULES:
            if (wrong := rule(node, scene)) is not None:
                raise InputError(f"graph '{name}': node '{node.name}' ({node.op_type}) {wrong}")


def _foreign(node: onnx.NodeProto, scene: Scene) -> str | None:
    if node.domain in STANDARD:
        return None
    return f"is an operator of {node.domain}, which {scene.engine} does not know; {EXPORT_AGAIN}"


def _quantised_at_run_time(node: onnx.NodeProto, scene: Scene) -> str | None:
    if node.op_type not in QUANTISES_AT_RUN_TIME:
        return None
    return (
        f"is a form of INT8 that {scene.engine} does not read; it reads QuantizeLinear and DequantizeLinear: "
        f"{EXPORT_AGAIN}"
    )


def _asymmetric(node: onnx.NodeProto, scene: Scene) -> str | None:
    if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or len(node.input) < 3 or not node.input[2]:
        return None
    point = scene.constants.get(node.input[2])
    if point is None or point.data_type in FP8_TYPES:
        return None
    signed = point.data_type in {TensorProto.INT8, TensorProto.INT4}
    if signed and not np.any(numpy_helper.to_array(point).astype(np.int32)):
        return None
    return f"has an unsigned type or a zero point other than 0, which {scene.engine} refuses; {EXPORT_AGAIN}"


def _caching_attention(node: onnx.NodeProto, scene: Scene) -> str | None:
    if node.op_type != "Attention" or (len([name for name in node.output if name]) <= 1 and not any(node.input[4:6])):
        return None
    return (
        f"keeps a cache of its own, which {scene.engine} does not read; keep it by TensorScatter: export again with "
        f"--static-cache"
    )


def _fp32_attention(node: onnx.NodeProto, scene: Scene) -> str | None:
    if node.op_type != "Attention" or scene.types.get(node.input[0]) != TensorProto.FLOAT:
        return None
    return (
        f"computes in FP32, for which {scene.engine} has a kernel on no GPU; export the graph in FP16 or BF16, or at "
        f"opset 20, where attention is MatMul and Softmax"
    )


def _attention_width(node: onnx.NodeProto, scene: Scene) -> str | None:
    width = scene.last_sizes.get(node.input[0], 0)
    if node.op_type != "Attention" or not width or (width % 8 == 0 and 16 <= width <= 256):
        return None
    return (
        f"has heads of width {width}, and {scene.engine} has kernels for multiples of 8 from 16 to 256; export it "
        f"without --static-cache, at opset 20"
    )


def _fp32_product(node: onnx.NodeProto, scene: Scene) -> str | None:
    without = [str(capability) for capability in scene.capabilities if capability in NO_FP32_PRODUCTS[scene.engine]]
    if node.op_type not in PRODUCTS or not without or scene.types.get(node.output[0]) != TensorProto.FLOAT:
        return None
    return (
        f"multiplies in FP32, which {scene.engine} cannot for compute capability {', '.join(without)}; export with "
        f"--precision fp16, or leave that GPU out"
    )


def _newer_type(
    kinds: Set[int], title: str, first: ComputeCapability, instead: str
) -> Callable[[onnx.NodeProto, Scene], str | None]:
    def rule(node: onnx.NodeProto, scene: Scene) -> str | None:
        below = scene.below(first)
        if not below or not kinds & {scene.types.get(name) for name in (*node.input, *node.output)}:
            return None
        return (
            f"is in {title}, which begins with compute capability {first}, found {below}; leave that GPU out, or "
            f"export with {instead}"
        )

    return rule


RULES: tuple[Rule, ...] = (
    _foreign,
    _quantised_at_run_time,
    _asymmetric,
    _caching_attention,
    _fp32_attention,
    _attention_width,
    _fp32_product,
    _newer_type({TensorProto.BFLOAT16}, "BF16", BF16_FROM, "--precision fp16"),
    _newer_type(FP8_TYPES, "FP8", FP8_FROM, "--precision int8"),
    _newer_type(INT4_TYPES, "INT4", INT4_FROM, "--language-precision int8"),
)


def _light(file: Path) -> onnx.ModelProto:
    """The graph with its large weights emptied, so that inference copies little."""
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own class, which moves from version to version
        raise BundleError(f"{file}: expected an ONNX graph, found other data ({error}); export it again") from error
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > SMALL_BYTES:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="left-out")
    return model


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    types = {value.name: value.type.tensor_type.elem_type for value in _values(graph)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _last_sizes(graph: onnx.GraphProto) -> dict[str, int]:
    shapes = {value.name: value.type.tensor_type.shape.dim for value in _values(graph)}
    return {name: shape[-1].dim_value for name, shape in shapes.items() if len(shape)}


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _constants(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = attribute.t
    return found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those of branches and loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)
