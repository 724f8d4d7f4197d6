"""Every graph builds for every GPU, without one: TensorRT-RTX, ahead of time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.config import ExportConfig
from export.engines.builder import Builder
from export.engines.plan import Built, build_graph
from export.engines.profiles import patches_of, profiles_of
from export.engines.refusals import require_buildable
from export.engines.targets import ComputeCapability, parse_capability
from export.precision.plan import Writer, writers_for
from export.precision.weights import BLOCKS
from qforge.verbs_build import build
from runtime.bundle import Bundle
from runtime.engine_manifest import EngineOptions, EngineProfile, engine_folders, read_engine
from runtime.errors import InputError
from runtime.precision import LanguagePrecision, Precision
from tests.export.engines.conftest import Traced
from tests.onnx_graphs import write_graph

ALL = tuple(map(parse_capability, ("8.0", "8.6", "8.9", "12.0")))
"""One plan for all of them: the builder compiles for each, and fails when it cannot for one."""
STORED: dict[LanguagePrecision, set[int]] = {
    "fp16": {TensorProto.FLOAT16},
    "int8": {TensorProto.INT8},
    "int4": {TensorProto.INT4, TensorProto.FLOAT16},  # 24 rows are no whole number of blocks: that matrix stays FP16
}
"""Precision of a language model → types of its matrices, as they lie in the file."""
SEARCHING = ("itc_image", "itc_text", "itm")
OPEN = ("qformer", "fused")
"""Graphs of a bundle with several image sizes."""
Form = Callable[[LanguagePrecision], Bundle]
Lowered = Callable[[Bundle, tuple[str, ...], Precision], Bundle]


def plan_of(
    bundle: Bundle, name: str, rtx: Builder, capabilities: tuple[ComputeCapability, ...], batches: tuple[int, ...] = ()
) -> Built:
    require_buildable(bundle.graph(name), name, rtx.engine, capabilities)
    profiles = profiles_of(name, bundle.manifest, batches, patches=patches_of(bundle))
    return build_graph(bundle.graph(name), name, rtx, capabilities, profiles, EngineOptions())


@pytest.mark.parametrize(
    ("form", "graph"),
    [
        *(("fp16", graph) for graph in ("vision", "qformer", "embed", "language")),
        *(("bf16", graph) for graph in ("vision", "language")),
        *(("int8-tensorrt", graph) for graph in ("vision", "qformer", "language")),
        ("fp8-tensorrt", "language"),  # in INT4
    ],
)
def test_a_graph_builds_for_sm80_sm86_sm89_and_sm120(
    form: str, graph: str, rtx: Builder, form_of: Callable[[str], Bundle]
) -> None:
    assert len(memoryview(plan_of(form_of(form), graph, rtx, ALL).plan)) > 1000


@pytest.mark.parametrize("precision", STORED)
@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_an_encoder_decoder_builds_for_all_of_them(
    graph: str, precision: LanguagePrecision, rtx: Builder, flan_of: Form
) -> None:
    bundle = flan_of(precision)
    assert stored_types(bundle.graph(graph)) == STORED[precision], "what is built is what was asked for"
    assert len(memoryview(plan_of(bundle, graph, rtx, ALL).plan)) > 1000


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_product_kept_in_fp32_reads_a_narrow_matrix(
    precision: LanguagePrecision, rtx: Builder, flan_traced: Traced, flan_of: Form, tmp_path: Path
) -> None:
    """T5's `wo` where it overflows FP16: summed in FP32, and its weights are as narrow as all others."""
    file = tmp_path / "encoder.onnx"
    model = onnx.load(flan_traced.folder / "onnx" / "encoder.onnx")
    multiplied = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    wo = [tensor for tensor in model.graph.initializer if tensor.name in multiplied and tensor.dims == [64, 32]]
    for tensor in wo:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(3000), tensor.name))
    onnx.save(model, file)
    kept = language_writer(precision).write(file, flan_traced.feeds["encoder"], ())
    widest = {node.node for node in kept if node.op == "MatMul" and node.why.startswith("reaches")}
    graph = onnx.load(file).graph
    made_by = {name: node for node in graph.node for name in node.output}
    read = [made_by[node.input[1]] for node in graph.node if node.name in widest]
    assert {made_by[cast.input[0]].op_type for cast in read} == {"DequantizeLinear"} and len(read) == len(wo) == 2
    profiles = profiles_of("encoder", flan_of(precision).manifest, ())
    assert len(memoryview(build_graph(file, "encoder", rtx, ALL, profiles, EngineOptions()).plan)) > 1000


@pytest.mark.parametrize("block", BLOCKS)
def test_int4_builds_in_blocks_of_every_size(block: int, rtx: Builder, tmp_path: Path) -> None:
    """Three of them to a column, so that no larger one divides it."""
    rows = 3 * block
    matrix = np.random.default_rng(0).normal(size=(rows, rows)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    file = write_graph(tmp_path / "product.onnx", [node], {"w": matrix}, rows)
    assert language_writer("int4").write(file, [{"x": matrix[:4]}], ()) == []
    (dequantises,) = [node for node in onnx.load(file).graph.node if node.op_type == "DequantizeLinear"]
    assert {a.name: a.i for a in dequantises.attribute}["block_size"] == block
    profile = EngineProfile(name="range", shapes={"x": ((1, rows), (4, rows), (8, rows))})
    assert len(memoryview(build_graph(file, "language", rtx, ALL, [profile], EngineOptions()).plan)) > 1000


def language_writer(precision: LanguagePrecision) -> Writer:
    """Of a language model's graph, for TensorRT."""
    return writers_for(["language"], "fp16", precision, ExportConfig(target="tensorrt"))["language"]


def stored_types(file: Path) -> set[int]:
    """Types of the matrices that a graph multiplies with."""
    model = onnx.load(file)
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    found = set[int]()
    for node in model.graph.node:
        if node.op_type == "MatMul":
            name = node.input[1]
            while name in made_by and made_by[name].op_type in {"DequantizeLinear", "Cast"}:
                name = made_by[name].input[0]
            found |= {constants[name]} if name in constants else set()
    return found


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("graph", SEARCHING)
def test_graphs_that_search_build_for_all_of_them(
    graph: str, precision: Precision, rtx: Builder, bundle_both: Bundle, lowered: Lowered
) -> None:
    bundle = lowered(bundle_both, SEARCHING, precision)
    assert quantises(bundle.graph(graph)) == (precision == "int8")
    assert len(memoryview(plan_of(bundle, graph, rtx, ALL).plan)) > 1000


@pytest.mark.parametrize(("graph", "precision"), [("fused", "fp16"), ("fused", "int8"), ("qformer", "int8")])
def test_graphs_of_several_image_sizes_build_for_all_of_them(
    graph: str, precision: Precision, rtx: Builder, bundle_wide: Bundle, lowered: Lowered
) -> None:
    """The one for captions is vision and Q-Former in one; the Q-Former alone is fed any number of patches."""
    bundle = lowered(bundle_wide, OPEN, precision)
    assert quantises(bundle.graph(graph)) == (precision == "int8")
    assert len(memoryview(plan_of(bundle, graph, rtx, ALL).plan)) > 1000


def test_the_verb_knows_what_several_image_sizes_mean(
    rtx: Builder, bundle_wide: Bundle, lowered: Lowered, copied: Callable[[Bundle], Bundle]
) -> None:
    bundle = copied(lowered(bundle_wide, OPEN, "fp16"))
    build(bundle.path, "tensorrt-rtx", ("8.6",), ("qformer",), (1,), None, {"optimization_level": 0})
    (engine,) = (read_engine(bundle, folder) for folder in engine_folders(bundle))
    shapes = engine.manifest.graphs["qformer"].profiles[0].shapes["image_embeds"]
    assert shapes == ((1, 17, 32), (1, 17, 32), (1, 37, 32)), "16 pixels, the trained 16, and 24, in patches of 4"


def quantises(file: Path) -> bool:
    """Whether a graph rounds activations to eight bits."""
    return "QuantizeLinear" in {node.op_type for node in onnx.load(file).graph.node}


@pytest.mark.parametrize("graph", ["vision", "qformer"])
def test_fp8_builds_where_a_gpu_has_it(graph: str, rtx: Builder, form_of: Callable[[str], Bundle]) -> None:
    assert len(memoryview(plan_of(form_of("fp8-tensorrt"), graph, rtx, ALL[2:]).plan)) > 1000
    with pytest.raises(InputError, match="FP8"):
        plan_of(form_of("fp8-tensorrt"), graph, rtx, ALL)


@pytest.mark.parametrize("capability", ["7.5", "8.0", "12.1"])
def test_a_plan_for_one_gpu(capability: str, form_of: Callable[[str], Bundle], rtx: Builder) -> None:
    built = plan_of(form_of("fp16"), "vision", rtx, (parse_capability(capability),))
    assert len(memoryview(built.plan)) > 1000
    assert {"CONVOLUTION", "MATRIX_MULTIPLY", "NORMALIZATION"} <= set(built.layers)


def test_weights_can_be_streamed(form_of: Callable[[str], Bundle], rtx: Builder) -> None:
    bundle, options = form_of("fp16"), EngineOptions(weight_streaming=True, optimization_level=1, workspace_mib=64)
    profiles = profiles_of("vision", bundle.manifest, ())
    built = build_graph(bundle.graph("vision"), "vision", rtx, ALL[1:2], profiles, options)
    plain = build_graph(bundle.graph("vision"), "vision", rtx, ALL[1:2], profiles, EngineOptions())
    assert bytes(built.plan) != bytes(plain.plan)
