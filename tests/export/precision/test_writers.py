"""Single graphs written again and again: the same bytes, the named nodes kept, large weights beside the graph."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.config import ExportConfig
from export.precision.activations import Calibration, write_int8
from export.precision.half import write_half
from export.precision.kept import ASKED
from export.precision.plan import write_precision, writers_for
from export.precision.ranges import largest_values
from export.precision.rules import LIMIT
from export.precision.weights import BLOCKS, _narrowed, write_nbits
from runtime.bundle import Bundle
from runtime.errors import DataError
from runtime.precision import LanguagePrecision, Precision, Target
from runtime.progress import Progress
from runtime.reference import REFERENCE, read_reference
from tests.onnx_graphs import Array, run_graph, write_graph

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def feeds(bundle_fp32: Bundle) -> dict[str, list[Mapping[str, Array]]]:
    found: dict[str, list[Mapping[str, Array]]] = {}
    for case in read_reference(bundle_fp32.file(REFERENCE)).cases:
        found.setdefault(case.graph, []).append(case.inputs)
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "onnx").iterdir()}


@pytest.mark.parametrize(
    ("precision", "language", "target"),
    [("fp16", "fp16", "onnxruntime"), ("bf16", "bf16", "onnxruntime"), ("fp32", "int4", "onnxruntime"),
     ("int8", "int8", "tensorrt"), ("fp8", "int4", "tensorrt")],
)  # fmt: skip
def test_the_same_graph_twice_gives_the_same_bytes_and_the_source_stays(
    precision: Precision, language: LanguagePrecision, target: Target, bundle_fp32: Bundle, feeds, tmp_path: Path
) -> None:
    writers = writers_for(["qformer", "language"], precision, language, ExportConfig(target=target))
    before = hashes(bundle_fp32.path)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_precision(tmp_path / name, bundle_fp32.path, writers, feeds, {}, QUIET)
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    assert hashes(bundle_fp32.path) == before


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_node_that_the_caller_names_is_kept(
    precision: LanguagePrecision, bundle_fp32: Bundle, feeds, tmp_path: Path
) -> None:
    model = onnx.load(bundle_fp32.graph("language"))
    stored = {tensor.name for tensor in model.graph.initializer}
    named = next(n.name for n in model.graph.node if n.op_type in {"MatMul", "Gemm"} and stored & set(n.input))
    writers = writers_for(["language"], "fp32", precision, ExportConfig())
    kept = write_precision(tmp_path, bundle_fp32.path, writers, feeds, {"language": frozenset({named})}, QUIET)
    assert [node.node for node in kept["language"] if node.why == ASKED] == [named]
    again = write_precision(tmp_path, bundle_fp32.path, writers, feeds, {}, QUIET)
    assert ASKED not in {node.why for node in again["language"]}


def test_a_named_node_stays_out_of_int8(bundle_fp32: Bundle, feeds, tmp_path: Path) -> None:
    """With ranges of another kind and without SmoothQuant, which must both show in the scales."""
    file = tmp_path / "qformer.onnx"
    shutil.copyfile(bundle_fp32.graph("qformer"), file)
    model = onnx.load(file)
    stored = {tensor.name for tensor in model.graph.initializer}
    named = next(n.name for n in model.graph.node if n.op_type == "MatMul" and stored & set(n.input))
    plain = Calibration("percentile", None)
    kept = write_int8(file, feeds["qformer"], [named], calibration=plain, own_pairs=False)
    assert [node.node for node in kept if node.why == ASKED] == [named]
    after = onnx.load(file)
    weights = {tensor.name for tensor in after.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    (node,) = [node for node in after.graph.node if node.name == named]
    assert node.input[1] in weights
    gains = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.dims == [32]}
    left = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    assert all(np.array_equal(left[name], gain) for name, gain in gains.items() if name in left), "nothing was smoothed"


def test_a_missing_calibration_is_refused(bundle_fp32: Bundle, tmp_path: Path) -> None:
    writers = writers_for(["qformer"], "int8", "fp32", ExportConfig())
    with pytest.raises(DataError, match="graph 'qformer': int8 is calibrated on real inputs, found none"):
        write_precision(tmp_path, bundle_fp32.path, writers, {}, {}, QUIET)


def test_large_weights_stay_beside_the_graph(bundle_fp32: Bundle, feeds, tmp_path: Path) -> None:
    inside, beside = tmp_path / "inside.onnx", tmp_path / "beside.onnx"
    shutil.copyfile(bundle_fp32.graph("language"), inside)
    model, data = onnx.load(inside), tmp_path / "beside.onnx.data"
    onnx.save(model, beside, save_as_external_data=True, location=data.name, size_threshold=1024)
    size = data.stat().st_size
    for file in (inside, beside):
        kept = write_half(file, feeds["language"], (), low="fp16", bridge=False)
        assert kept
    assert data.stat().st_size < 0.6 * size
    outputs = [run_graph(file, feeds["language"][0]) for file in (inside, beside)]
    for name in outputs[0]:
        np.testing.assert_array_equal(outputs[0][name], outputs[1][name])


def test_ranges_see_empty_tensors_infinities_and_every_feed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "factor"], ["m"]), helper.make_node("Add", ["m", "factor"], ["y"])]
    file = write_graph(tmp_path / "g.onnx", nodes, {"factor": np.full(4, -2, np.float32)})
    some = [{"x": np.zeros((0, 4), np.float32)}, {"x": np.array([[1, 2, -3, 0]], np.float32)}]
    assert largest_values(file, some) == {"x": 3.0, "m": 6.0, "y": 6.0}
    assert largest_values(file, [*some, {"x": np.full((1, 4), np.inf, np.float32)}])["y"] == np.inf
    assert list(tmp_path.iterdir()) == [file]


def test_fp16_keeps_a_margin(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    kept = {}
    for share in (0.9, 1.1):
        file = write_graph(tmp_path / f"{share}.onnx", nodes, {"w": np.eye(4, dtype=np.float32)})
        kept[share] = write_half(
            file, [{"x": np.full((1, 4), share * LIMIT, np.float32)}], (), low="fp16", bridge=False
        )
    assert kept[0.9] == []
    assert json.dumps([node.why for node in kept[1.1]]) == '["reaches 4,503 in calibration; FP16 ends at 65,504"]'


@pytest.mark.parametrize("block", BLOCKS)
def test_int4_loses_less_than_with_the_largest_weight_as_its_range(block: int) -> None:
    matrix_KN = np.random.default_rng(0).normal(size=(128, 48)).astype(np.float32)
    whole, scale = _narrowed(matrix_KN, 4, block)
    blocks = matrix_KN.reshape(-1, block, 48)
    plain = np.abs(blocks).max(axis=1, keepdims=True) / 7
    errors = [
        float(np.square(narrow * scales - blocks).mean())
        for narrow, scales in (
            (whole.astype(np.float32).reshape(blocks.shape), scale[:, None]),
            (np.rint(blocks / plain), plain),
        )
    ]
    assert errors[0] < 0.98 * errors[1]
    assert np.abs(whole.astype(np.int8)).max() <= 7


@pytest.mark.parametrize("bits", [8, 4])
def test_onnxruntime_multiplies_with_the_narrowed_weights(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(0)
    matrix_KN = rng.normal(size=(256, 256)).astype(np.float32)
    x_1K = rng.normal(size=(1, 256)).astype(np.float32)
    file = write_graph(
        tmp_path / "g.onnx", [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], {"w": matrix_KN}, 256
    )
    assert write_nbits(file, (), bits=bits) == []
    (node,) = onnx.load(file).graph.node
    block = next(attribute.i for attribute in node.attribute if attribute.name == "block_size")
    assert block == {8: 256, 4: 128}[bits]
    whole_KN, scale = _narrowed(matrix_KN, bits, block)
    expected = x_1K @ (whole_KN.astype(np.float32).reshape(-1, block, 256) * scale[:, None]).reshape(256, 256)
    found = run_graph(file, {"x": x_1K})["y"]
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())  # x is rounded to 8 bits too
