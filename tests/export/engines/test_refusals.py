"""What a builder or GPU cannot do is said before building: graph, node, reason and way out in one sentence."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.engines.builder import Builder, open_builder
from export.engines.refusals import require_buildable
from export.engines.targets import ComputeCapability, parse_capability, require_reached
from runtime.bundle import Bundle
from runtime.engine_manifest import EngineName, EngineOptions
from runtime.errors import BackendUnavailable, BundleError, InputError

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


def saved(
    folder: Path, nodes: Sequence[NodeProto], shapes: dict[str, tuple[int, Sequence[int]]], *constants: TensorProto
) -> Path:
    """A graph whose inputs are `shapes` and whose outputs are the last node's."""
    outputs = [helper.make_empty_tensor_value_info(name) for name in nodes[-1].output]
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in shapes.items()]
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, list(constants))
    domains = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains), folder / "graph.onnx")
    return folder / "graph.onnx"


def sms(*texts: str) -> tuple[ComputeCapability, ...]:
    return tuple(map(parse_capability, texts))


def product(folder: Path, kind: int) -> Path:
    node = helper.make_node("MatMul", ["x", "y"], ["z"], name="product")
    return saved(folder, [node], {"x": (kind, (2, 2)), "y": (kind, (2, 2))})


def attention(folder: Path, kind: int, width: int = 64, **more: Sequence[str]) -> Path:
    shapes = {name: (kind, (1, 4, 8, width)) for name in "qkv"}
    inputs, outputs = more.get("inputs", ()), more.get("outputs", ())
    shapes |= {name: (kind, (1, 4, 8, width)) for name in inputs if name}
    node = helper.make_node("Attention", ["q", "k", "v", *inputs], ["z", *outputs], name="attends")
    return saved(folder, [node], shapes)


def quantised(folder: Path, kind: int, scale: int = FP16) -> Path:
    zero = 3 if kind == TensorProto.UINT8 else 0
    node = helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["z"], name="dequantises")
    point = helper.make_tensor("zero", kind, (), [zero])
    return saved(folder, [node], {"x": (kind, (2, 2))}, helper.make_tensor("scale", scale, (), [1.0]), point)


def test_operators_of_onnxruntime(bundle_int8: Bundle) -> None:
    words = r"graph 'language': node '\S+' \(MatMulNBits\) is an operator of com.microsoft.*--target tensorrt"
    with pytest.raises(InputError, match=words):
        require_buildable(bundle_int8.graph("language"), "language", "tensorrt-rtx", sms("8.6"))


def test_products_in_fp32_on_turing(tmp_path: Path) -> None:
    file = product(tmp_path, FP32)
    words = r"graph 'vision': node 'product' \(MatMul\) multiplies in FP32.*tensorrt-rtx.*7.5.*--precision fp16"
    with pytest.raises(InputError, match=words):
        require_buildable(file, "vision", "tensorrt-rtx", sms("7.5", "8.6"))
    require_buildable(file, "vision", "tensorrt-rtx", sms("8.0", "8.6"))
    require_buildable(file, "vision", "tensorrt", sms("7.5"))
    require_buildable(product(tmp_path, FP16), "vision", "tensorrt-rtx", sms("7.5"))


def test_bf16_before_ampere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(MatMul\) is in BF16, which begins with compute capability 8.0, found 7.5"):
        require_buildable(product(tmp_path, BF16), "vision", "tensorrt", sms("7.5"))
    require_buildable(product(tmp_path, BF16), "vision", "tensorrt", sms("8.0"))


def test_fp8_before_ada(tmp_path: Path) -> None:
    file = quantised(tmp_path, TensorProto.FLOAT8E4M3FN)
    with pytest.raises(InputError, match=r"is in FP8, which begins with compute capability 8.9, found 8.0, 8.6;.*int8"):
        require_buildable(file, "vision", "tensorrt-rtx", sms("8.0", "8.6", "8.9"))
    require_buildable(file, "vision", "tensorrt-rtx", sms("8.9", "12.0"))


def test_int4_on_turing(tmp_path: Path) -> None:
    file = quantised(tmp_path, TensorProto.INT4)
    with pytest.raises(InputError, match=r"is in INT4.*found 7.5; leave that GPU out, or export with --language"):
        require_buildable(file, "language", "tensorrt-rtx", sms("7.5"))
    require_buildable(file, "language", "tensorrt-rtx", sms("8.6"))


def test_zero_points(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(DequantizeLinear\) has an unsigned type or a zero point other than 0"):
        require_buildable(quantised(tmp_path, TensorProto.UINT8), "vision", "tensorrt", sms("8.6"))
    require_buildable(quantised(tmp_path, TensorProto.INT8), "vision", "tensorrt", sms("8.6"))


def test_ranges_measured_at_run_time(tmp_path: Path) -> None:
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["z", "scale", "zero"], name="measures")
    with pytest.raises(InputError, match=r"\(DynamicQuantizeLinear\) is a form of INT8 that tensorrt does not read"):
        require_buildable(saved(tmp_path, [node], {"x": (FP32, (2, 2))}), "vision", "tensorrt", sms("8.6"))


def test_attention_in_fp32(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"node 'attends' \(Attention\) computes in FP32.*on no GPU.*opset 20"):
        require_buildable(attention(tmp_path, FP32), "vision", "tensorrt-rtx", sms("12.0"))
    require_buildable(attention(tmp_path, FP16), "vision", "tensorrt-rtx", sms("12.0"))


def test_attention_of_odd_width(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has heads of width 20, and tensorrt-rtx has kernels for multiples of 8"):
        require_buildable(attention(tmp_path, FP16, width=20), "vision", "tensorrt-rtx", sms("8.6"))


def test_attention_with_a_cache_of_its_own(tmp_path: Path) -> None:
    file = attention(tmp_path, FP16, inputs=("", "past_k", "past_v"), outputs=("keys", "values"))
    with pytest.raises(InputError, match=r"keeps a cache of its own.*--static-cache"):
        require_buildable(file, "language", "tensorrt-rtx", sms("8.6"))


def test_nodes_inside_branches_are_seen(tmp_path: Path) -> None:
    inner = helper.make_node("Gelu", ["x"], ["z"], name="inner", domain="com.microsoft")
    branch = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("z", FP32, (2,))])
    node = helper.make_node("If", ["c"], ["o"], name="if", then_branch=branch, else_branch=branch)
    file = saved(tmp_path, [node], {"c": (TensorProto.BOOL, ()), "x": (FP32, (2,))})
    with pytest.raises(InputError, match=r"node 'inner' \(Gelu\) is an operator of com.microsoft"):
        require_buildable(file, "vision", "tensorrt", sms("8.6"))


def test_a_graph_edited_by_hand(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"no graph at all")
    with pytest.raises(BundleError, match="expected an ONNX graph, found other data"):
        require_buildable(tmp_path / "graph.onnx", "vision", "tensorrt", sms("8.6"))


def test_large_weights_are_not_read(tmp_path: Path) -> None:
    """Their type is enough, so a graph of 2 GB costs no 2 GB."""
    weights = numpy_helper.from_array(np.zeros((64, 64), np.float32), "y")
    node = helper.make_node("MatMul", ["x", "y"], ["z"], name="product")
    file = saved(tmp_path, [node], {"x": (FP32, (2, 64))}, weights)
    with pytest.raises(InputError, match="multiplies in FP32"):
        require_buildable(file, "vision", "tensorrt-rtx", sms("7.5"))


@pytest.mark.parametrize(
    ("engine", "gpu", "words"),
    [
        (
            "tensorrt-rtx",
            "9.0",
            "tensorrt-rtx builds for compute capability 7.5, .*found 9.0; build with --engine tensorrt",
        ),
        ("tensorrt-rtx", "8.7", "found 8.7; build with --engine tensorrt on that GPU"),
        ("tensorrt", "5.0", "found 5.0; choose another GPU"),
    ],
)
def test_gpus_that_a_builder_does_not_reach(engine: EngineName, gpu: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        require_reached(engine, sms(gpu))


@pytest.mark.parametrize(("text", "meant"), [("86", "8.6"), ("sm_120", "12.0"), ("SM89", "8.9")])
def test_a_gpu_named_otherwise(text: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"expected a number such as 8\.6, found '{text}'; did you mean {meant}"):
        parse_capability(text)
    with pytest.raises(InputError, match=r"found 'ampere'$"):
        parse_capability("ampere")


def test_tensorrt_builds_on_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = Builder("tensorrt", "11.4", None)
    monkeypatch.setattr("export.engines.builder.compute_capability_here", lambda: None)
    with pytest.raises(InputError, match="found no NVIDIA driver here; build there, or with --engine tensorrt-rtx"):
        builder.capabilities(())
    monkeypatch.setattr("export.engines.builder.compute_capability_here", lambda: (9, 0))
    assert builder.capabilities(()) == builder.capabilities(sms("9.0")) == sms("9.0")
    with pytest.raises(InputError, match=r"builds for the GPU here \(9.0\), found --compute-capability 8.6"):
        builder.capabilities(sms("8.6"))


@pytest.mark.parametrize(
    ("options", "timing_cache", "words"),
    [
        (
            {"version_compatible": True},
            False,
            "--version-compatible: tensorrt-rtx cannot: its wheel has no lean runtime",
        ),
        ({"hardware_compatibility": "ampere-plus"}, False, "--hardware-compatibility: tensorrt-rtx cannot"),
        ({}, True, "--timing-cache: tensorrt-rtx cannot: it times no kernels"),
    ],
)
def test_options_that_tensorrt_rtx_cannot_follow(options: dict[str, object], timing_cache: bool, words: str) -> None:
    asked = EngineOptions.model_validate(options)
    with pytest.raises(InputError, match=words):
        Builder("tensorrt-rtx", "1.7", None).require_options(asked, timing_cache)
    Builder("tensorrt", "11.4", None).require_options(asked, timing_cache)


def test_a_builder_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=r"Building with tensorrt needs 'tensorrt'.*qforge\[tensorrt\]"):
        open_builder("tensorrt")


def test_a_builder_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("tensorrt")
    old.__version__ = "10.15.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(BackendUnavailable, match=r"needs version 11 or newer, found 10\.15\.1"):
        open_builder("tensorrt")
