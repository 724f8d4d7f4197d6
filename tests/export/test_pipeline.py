"""The whole export: what a bundle holds, and that nothing stands under its name unless it passed."""

import json
import resource
import shutil
import signal
from pathlib import Path

import onnx
import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from export import pipeline
from export.config import ExportConfig
from runtime.bundle import Bundle, read_bundle
from runtime.errors import CheckFailed, InputError, OutOfSpace
from runtime.replay import replay
from tests.export.conftest import CONFIG, FP32, Export
from tests.signals import hearing_ctrl_c
from trainer.blip2 import Blip2
from trainer.checkpoint import WEIGHTS

FILES = {
    "README.md",
    "latency.json",
    "manifest.json",
    "parity.json",
    "precision.json",
    "qformer_tokenizer.json",
    "recipe.yaml",
    "reference.npz",
    "tokenizer.json",
    *(f"onnx/{name}.onnx" for name in ("vision", "qformer", "embed", "language")),
}


CALIBRATED = {"calibration.json"}


@pytest.fixture(params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    return request.getfixturevalue(f"bundle_{request.param}")


def must_not_run(*_: object) -> None:
    raise AssertionError("nothing was to be made again")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_bundle_is_complete_and_replays(bundle: Bundle) -> None:
    found = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    assert found == FILES | (CALIBRATED if bundle.manifest.precision == "int8" else set())
    assert (bundle.path / "recipe.yaml").read_text() == "seed: 1\n"
    checks = replay(bundle)
    assert {check.graph for check in checks} == {
        "vision/run",
        "qformer/run",
        "embed/run",
        "language/prefill",
        "language/step",
        "chain",
    }
    assert all(check.ok for check in checks)


def test_no_clip_is_without_a_bound(bundle: Bundle) -> None:
    """OpenVINO reads a Clip of integers without an upper bound as "all are 0", and so took all positions for 0."""
    nodes = [
        node
        for name in bundle.manifest.graphs
        for node in onnx.load(bundle.graph(name), load_external_data=False).graph.node
    ]
    clips = [node for node in nodes if node.op_type == "Clip"]
    assert len(nodes) > 100
    assert all(len(node.input) == 3 and all(node.input) for node in clips), [node.name for node in clips]


def test_the_manifest_states_the_model(bundle_fp32: Bundle, bundle_int8: Bundle, model: Blip2) -> None:
    manifest = bundle_int8.manifest
    assert (manifest.precision, manifest.language_precision) == ("int8", "int8")
    assert (bundle_fp32.manifest.precision, bundle_fp32.manifest.language_precision) == ("fp32", "fp32")
    assert manifest.limits.model_dump() == {
        "max_batch": 5,
        "max_positions": 96,
        "max_question_tokens": model.config.qformer.max_text_tokens,
        "max_new_tokens": 92,
        "max_text_tokens": 0,
        "image_sizes": (),
    }
    assert manifest.generation.model_dump() == {
        "eos_token_ids": (model.tokenizer.eos_token_id,),
        "pad_token_id": model.tokenizer.pad_token_id,
        "max_new_tokens": 8,
        "start_token_id": None,
    }
    assert manifest.model.question_conditioned
    assert manifest.preprocess == model.preprocess
    assert manifest.prompts.vqa == model.config.vqa_prompt
    assert manifest.made_by["checkpoint"] == bundle_fp32.manifest.made_by["checkpoint"]


def test_parity_and_card_say_the_same(bundle: Bundle) -> None:
    parity = json.loads((bundle.path / "parity.json").read_text())
    card = (bundle.path / "README.md").read_text()
    assert parity["greedy_answers"]["images"] == 6
    equal = parity["greedy_answers"]["equal"]
    assert f"token for token: {equal} of 12." in card
    assert "(6 captions, 6 questions)" in card
    for entry in parity["graphs"]:
        assert entry["max_error"] <= entry["allowed_error"]
        assert entry["cosine"] >= entry["allowed_cosine"]
    assert parity["calibration_images"] == (12 if bundle.manifest.precision == "int8" else 0)
    worst = max((e for e in parity["graphs"] if e["graph"] == "vision"), key=lambda entry: entry["max_error"])
    assert f"| {worst['output']} | {worst['max_error']:.1e} |" in card


def test_reused_graphs_are_the_traced_ones(
    bundle_fp32: Bundle, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "trace", must_not_run)
    again = read_bundle(export(tmp_path / "again"))
    assert again.manifest == bundle_fp32.manifest
    (again.path / "README.md").write_text("Notes of a reader.")  # words and measurements are not part of the promise
    assert read_bundle(again.path).manifest.digest == bundle_fp32.manifest.digest


def damaged(checkpoint: Path, to: Path, value: float) -> Path:
    """A copy with one weight changed."""
    shutil.copytree(checkpoint, to)
    tensors = load_file(to / WEIGHTS)
    tensors["language_projection.weight"][3, 1] = value
    save_file(tensors, to / WEIGHTS, metadata={"format": "pt"})
    return to


def test_nan_weights_stop_the_export(checkpoint: Path, export: Export, tmp_path: Path) -> None:
    spoilt = damaged(checkpoint, tmp_path / "spoilt", value=float("nan"))
    with pytest.raises(CheckFailed, match=r"graph 'qformer': tensor 'bridge.language_projection.weight' holds NaN"):
        Export(spoilt, export.manifests)(tmp_path / "out")
    assert left_in(tmp_path) == ["spoilt"]


def test_a_missed_tolerance_leaves_nothing_and_keeps_the_old_bundle(
    bundle_fp32: Bundle, export: Export, tmp_path: Path
) -> None:
    out = shutil.copytree(bundle_fp32.path, tmp_path / "out")
    strict = CONFIG.model_copy(update={"int8": CONFIG.int8.model_copy(update={"min_cosine": 1.0})})
    with pytest.raises(CheckFailed, match="too far from eager PyTorch"):
        export(out, strict, precision="int8")
    assert left_in(tmp_path) == ["out"]
    assert read_bundle(out).manifest == bundle_fp32.manifest
    with pytest.raises(CheckFailed, match="too far from eager PyTorch"):
        export(tmp_path / "new", strict, precision="int8")
    assert left_in(tmp_path) == ["out"]


def test_an_interrupt_leaves_nothing_and_keeps_the_old_bundle(
    bundle_fp32: Bundle, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pipeline, "verify", interrupted)
    with hearing_ctrl_c(), pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out")
    assert left_in(tmp_path) == []
    out = shutil.copytree(bundle_fp32.path, tmp_path / "out")
    with hearing_ctrl_c(), pytest.raises(KeyboardInterrupt):
        export(out, FP32.model_copy(update={"seed": 1}))
    assert left_in(tmp_path) == ["out"]
    assert read_bundle(out).manifest == bundle_fp32.manifest


def test_a_full_disk_is_told_and_leaves_nothing(export: Export, tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the system refuses the same write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OutOfSpace, match="no space left while writing"):
            export(tmp_path / "out", reuse=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left_in(tmp_path) == []


def test_a_wrong_trace_does_not_pass_as_int8_noise(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision graph traced from weights a hair off: fine for INT8's tolerance, not for what it is made from."""
    real, hashed = pipeline.trace, pipeline.reuse_by_hash.traced_from

    def slightly_wrong(graph, folder: Path) -> Path:
        weight = graph.module.post_layernorm.weight if graph.name == "vision" else None
        if weight is not None:
            weight.data *= 1.01
        try:
            return real(graph, folder)
        finally:
            if weight is not None:
                weight.data /= 1.01

    monkeypatch.setattr(pipeline, "trace", slightly_wrong)
    monkeypatch.setattr(
        pipeline.reuse_by_hash, "traced_from", lambda graph: hashed(graph) if graph.name != "vision" else "unknown"
    )
    with pytest.raises(CheckFailed, match=r"graph 'vision' \(fp32, run\): 'image_embeds' is the worst"):
        export(tmp_path / "out", FP32, precision="int8")


def test_a_folder_with_other_files_is_not_replaced(export: Export, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"dear to someone")
    with pytest.raises(InputError, match="found other files"):
        export(tmp_path)
    assert left_in(tmp_path) == ["holiday.jpg"]


@pytest.mark.parametrize(("positions", "message"), [(97, "expected at most 96"), (11, "need more than 11 positions")])
def test_positions_the_model_cannot_meet_are_refused(
    positions: int, message: str, export: Export, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export(tmp_path / "out", FP32.model_copy(update={"max_positions": positions}))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="reference_items 4 exceeds max_batch 2"):
        ExportConfig(max_batch=2)


def test_libraries_stay_quiet(export: Export, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """stdout belongs to --json; stderr to our own bars, which are off here."""
    export(tmp_path / "out", CONFIG, precision="int8")
    assert capfd.readouterr() == ("", "")
