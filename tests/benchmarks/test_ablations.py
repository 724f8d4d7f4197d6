"""The ablations in their smallest size: what differs between arms, what is kept, what a second call leaves alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ablations
from benchmarks.ablations import QUESTIONS, Arm, main
from tests.in_process import qforge_in_process
from trainer.blip2 import new_blip2
from trainer.checkpoint import read_config

SMALL = (
    "data.demo.train_scenes=24",
    "data.demo.val_scenes=4",
    "data.demo.test_scenes=4",
    "data.demo.image_size=32",
    *(f"{stage}.{key}=2" for stage in ("stage1", "stage2") for key in ("steps", "warmup_steps")),
    *(f"{stage}.{key}=4" for stage in ("stage1", "stage2") for key in ("batch_size", "eval_items")),
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablations")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """First words of the commands that were run."""
    words = list[str]()

    def run(*arguments: str) -> dict[str, Any]:
        words.append(arguments[0])
        return qforge_in_process(*arguments)

    monkeypatch.setattr(ablations, "qforge", run)
    return words


def answer(work: Path, *only: str) -> dict[str, Any]:
    overrides = [word for override in SMALL for word in ("--set", override)]
    main(["--work", str(work), "--out", str(work / "result.json"), "--only", *only, "--seeds", "3", *overrides])
    result: dict[str, Any] = json.loads((work / "result.json").read_text())
    return result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_arms_differ_in_one_thing_and_a_second_call_trains_nothing(work: Path, said: list[str]) -> None:
    result = answer(work, "itg", "stage1")
    assert said == ["data", *["train", "evaluate"] * 2, *["train", "evaluate"] * 2]
    with_itg, without = (result["itg"]["runs"][arm][0] for arm in ("itc+itm+itg", "itc+itm"))
    assert {"itc_text_to_image_r1", "itm_image_to_text_r1"} <= set(with_itg["test"]["metrics"])
    assert without["overrides"] == [*with_itg["overrides"], "stage1.itg_weight=0"]
    assert with_itg["test"]["n"] == without["test"]["n"] == 8
    assert [entry["step"] for entry in with_itg["held_out"]["stage1"]] == [2]
    assert result["itg"]["means"]["itc+itm"] == without["test"]["metrics"]
    assert result["itg"]["settings"] == list(SMALL)
    demo, untrained = (result["stage1"]["runs"][arm][0] for arm in ("with stage 1", "without stage 1"))
    assert demo["overrides"] == untrained["overrides"] == []
    assert {"stage1", "stage2"} == set(demo["held_out"])
    assert set(untrained["held_out"]) == {"stage2"}
    assert demo["test"]["settings"]["task"] == "caption"

    trained = {path: path.stat().st_mtime_ns for path in work.rglob("model.safetensors")}
    said.clear()
    again = answer(work, "stage1")
    assert said == ["train", "train"]
    assert trained == {path: path.stat().st_mtime_ns for path in work.rglob("model.safetensors")}
    assert again["itg"] == result["itg"]  # what was not asked for is kept
    assert again["stage1"]["means"] == result["stage1"]["means"]


def test_without_stage_1_training_begins_with_the_weights_that_stage_1_begins_with(work: Path, said: list[str]) -> None:
    answer(work, "stage1")
    folder = work / "untrained" / Arm().folder(3)
    torch.manual_seed(3)
    fresh = new_blip2(read_config(folder).model, question_conditioned=False)
    begun = weights(folder)
    assert begun
    for key, tensor in fresh.bridge.state_dict().items():
        if key in begun:
            assert torch.equal(begun[key], tensor), key
    after = weights(work / "runs" / Arm().folder(3) / "steps" / "stage1")
    assert any(not torch.equal(after[key], begun[key]) for key in begun)


def test_every_question_compares_the_demo_with_one_other_training() -> None:
    for question in QUESTIONS.values():
        demo, *others = question.arms().values()
        assert demo == Arm(question.common)
        assert len({arm.folder(0) for arm in (demo, *others)}) == 1 + len(others)
        for arm in others:
            assert arm.overrides[: len(question.common)] == question.common
            assert len(arm.overrides) + arm.skips_stage1 == len(question.common) + 1
