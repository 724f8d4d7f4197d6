"""The whole comparison on a real exported bundle: files, numbers, gate."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.bench import bench
from benchmarks.config import BenchConfig
from benchmarks.report import render
from runtime.dataset import read_manifest
from runtime.errors import CheckFailed, DataError, InputError
from runtime.progress import Progress
from trainer.checkpoint import load_checkpoint, write_checkpoint

SMALL: dict[str, Any] = {
    "items": 12, "threads": 1, "scoring_batch": 5, "batch_sizes": (1, 2), "latency_calls": 3, "warmup": 1,
    "fresh_items": 2, "picture_items": 3,
}  # fmt: skip


def run_bench(bundle: Path, checkpoint: Path, data: Path, out: Path, **config: Any) -> dict[str, Any]:
    """Bench a bundle on the demo manifests in `data`; what result.json holds."""
    bench(
        [bundle],
        checkpoint,
        BenchConfig(**SMALL | config),
        caption_rows=read_manifest(data / "captions_test.jsonl"),
        vqa_rows=read_manifest(data / "vqa_test.jsonl"),
        prior_rows=read_manifest(data / "vqa_train.jsonl"),
        out=out,
        progress=Progress(quiet=True),
    )
    found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return found


def check_whole_bench(bundle: Path, checkpoint: Path, data: Path, out: Path) -> None:
    """One FP32 bundle beside its checkpoint: everything is measured, written, and agrees."""
    out.mkdir()
    (out / "result.json").write_text("of an older run")
    threads = torch.get_num_threads()
    result = run_bench(bundle, checkpoint, data, out, fresh_starts=1)
    files = {"result.json", "answers.jsonl", "report.md", "answers.png", "latency.png"}
    assert {path.name for path in out.iterdir()} == files
    assert torch.get_num_threads() == threads, "what the bench set it has put back"

    name = bundle.name
    for task in ("vqa", "caption"):
        against = result["accuracy"][task]["pipelines"][name]["against_eager"]
        assert against["tokens"] == {"equal": 12, "n": 12}
        assert all(one["value"] == 0 for one in against["difference"].values())
    assert 0 < result["accuracy"]["vqa"]["question_prior"] < 1
    assert "swapped_images" in result["accuracy"]["vqa"]["pipelines"][name]
    assert result["failures"] == []

    cases = [(case["task"], case["batch"], case["cache"]) for case in result["latency"]]
    assert cases == [
        *[(task, size, "off") for task in ("vqa", "caption") for size in (1, 2)],
        *[(task, 1, "hit") for task in ("vqa", "caption")],
    ]
    for case in result["latency"]:
        for samples in case["pipelines"].values():
            assert {len(values) for values in samples["samples_ms"].values()} == {3}

    eager, ours = result["fresh_processes"]["eager"]["p50"], result["fresh_processes"][name]["p50"]
    assert ours["peak_bytes"] < eager["peak_bytes"], "the bundle's process has no torch in it"
    assert result["pipelines"][name]["digest"]
    assert result["pipelines"]["eager"]["parameters"]["bridge"] > 0

    assert (out / "report.md").read_text(encoding="utf-8") == render(result), "the page is made from the file alone"
    assert len((out / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 24
    for picture in ("answers.png", "latency.png"):
        with Image.open(out / picture) as drawn:
            assert drawn.width > 1000


def check_gate(bundle: Path, checkpoint: Path, data: Path, folder: Path) -> None:
    """A bundle of other weights than the checkpoint's fails, after everything is written."""
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        model.bridge.query_tokens.add_(torch.randn_like(model.bridge.query_tokens))
    (folder / "other").mkdir()
    write_checkpoint(model, folder / "other", stage="vqa", metrics={}, recipe_yaml="")
    with pytest.raises(
        CheckFailed, match=r"expected eager's token ids on all 12 items, found them on \d+; .*report\.md"
    ):
        run_bench(bundle, folder / "other", data, folder / "out", fresh_starts=0)
    assert "The gate failed" in (folder / "out" / "report.md").read_text(encoding="utf-8")


def check_refusals(bundle: Path, checkpoint: Path, data: Path, out: Path) -> None:
    """What cannot be measured is refused before anything is."""
    with pytest.raises(InputError, match=r"bench\.batch_sizes: expected at most"):
        run_bench(bundle, checkpoint, data, out, batch_sizes=(1, 4096))
    nothing: dict[str, Any] = {"caption_rows": [], "vqa_rows": [], "prior_rows": []}
    arguments: dict[str, Any] = {**nothing, "out": out, "progress": Progress(quiet=True)}
    with pytest.raises(DataError, match="found neither"):
        bench([bundle], checkpoint, BenchConfig(), **arguments)
    rows = read_manifest(data / "vqa_test.jsonl")
    with pytest.raises(InputError, match="at least one bundle"):
        bench([], checkpoint, BenchConfig(), **arguments | {"vqa_rows": rows})
    assert not out.exists(), "a refused run leaves nothing"
    out.mkdir()
    (out / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"result\.json, found other files"):
        run_bench(bundle, checkpoint, data, out)


def test_whole_bench(tiny_export: tuple[Path, Path, Path], tmp_path: Path) -> None:
    check_whole_bench(*tiny_export, tmp_path / "out")


def test_gate(tiny_export: tuple[Path, Path, Path], tmp_path: Path) -> None:
    check_gate(*tiny_export, tmp_path)


def test_refusals(tiny_export: tuple[Path, Path, Path], tmp_path: Path) -> None:
    check_refusals(*tiny_export, tmp_path / "out")
