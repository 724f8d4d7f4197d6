"""What the gate measures, and which data it refuses."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from export.config import GateConfig
from export.gate import metric as module
from export.gate.metric import Accuracy, Metric, gate_rows
from runtime.answers import Answer
from runtime.bundle import Bundle
from runtime.dataset import read_manifest
from runtime.errors import DataError, InputError
from runtime.files import sha256_of
from tests.export.conftest import QUIET
from trainer.blip2 import Blip2
from trainer.generate import EagerPipeline


def config(world: Path, **fields: object) -> GateConfig:
    known = {"max_drop": 0.5, "task": "agreement", "data": world / "vqa_val.jsonl"}
    return GateConfig.model_validate(known | fields)


def test_a_drop_without_data_is_one_sentence(world: Path) -> None:
    for missing in ({"data": None}, {"task": None}):
        with pytest.raises(InputError, match=r"max_drop 0\.5: expected held-out data .* --gate-data FILE --gate-task"):
            gate_rows(config(world, **missing), (), answers=True, searches=False)


@pytest.mark.parametrize(("task", "answers"), [("vqa", False), ("agreement", False), ("retrieval", True)])
def test_a_task_the_bundle_cannot_do_is_refused(task: str, answers: bool, world: Path) -> None:
    with pytest.raises(InputError, match=f"export.gate.task {task}: this bundle does not"):
        gate_rows(config(world, task=task), (), answers=answers, searches=not answers)


def test_data_without_fitting_rows_is_refused(world: Path) -> None:
    with pytest.raises(DataError, match=r"captions_val\.jsonl: expected rows with questions with answers, found none"):
        gate_rows(config(world, task="vqa", data=world / "captions_val.jsonl"), (), answers=True, searches=False)


def test_images_that_were_calibrated_on_are_refused(world: Path) -> None:
    data = world / "vqa_train.jsonl"
    seen = sha256_of(read_manifest(data)[4].image)
    with pytest.raises(DataError, match=r"1 of 24 images are calibrated on too, the first: train-"):
        gate_rows(config(world, data=data), {seen}, answers=True, searches=False)


def test_the_seed_chooses_items(world: Path) -> None:
    def rows(**fields: object) -> list[object]:
        asked = config(world, task="vqa", data=world / "vqa_train.jsonl", **fields)
        return list(gate_rows(asked, (), answers=True, searches=False))

    everything = rows(items=None)
    assert len(everything) == len(rows(items=1000)) == len(read_manifest(world / "vqa_train.jsonl"))
    few = rows(items=10)
    assert few == rows(items=10) != rows(items=10, seed=1)
    assert few == [row for row in everything if row in few], "in the order of the file"


@pytest.mark.parametrize(("drop", "allowed", "holds"), [(0.5, 0.5, True), (0.51, 0.5, False), (-2.0, 0.0, True)])
def test_the_measured_drop_decides(drop: float, allowed: float, holds: bool) -> None:
    assert Accuracy(90, drop, drop - 3, drop + 3, "newcombe").holds(allowed) is holds


def test_a_faithful_bundle_agrees(model: Blip2, bundle_fp32: Bundle, world: Path) -> None:
    rows = read_manifest(world / "vqa_val.jsonl")
    found = Metric(model, rows, "agreement", 5, 0, QUIET).measure(bundle_fp32, QUIET)
    assert (found.score, found.drop, found.low, found.method) == (100.0, 0.0, 0.0, "wilson")
    assert 10 < found.high < 60, f"{len(rows)} items cannot tell more"


class Recalled:
    """Stands for `evaluate_retrieval`: eager finds all six, the bundle all but one of the texts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, retriever: object, rows: object, *, candidates: int, progress: object) -> SimpleNamespace:
        self.calls += 1
        texts = (True, self.calls == 1, True, True)
        return SimpleNamespace(hits={"itm_text_to_image_r1": texts, "itm_image_to_text_r1": (True, True)})


def test_retrieval_counts_the_queries_of_both_directions(
    model: Blip2, bundle_fp32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "evaluate_retrieval", Recalled())
    monkeypatch.setattr(module, "Retrieval", lambda *_, **__: nullcontext())
    metric = Metric(model, (), "retrieval", 5, 0, QUIET)
    found = metric.measure(bundle_fp32, QUIET)
    assert (metric.items, metric.eager) == (6, 100.0)
    assert found.drop == pytest.approx(100 / 6)


def test_answers_are_scored_on_the_rows_own_labels(
    model: Blip2, bundle_fp32: Bundle, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are eager's own answers, so eager is right; a bundle that says nothing loses all of it."""
    rows = read_manifest(world / "vqa_val.jsonl")
    said = EagerPipeline(model).answer([module.Request(row.image, row.question) for row in rows])
    labelled = [replace(row, answers=(answer.text or "none",)) for row, answer in zip(rows, said, strict=True)]
    metric = Metric(model, labelled, "vqa", 5, 0, QUIET)
    assert (metric.name, metric.items) == ("accuracy", len(rows))
    assert metric.measure(bundle_fp32, QUIET).drop == 0.0
    mute = [Answer(None, None, "", (), {})] * len(rows)
    monkeypatch.setattr(metric, "_answered", lambda *_: mute)
    found = metric.measure(bundle_fp32, QUIET)
    assert found.drop == metric.eager > 50
    assert found.low < found.drop <= found.high + 1e-9
    assert found.method == "newcombe"
    json.dumps(found.as_json())
