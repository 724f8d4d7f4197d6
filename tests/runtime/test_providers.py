"""Execution providers: what is absent, dropped or half used is said, and never made up for by the CPU."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import runtime
from qforge.cli import app
from runtime.backends import Device
from runtime.backends.ort import providers_here
from runtime.backends.providers import PROVIDERS, available_providers, require_taken
from runtime.bundle import read_bundle
from runtime.errors import BackendUnavailable, BundleError, InputError
from runtime.replay import replay
from tests.runtime.retrieval_bundle import write_retrieval_bundle


def placed(*nodes: tuple[str, str]) -> list[SimpleNamespace]:
    """What onnxruntime tells of (provider, op type) after it has placed the nodes."""
    return [
        SimpleNamespace(ep_name=where, get_nodes=lambda op=op: [SimpleNamespace(op_type=op, name=f"node_{op}")])
        for where, op in nodes
    ]


@dataclass
class Session:
    """A session that answers as onnxruntime's does."""

    providers: list[str]
    nodes: list[SimpleNamespace] = field(default_factory=list)

    def get_providers(self) -> list[str]:
        return self.providers

    def get_provider_graph_assignment_info(self) -> list[SimpleNamespace]:
        return self.nodes


def test_the_cpu_is_here():
    assert providers_here() == ("cpu",)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "openvino"])
def test_a_provider_that_is_not_built_in_is_named_with_its_package(provider, tiny_bundle):
    theirs, packages = PROVIDERS[provider]
    with pytest.raises(
        BackendUnavailable, match=rf"needs an onnxruntime with {theirs}.* has cpu\. .*install {packages}"
    ):
        runtime.load(tiny_bundle, provider=provider)
    with pytest.raises(BackendUnavailable, match=theirs):
        replay(read_bundle(tiny_bundle), Device(provider=provider))


def test_an_unknown_provider_is_refused(tiny_bundle):
    with pytest.raises(InputError, match="expected one of cpu, cuda, tensorrt, openvino, found 'rocm'"):
        runtime.load(tiny_bundle, provider="rocm")


def test_a_provider_that_is_built_in_and_cannot_start_is_an_error(tiny_bundle, monkeypatch):
    """onnxruntime itself warns, and gives a session on the CPU."""
    names = [theirs for theirs, _ in PROVIDERS.values()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    assert available_providers(onnxruntime) == tuple(PROVIDERS)
    with (
        pytest.warns(UserWarning),
        pytest.raises(BackendUnavailable, match="'cuda' did not start: onnxruntime gave CPU"),
    ):
        Device(provider="cuda").open(read_bundle(tiny_bundle), "vision")


def test_a_failing_session_is_not_retried_elsewhere(tiny_bundle, monkeypatch):
    asked = []

    def fails(*_, providers, enable_fallback):
        asked.append((providers, enable_fallback))
        raise RuntimeError("no device")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    with pytest.raises(BundleError, match="cannot open this graph on CUDAExecutionProvider: no device"):
        Device(provider="cuda").open(read_bundle(tiny_bundle), "vision")
    assert asked == [(["CUDAExecutionProvider"], 0)]


def test_sizes_may_be_computed_on_the_cpu_and_work_may_not():
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    require_taken(Session([cuda, cpu], placed((cuda, "MatMul"), (cpu, "Shape"), (cpu, "Gather"))), "cuda", "g")
    left = Session([cuda, cpu], placed((cuda, "MatMul"), (cpu, "Softmax"), (cpu, "Gemm"), (cpu, "Shape")))
    with pytest.raises(
        BundleError, match=r"g: provider 'cuda' leaves 2 computing nodes to the CPU, .* Softmax node_Soft"
    ):
        require_taken(left, "cuda", "g")


def test_onnxruntime_tells_where_it_placed_the_nodes(tiny_bundle):
    """The question that `require_taken` asks, answered by the real library: all on the CPU here."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    graph = str(read_bundle(tiny_bundle).graph("qformer"))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.get_providers = lambda: ["CUDAExecutionProvider"]
    with pytest.raises(BundleError, match="the first is MatMul"):
        require_taken(session, "cuda", "qformer")


def test_the_cpu_answers_as_before(tiny_bundle):
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    with runtime.load(tiny_bundle, provider="cpu") as pipeline:
        assert pipeline.caption(red)[0].text == "a red"


@pytest.mark.parametrize(
    "words",
    [
        ["caption", "BUNDLE", "IMAGE"],
        ["vqa", "BUNDLE", "IMAGE", "colour?"],
        ["verify", "BUNDLE"],
        ["evaluate", "BUNDLE", "--data", "ROWS", "--task", "vqa"],
        ["evaluate", "SEARCHING", "--data", "ROWS", "--task", "retrieval"],
        ["index", "SEARCHING", "IMAGE", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_every_verb_that_runs_a_bundle_hands_the_provider_on(words, tiny_bundle, tmp_path, capsys):
    image, rows = tmp_path / "image.png", tmp_path / "rows.jsonl"
    Image.new("RGB", (8, 8)).save(image)
    rows.write_text(json.dumps({"image": "image.png", "question": "colour?", "answers": ["red"], "captions": ["red"]}))
    searching = write_retrieval_bundle(tmp_path / "searching") if "SEARCHING" in words else None
    places = {"BUNDLE": tiny_bundle, "SEARCHING": searching, "IMAGE": image, "ROWS": rows, "OUT": tmp_path / "out"}
    with pytest.raises(SystemExit) as ended:
        app([*(str(places.get(word, word)) for word in words), "--provider", "cuda"], prog_name="qforge")
    assert ended.value.code == 2
    assert "provider 'cuda' needs an onnxruntime with CUDAExecutionProvider" in capsys.readouterr().err
