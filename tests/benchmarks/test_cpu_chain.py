"""The chain benchmark at a thousandth of the size: everybody answers, and ratios are those of the samples."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cpu_chain
from benchmarks.bandwidth import reading_ms
from benchmarks.cpu_chain import BACKENDS, BATCH, CASES, FORMS, PEERS, TOKENS, run
from runtime.progress import Progress
from tests.in_process import qforge_in_process
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import write_demo_world

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "export.calibration_images=4",
    "export.verification_images=4",
    f"export.max_batch={BATCH}",
    f"model.max_new_tokens={TOKENS}",
    "export.int8={max_error: 1, min_cosine: 0.5, differing_answers: 1}",
    "export.int4={max_error: 2, min_cosine: 0.5, differing_answers: 1}",
)


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu_chain, "_qforge", qforge_in_process)  # what is measured begins after these commands
    monkeypatch.setattr(cpu_chain, "THREADS", 1)  # another worker has the other core
    monkeypatch.setattr(cpu_chain, "PEERS", {name: PEERS[name] for name in ("eager-fp32", "eager-bf16")})
    world = DemoWorldConfig(train_scenes=12, val_scenes=1, test_scenes=1, image_size=32)
    data = write_demo_world(world, tmp_path / "data", Progress(quiet=True)) / "captions_train.jsonl"
    result = run(tmp_path / "work", data, 2, "tiny", SETTINGS)
    ways = {f"{form} {backend}" for form in FORMS for backend in BACKENDS}
    names = {"eager-fp32", "eager-bf16", *ways}
    for case in CASES:
        assert set(result["cases"][case]) == names
        for name, found in result["cases"][case].items():
            assert len(found["samples_ms"]) == 2
            assert set(found["times_faster_than"]) == ({"eager-fp32", "eager-bf16"} if name in ways else set())
        ours, eager = result["cases"][case]["int8 ort"], result["cases"][case]["eager-fp32"]
        ratio = np.median(eager["samples_ms"]) / np.median(ours["samples_ms"])
        assert ours["times_faster_than"]["eager-fp32"]["value"] == pytest.approx(ratio, rel=0.02)
    for name in ways:
        per_token = result["per_token"][name]
        assert per_token["of_floor"] == pytest.approx(
            per_token["ms"] / np.median(per_token["floor_samples_ms"]), rel=0.05
        )
        assert 0 < result["fresh_process"][name]["peak_of_eager"] < 1
    assert (tmp_path / "work" / "bundle-int8").is_dir(), "kept for a second run"


def test_the_committed_result_holds_what_is_promised() -> None:
    result = json.loads((ROOT / "benchmarks/results/cpu-chain.json").read_text())
    faster = {case: of_case["int8-int4 openvino"]["times_faster_than"] for case, of_case in result["cases"].items()}
    assert faster["caption"]["eager-fp32"]["value"] >= 6
    assert min(faster["caption"][peer]["value"] for peer in ("eager-bf16", "compiled-bf16")) >= 2.5
    assert faster["second_question"]["eager-fp32"]["value"] >= 10
    assert result["fresh_process"]["int8 ort"]["peak_of_eager"] <= 0.4
    assert result["fresh_process"]["int8 ort"]["ready_ms"] < 1500


def test_reading_more_takes_longer() -> None:
    assert reading_ms(64_000_000, 1) > 4 * reading_ms(2_000_000, 1) > 0
