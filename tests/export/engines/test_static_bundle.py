"""From a checkpoint to engines by the two commands a user gives: the decoder with a fixed-size cache among them."""

import json
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from export.engines.builder import Builder
from qforge import cli
from runtime.answers import Request
from runtime.backends import Device
from runtime.backends.trt import choice
from runtime.backends.trt.engine import TrtEngine
from runtime.backends.trt.session import Session
from runtime.bundle import ENGINES, Bundle, read_bundle
from runtime.dataset import read_manifest
from runtime.engine_manifest import BuiltEngine, read_engine
from runtime.first_use import Place
from runtime.pipeline import Pipeline
from tests.families import write_family
from tests.runtime.trt.fakes import FakeCuda, plan_of
from tests.tiny import widen
from trainer.blip2 import Blip2, new_blip2
from trainer.checkpoint import write_checkpoint

GPUS = ("8.0", "8.6", "8.9", "12.0")
LIMIT, POSITIONS, HEADS, HEAD_WIDTH = 2, 96, 4, 16
"""Batch and positions of the bundle; heads of the least number and width that TensorRT attends with."""


def qforge(*words: str | Path) -> int:
    """Exit code of a command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr("sys.argv", ["qforge", *map(str, words)])
        cli.main()
    return int(str(ended.value.code or 0))


@pytest.fixture(scope="module")
def speaker(model: Blip2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an OPT whose heads are wide enough; its embedding is as narrow as before (OPT-350M's way),
    so that vision and Q-Former are those of `bundle_fp32`."""
    folder = tmp_path_factory.mktemp("speaker")
    config = write_family("opt", model.config, folder / "language")
    wide = OPTConfig.from_pretrained(folder / "language")
    wide.hidden_size = HEADS * HEAD_WIDTH
    torch.manual_seed(0)
    language = OPTForCausalLM(wide)
    widen(language, 0.15, matrices_only=True)
    language.save_pretrained(folder / "language")
    blip2 = new_blip2(config, question_conditioned=True).eval()
    blip2.bridge.load_state_dict(model.bridge.state_dict())
    (folder / "checkpoint").mkdir()
    write_checkpoint(blip2, folder / "checkpoint", stage="vqa", metrics={}, recipe_yaml="seed: 1\n")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def bundle(
    speaker: Path, bundle_fp32: Bundle, manifests: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    out = tmp_path_factory.mktemp("static") / "bundle"
    images = [word for manifest in manifests for word in ("--calibration", manifest)]
    settings = {"verification_images": 4, "reference_items": LIMIT, "max_batch": LIMIT}
    changed = [word for key, value in settings.items() for word in ("--set", f"export.{key}={value}")]
    types = ("--precision", "fp16", "--language-precision", "fp16", "--target", "tensorrt", "--static-cache")
    more = ("--calibration-images", "4", "--reuse", bundle_fp32.path)
    assert qforge("export", speaker, "--out", out, *types, *images, *more, *changed) == 0
    return read_bundle(out)


@pytest.fixture(scope="module")
def engine(bundle: Bundle, rtx: Builder) -> BuiltEngine:
    gpus = [word for gpu in GPUS for word in ("--compute-capability", gpu)]
    assert qforge("build", bundle.path, "--engine", "tensorrt-rtx", *gpus) == 0
    return read_engine(bundle, bundle.path / ENGINES / "tensorrt-rtx-sm80-sm86-sm89-sm120")


def test_the_export_judged_the_static_decoder_too(bundle: Bundle) -> None:
    assert list(bundle.manifest.graphs) == ["vision", "qformer", "embed", "language", "language_static"]
    parity = json.loads((bundle.path / "parity.json").read_text())["graphs"]
    judged = [row for row in parity if row["graph"] == "language_static"]
    assert {row["case"] for row in judged} == {"prefill", "step"}
    assert {row["precision"] for row in judged} == {"fp16"}


def test_every_graph_has_a_plan(engine: BuiltEngine, bundle: Bundle, rtx: Builder) -> None:
    manifest = engine.manifest
    assert (manifest.engine, manifest.builder_version) == ("tensorrt-rtx", rtx.version)
    assert manifest.compute_capabilities == GPUS
    assert manifest.bundle_digest == bundle.manifest.digest
    assert list(manifest.graphs) == list(bundle.manifest.graphs)
    for name, graph in manifest.graphs.items():
        stated = bundle.manifest.graphs[name]
        assert graph.onnx_sha256 == stated.sha256
        assert graph.plan.bytes == engine.plan(name).stat().st_size > 1000
        for found, expected in ((graph.inputs, stated.inputs), (graph.outputs, stated.outputs)):
            assert {n: spec.shape for n, spec in found.items()} == {n: spec.shape for n, spec in expected.items()}
            assert {n: spec.dtype for n, spec in found.items()} == {n: spec.dtype for n, spec in expected.items()}
    assert {path.name for path in engine.path.iterdir()} == {"engine.json", *(f"{n}.plan" for n in manifest.graphs)}


def test_the_cache_has_one_size_in_every_profile(engine: BuiltEngine) -> None:
    graph = engine.manifest.graphs["language_static"]
    assert graph.inputs["past_key_0"].dtype == graph.outputs["present_key_0"].dtype == "float16"
    names = [f"batch-{batch}-{phase}" for batch in (1, LIMIT) for phase in ("prefill", "step")]
    assert [profile.name for profile in graph.profiles] == [*names, "range-prefill", "range-step"]
    for profile in graph.profiles:
        most = 1 if profile.name.endswith("step") else POSITIONS
        batches = {"batch-1": (1, 1), "batch-2": (2, 2), "range": (1, LIMIT)}[profile.name.rpartition("-")[0]]
        for batch, shape in zip(batches, profile.shapes["past_key_0"][::2], strict=True):
            assert shape == (batch, HEADS, POSITIONS, HEAD_WIDTH)
        for batch, shape in zip(batches, profile.shapes["attention_mask"][::2], strict=True):
            assert shape == (batch, POSITIONS)
        assert [shape[1] for shape in profile.shapes["inputs_embeds"]][::2] == [1, most]


def test_inspect_lists_them(engine: BuiltEngine, bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert qforge("inspect", bundle.path) == 0
    said = capsys.readouterr().out
    assert f"engine {engine.path.name}: tensorrt-rtx" in said
    assert "language_static: " in said


def test_the_pipeline_runs_it_in_place(
    bundle: Bundle, engine: BuiltEngine, manifests: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for the GPU that computes what the graphs say: everything but the GPU's own arithmetic."""
    cuda, opened = FakeCuda(), dict[str, TrtEngine]()
    session = Session(cuda)

    def open_plan(of: Bundle, graph: str) -> tuple[TrtEngine, Place]:
        stated = engine.manifest.graphs[graph]
        caches = [name for name in stated.outputs if name.startswith("present_")] if graph == "language_static" else []
        aliases = {name: name.replace("present_", "past_") for name in caches}
        plan = plan_of(of.graph(graph), stated, cuda, aliases=aliases)
        opened[graph] = TrtEngine(plan, stated, graph, session)
        return opened[graph], Place(stated.plan.sha256, "a stand-in", "onnxruntime")

    monkeypatch.setattr(choice, "open_plan", open_plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = next(row.image for row in read_manifest(manifests[0]))
    requests = [Request(image), Request(image, "what colour is the circle?")]
    with Pipeline(bundle, device=Device("trt"), cache_bytes=0) as pipeline:
        first, again = (pipeline.answer(requests) for _ in range(2))
        counts = opened["language_static"].counts
        assert counts.captures >= 1 and counts.replays > counts.eager and counts.unfit == 0
    with Pipeline(bundle, cache_bytes=0) as portable:
        expected = portable.answer(requests)
    texts = [[answer.token_ids for answer in answers] for answers in (first, again, expected)]
    assert texts[0] == texts[1] == texts[2] and all(texts[0])
    assert sorted(opened) == ["embed", "language_static", "qformer", "vision"]
    checked = [json.loads(note.read_text()) for note in (tmp_path / "qforge" / "checked").iterdir()]
    assert {note["graph"]: len(note["checks"]) > 0 for note in checked} == dict.fromkeys(opened, True)
    assert cuda.memory == {} and cuda.graphs == {}
