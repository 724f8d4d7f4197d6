"""Language models of six shapes in lower precisions, and what the export refuses of them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from export import pipeline
from export.graphs import Graph
from export.pipeline import export_bundle
from export.precision.cast import cast_graph
from export.precision.emulate import emulate
from export.precision.files import read_structure
from export.precision.half import write_half
from runtime.answers import Request
from runtime.checks import relative_error
from runtime.errors import BackendUnavailable, CheckFailed
from runtime.reference import REFERENCE, read_reference
from runtime.replay import replay
from tests.export.conftest import QUIET
from tests.export.family_exports import CONFIG, ENCODER_DECODERS, answered, parity
from tests.onnx_graphs import run_graph
from tests.plain import assert_plain


@pytest.mark.parametrize("name", ["llama", "flan"])
def test_int8_weights_of_the_language_model(
    name: str, family, manifests: list[Path], images: list[Path], tmp_path: Path
) -> None:
    """Weight-only INT8 in every graph of the language model; close to fp32, and far smaller."""
    made = family(name)
    config = CONFIG.model_copy(update={"language_precision": "int8"})
    loose = config.model_copy(update={"int8": config.int8.model_copy(update={"differing_answers": 1.0})})
    bundle = made.again(tmp_path / "int8", loose, manifests)
    names = ("encoder", "decoder") if name in ENCODER_DECODERS else ("language",)
    assert_plain(made.bundle, names)
    assert_plain(bundle, names)
    for graph in names:
        worst = max(entry["max_error"] for entry in parity(bundle) if entry["graph"] == graph)
        assert 1e-4 < worst < 0.3
        assert bundle.manifest.graphs[graph].bytes < 0.6 * made.bundle.manifest.graphs[graph].bytes
    assert all(len(ids) <= 8 for ids in answered(bundle, [Request(image) for image in images[:3]]))


@pytest.mark.parametrize(
    ("name", "precision", "target"),
    [
        ("llama", "fp16", "onnxruntime"),
        ("flan", "fp16", "onnxruntime"),
        ("flan", "bf16", "onnxruntime"),
        ("flan", "int4", "tensorrt"),
    ],
)
def test_other_types_of_the_language_model(
    name: str, precision: str, target: str, family, manifests: list[Path], images: list[Path], tmp_path: Path
) -> None:
    """Written, verified on rounding as a GPU rounds, smaller, and answered with where a CPU can."""
    made = family(name)
    steep = {"max_error": 2.0, "min_cosine": 0.8} if precision == "int4" else {}  # random weights feel every rounding
    loose = getattr(CONFIG, precision).model_copy(update={"differing_answers": 1.0, **steep})
    config = CONFIG.model_copy(update={"language_precision": precision, "target": target, precision: loose})
    bundle = made.again(tmp_path / "out", config, manifests)
    names = ("encoder", "decoder") if name in ENCODER_DECODERS else ("language",)
    report = json.loads((bundle.path / "precision.json").read_text())
    for graph in names:
        assert report[graph]["verified"] == "emulated"
        assert bundle.manifest.graphs[graph].bytes < 0.65 * made.bundle.manifest.graphs[graph].bytes
        kept = {node["op"]: node["why"] for node in report[graph]["kept"]}
        assert "Softmax" in kept
        assert ("Cos" in kept) == (name == "llama"), "rotary angles are computed from positions"
        assert ("Log" in kept) == (name == "flan"), "buckets are computed from positions"
    if precision == "bf16":
        with pytest.raises(BackendUnavailable, match="computes in BF16"):
            replay(bundle)
    else:
        assert all(check.ok for check in replay(bundle))
        assert all(answered(bundle, [Request(image) for image in images[:3]]))


def test_a_t5_whose_wo_overflows_stays_finite_in_fp16(family, manifests: list[Path], tmp_path: Path) -> None:
    """66,246 came out of a published T5's `wo`; FP16 ends at 65,504. Another norm behind it makes up for the factor."""
    made = family("t5")
    file, plain = tmp_path / "encoder.onnx", tmp_path / "plain.onnx"
    model = onnx.load(made.bundle.graph("encoder"))
    (case,) = [case for case in read_reference(made.bundle.file(REFERENCE)).cases if case.graph == "encoder"]
    activated = {node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[0] in activated]
    assert len(products) == 2
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    last = weights[products[-1].input[1]]
    last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) * np.float32(1e5), last.name))
    onnx.save(model, file)
    shutil.copyfile(file, plain)
    expected = run_graph(file, case.inputs)
    kept = {node.node: node.why for node in write_half(file, [case.inputs], (), low="fp16", bridge=False)}
    assert re.fullmatch(r"reaches [\d,]+ in calibration; FP16 ends at 65,504", kept[products[-1].name])
    assert products[0].name not in kept
    cast_graph(read_structure(plain), plain, "fp16", (), ())
    for path in (file, plain):
        emulate(path)
    found = run_graph(file, case.inputs)
    for name, array in expected.items():
        assert relative_error(found[name].astype(np.float32), array) < 0.02, name
    without = run_graph(plain, case.inputs)["encoder_hidden"]
    assert not np.isfinite(without).all(), "the trap is one"


def test_a_wrong_decoder_is_caught(family, manifests: list[Path], tmp_path: Path, monkeypatch) -> None:
    """The decoder graph traced from other weights than eager's: the judge names it."""
    made, real = family("t5"), pipeline.trace

    def wrong(graph: Graph, folder: Path) -> Path:
        if graph.name != "decoder":
            file = folder / made.bundle.manifest.graphs[graph.name].file
            shutil.copyfile(made.bundle.graph(graph.name), file)
            return file
        head = graph.module.language_model.decoder.final_layer_norm.weight
        head.data *= 1.01
        try:
            return real(graph, folder)
        finally:
            head.data /= 1.01

    monkeypatch.setattr(pipeline, "trace", wrong)
    with pytest.raises(CheckFailed, match=r"graph 'decoder' \(fp32, (prefill|step)\): 'logits' is the worst"):
        export_bundle(
            made.checkpoint,
            tmp_path / "out",
            CONFIG,
            precision="fp32",
            calibration=manifests,
            recipe_yaml="{}\n",
            reuse=None,
            progress=QUIET,
        )
