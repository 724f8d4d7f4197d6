"""What breaks in FP16 elsewhere: overflow in front of a LayerNorm, rows padded on the left, a machine that hides both.

T5's `wo` is in tests/export/test_families.py, beside the models it takes.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from export.precision.cast import cast_graph
from export.precision.emulate import emulate
from export.precision.files import read_structure
from export.precision.half import write_half
from runtime.bundle import Bundle
from runtime.checks import relative_error
from runtime.errors import CheckFailed
from runtime.reference import REFERENCE, GraphCase, read_reference
from tests.onnx_graphs import run_graph, write_graph


@pytest.fixture(scope="module")
def cases(bundle_fp32: Bundle) -> dict[tuple[str, str], GraphCase]:
    found = read_reference(bundle_fp32.file(REFERENCE)).cases
    return {(case.graph, case.case): case for case in found}


def scaled(file: Path, name: str, factor: float) -> None:
    """Multiply one weight."""
    model = onnx.load(file)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(model, file)


def test_a_sum_that_overflows_before_a_layer_norm_stays_fp32(
    bundle_fp32: Bundle, cases: dict[tuple[str, str], GraphCase], tmp_path: Path
) -> None:
    file, plain = tmp_path / "vision.onnx", tmp_path / "plain.onnx"
    shutil.copyfile(bundle_fp32.graph("vision"), file)
    model = onnx.load(file)
    made_by = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in {"MatMul", "Gemm"}]
    last = next(name for name in products[-1].input if name not in made_by)
    scaled(file, last, 1e6)
    shutil.copyfile(file, plain)
    feeds = cases["vision", "run"].inputs
    expected = run_graph(file, feeds)["image_embeds"]
    kept = write_half(file, [feeds], (), low="fp16", bridge=False)
    assert products[-1].name in {node.node for node in kept if node.why.startswith("reaches")}
    emulate(file)
    assert relative_error(run_graph(file, feeds)["image_embeds"], expected) < 0.01
    cast_graph(read_structure(plain), plain, "fp16", (), ())
    emulate(plain)
    assert not np.isfinite(run_graph(plain, feeds)["image_embeds"]).all(), "the trap is one"


def test_rows_padded_on_the_left_never_give_nan(
    bundle_fp32: Bundle, cases: dict[tuple[str, str], GraphCase], tmp_path: Path
) -> None:
    """Calibrated without a pad: structure must keep the mask, not luck. A pad sees nothing at all, and stays finite."""
    file = tmp_path / "language.onnx"
    shutil.copyfile(bundle_fp32.graph("language"), file)
    case = cases["language", "prefill"]
    unpadded = case.inputs | {"attention_mask": np.ones_like(case.inputs["attention_mask"])}
    padded = case.inputs | {"attention_mask": case.inputs["attention_mask"].copy()}
    padded["attention_mask"][0, :6] = 0
    padded["attention_mask"][1, :1] = 0
    expected = run_graph(file, padded)
    kept = {node.node: node.why for node in write_half(file, [unpadded], (), low="fp16", bridge=False)}
    assert any(why.startswith("attention scores: a mask") for why in kept.values())
    emulate(file)
    found = run_graph(file, padded)
    for name, array in found.items():
        assert np.isfinite(array).all(), name
    assert relative_error(found["logits"], expected["logits"]) < 0.01


def test_a_mask_in_fp16_would_give_nan(tmp_path: Path) -> None:
    """Why: the most negative fp32 number is minus infinity in FP16, and a softmax over nothing but that is NaN."""
    nodes = [helper.make_node("Add", ["x", "mask"], ["s"], name="add"), helper.make_node("Softmax", ["s"], ["y"])]
    constants = {"mask": np.full((1, 4), np.finfo(np.float32).min)}
    x = {"x": np.array([[-1, -2, -3, -4]], np.float32)}
    ruled, plain = (write_graph(tmp_path / f"{name}.onnx", nodes, constants) for name in ("ruled", "plain"))
    write_half(ruled, [x], (), low="fp16", bridge=False)
    cast_graph(read_structure(plain), plain, "fp16", (), ())
    for file in (ruled, plain):
        emulate(file)
    np.testing.assert_allclose(run_graph(ruled, x)["y"], [[0.25] * 4], rtol=1e-3)
    assert np.isnan(run_graph(plain, x)["y"]).all()


def test_onnxruntime_on_a_cpu_hides_an_overflow_and_the_emulation_shows_it(tmp_path: Path) -> None:
    """The reason why FP16 is judged by an emulation."""
    nodes = [
        helper.make_node("MatMul", ["x", "large"], ["between"], name="first"),
        helper.make_node("MatMul", ["between", "small"], ["y"], name="second"),
    ]
    constants = {"large": 300 * np.eye(4, dtype=np.float32), "small": np.eye(4, dtype=np.float32) / 300}
    file, x = write_graph(tmp_path / "g.onnx", nodes, constants), {"x": np.full((1, 4), 300, np.float32)}
    cast_graph(read_structure(file), file, "fp16", (), ())
    assert np.isfinite(run_graph(file, x)["y"]).all()
    emulate(file)
    assert not np.isfinite(run_graph(file, x)["y"]).any()


def test_fp16_without_real_inputs_is_refused(tmp_path: Path) -> None:
    file = write_graph(tmp_path / "g.onnx", [helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(CheckFailed, match="graph 'g': FP16 needs real feeds"):
        write_half(file, [], (), low="fp16", bridge=False)
