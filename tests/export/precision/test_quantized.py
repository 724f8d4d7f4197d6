"""INT8 as written into the graph: symmetric, really INT8 in the file and in the runtime, close to eager."""

import math
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import trace
from export.graphs import Graph
from export.precision.activations import require_symmetric
from export.precision.fuse import fuse
from export.precision.weights import gemm_to_matmul, write_nbits
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.reference import REFERENCE, read_reference

QUANTISED = ("vision", "qformer")


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("name", QUANTISED)
def test_every_zero_point_is_int8_zero(name: str, bundle_int8: Bundle) -> None:
    model = onnx.load(bundle_int8.graph(name))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert len(pairs) > 20
    for node in pairs:
        assert constants[node.input[2]].dtype == np.int8
        assert not constants[node.input[2]].any()


@pytest.mark.parametrize("name", QUANTISED)
def test_matrices_are_stored_in_int8_with_a_scale_per_channel(name: str, bundle_int8: Bundle) -> None:
    model = onnx.load(bundle_int8.graph(name))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    weights = [made_by[n.input[1]] for n in products if made_by[n.input[1]].op_type == "DequantizeLinear"]
    assert len(weights) >= 12
    for node in weights:
        matrix, scale = constants[node.input[0]], constants[node.input[1]]
        assert matrix.dtype == np.int8
        assert scale.shape == (matrix.shape[1],)


@pytest.mark.parametrize("name", QUANTISED)
def test_onnxruntime_computes_every_matrix_in_int8(name: str, bundle_int8: Bundle, tmp_path: Path) -> None:
    """Without a Q/DQ pair per reader it would leave query, key and value in fp32."""
    file = bundle_int8.graph(name)
    model, options = onnx.load(file), onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    made_by = {output: node for node in model.graph.node for output in node.output}
    written = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and made_by[node.input[1]].op_type == "DequantizeLinear"
    ]
    assert operators(onnx.load(tmp_path / "optimised.onnx")).count("MatMulIntegerToFloat") == len(written)


def test_the_language_model_has_weights_in_int8_blocks(bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    before, after = (onnx.load(bundle.graph("language")) for bundle in (bundle_fp32, bundle_int8))
    constants = {tensor.name for tensor in before.graph.initializer}
    matrices = [n for n in before.graph.node if n.op_type in {"MatMul", "Gemm"} and constants & set(n.input)]
    assert "Gemm" not in operators(after)
    assert len(matrices) >= 13  # 6 in each of 2 layers, and the head
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in before.graph.initializer}
    products = [node for node in after.graph.node if node.op_type == "MatMulNBits"]
    settings = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in products]
    assert len(products) == len(matrices) - 2 * 2, "query, key and value of a layer are one product"
    assert sum(s["K"] * s["N"] for s in settings) == sum(sizes[node.input[1]] for node in matrices)


def test_int8_files_are_smaller(bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    for name in (*QUANTISED, "language"):
        small, large = (bundle.manifest.graphs[name].bytes for bundle in (bundle_int8, bundle_fp32))
        assert small < 0.6 * large, name


def test_gemm_becomes_matmul_and_add_with_equal_results() -> None:
    rng = np.random.default_rng(0)
    x, turned, bias = (rng.normal(size=size).astype(np.float32) for size in ((3, 4), (5, 4), (5,)))
    straight = rng.normal(size=(5, 2)).astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "turned", "bias"], ["middle"], name="first", transB=1),
        helper.make_node("Gemm", ["middle", "straight"], ["kept"], name="second"),
        helper.make_node("Gemm", ["kept", "square"], ["y"], name="third", alpha=2.0),
    ]
    weights = {"turned": turned, "bias": bias, "straight": straight, "square": np.eye(2, dtype=np.float32)}
    graph = helper.make_graph(
        nodes,
        "gemms",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    gemm_to_matmul(model)
    assert operators(model) == ["MatMul", "Add", "MatMul", "Gemm"], "a Gemm with a factor of its own stays"
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = 2 * ((x @ turned.T + bias) @ straight)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, atol=1e-5)


def test_external_weights_stay_in_a_plain_file(
    bundle_fp32: Bundle, bundle_int8: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, data = tmp_path / "language.onnx", tmp_path / "language.onnx.data"
    onnx.save(onnx.load(bundle_fp32.graph("language")), file, save_as_external_data=True, location=data.name)
    before = data.stat().st_size
    monkeypatch.setattr(trace, "LARGEST_SINGLE_FILE_BYTES", 0)
    assert write_nbits(file, (), bits=8) == []
    fuse(file)
    assert data.is_file()
    assert data.stat().st_size < 0.6 * before
    quantised = onnx.load(file)
    assert operators(quantised) == operators(onnx.load(bundle_int8.graph("language")))
    onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("zero_point", [np.uint8(0), np.int8(3)])
def test_an_asymmetric_graph_is_refused(zero_point: np.generic) -> None:
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="the_culprit")
    constants = [
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
        numpy_helper.from_array(np.array(zero_point), "zero"),
    ]
    model = helper.make_model(helper.make_graph([node], "g", [], [], constants))
    with pytest.raises(CheckFailed, match=r"graph 'vision': expected symmetric INT8 .* at the_culprit"):
        require_symmetric(model, "vision")


def test_nncf_telemetry_is_not_loaded(bundle_int8: Bundle) -> None:
    assert bundle_int8.manifest.precision == "int8"
    assert "nncf" in sys.modules
    assert not sys.modules.get("openvino_telemetry")


def test_int8_still_tells_questions_apart(bundle_int8: Bundle, graphs: dict[str, Graph]) -> None:
    """Twice the same real image: with a question, and with it hidden."""
    reference = read_reference(bundle_int8.file(REFERENCE))
    (run,) = [case for case in reference.cases if case.graph == "vision"]
    image = graphs["vision"].run_eager({"pixels": run.inputs["pixels"][:1]})
    ids = np.array([next(ids for ids in reference.chain.questions if ids)] * 2)
    feeds = {
        "image_embeds": np.repeat(image["image_embeds"], 2, axis=0),
        "question_ids": ids,
        "question_mask": np.array([[1], [0]]) * np.ones_like(ids),
    }
    session = onnxruntime.InferenceSession(str(bundle_int8.graph("qformer")), providers=["CPUExecutionProvider"])
    found, expected = session.run(None, feeds)[0], graphs["qformer"].run_eager(feeds)["prefix"]
    apart = np.abs(expected[0] - expected[1]).max()
    assert np.abs(found - expected).max() < 0.3 * apart
