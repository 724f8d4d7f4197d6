"""Whole exports in every precision and for both targets: verified, replayed, answered with, reported."""

import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import runtime
from export.precision.kept import REPORT
from runtime.bundle import Bundle
from runtime.errors import BackendUnavailable
from runtime.replay import replay
from tests.export.conftest import FORMS

RAN = {form: "executed" if form == "fp8" else "emulated" for form in FORMS}


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(form: str, form_of: Callable[[str], Bundle]) -> Bundle:
    return form_of(form)


def test_it_states_what_it_is(form: str, bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.precision, manifest.language_precision, manifest.target) == FORMS[form]
    report = json.loads((bundle.path / REPORT).read_text())
    assert {name: entry["precision"] for name, entry in report.items()} == {
        "vision": FORMS[form][0],
        "qformer": FORMS[form][0],
        "embed": "fp32",
        "language": FORMS[form][1],
    }
    assert report["embed"]["verified"] == "executed"
    assert report["vision"]["verified"] == RAN[form]
    assert all(node["why"] for entry in report.values() for node in entry["kept"])


def test_what_a_cpu_can_run_replays_and_answers(form: str, bundle: Bundle, world) -> None:
    if form == "bf16":
        with pytest.raises(BackendUnavailable, match=r"graph 'vision' computes in BF16.*qforge build"):
            runtime.load(bundle.path)
        return
    assert all(check.ok for check in replay(bundle))
    with runtime.load(bundle.path) as pipeline:
        image = next((world / "images").rglob("*.png"))
        assert pipeline.caption(image)[0].token_ids


def test_caches_take_the_type_of_the_graph(form: str, bundle: Bundle) -> None:
    inputs = bundle.manifest.graphs["language"].inputs
    halved = form not in {"bf16", "fp8"}
    assert inputs["past_key_0"].dtype == ("float16" if halved else "float32")
    assert inputs["inputs_embeds"].dtype == "float32"
    assert bundle.manifest.graphs["language"].outputs["logits"].dtype == "float32"


def test_tensorrt_gets_standard_operators_and_symmetric_weights(form: str, bundle: Bundle) -> None:
    if not form.endswith("tensorrt"):
        pytest.skip("another target")
    for name in ("vision", "qformer", "language"):
        model = onnx.load(bundle.graph(name))
        assert {node.domain for node in model.graph.node} == {""}
        pairs = [node for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
        zeros = {node.input[2] for node in pairs if len(node.input) > 2}
        for tensor in model.graph.initializer:
            if tensor.name in zeros:
                assert not numpy_helper.to_array(tensor).astype(np.float32).any()
    kinds = {tensor.data_type for tensor in onnx.load(bundle.graph("language")).graph.initializer}
    assert {"int8": TensorProto.INT8, "int4": TensorProto.INT4}[FORMS[form][1]] in kinds
