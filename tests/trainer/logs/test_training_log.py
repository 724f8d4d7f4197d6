"""A stage's log: whole after kill and resume, read back by TensorBoard; runs that collapse, and one that learns."""

import builtins
import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from qforge.recipe import Recipe
from runtime.errors import BackendUnavailable
from runtime.progress import Progress
from trainer import train
from trainer.config import STAGES, ModelConfig, StageName
from trainer.data import FeatureStore, ResolvedData, resolve
from trainer.data_config import DataConfig
from trainer.logs.flops import Peak
from trainer.logs.journal import read_journal
from trainer.ranks import Ranks
from trainer.stage_config import Stage1Config, Stage2Config, StageConfig
from trainer.stepper import Stepper

SHORT = dict(steps=12, batch_size=8, warmup_steps=2, eval_every=6, eval_items=8, save_every=5, log_every=2)
VARYING = ("speed", "memory", "peak_per_second")
"""What two equal runs need not have in common."""


def train_one(
    stage: StageName,
    config: StageConfig,
    model: ModelConfig,
    data: ResolvedData,
    out: Path,
    progress: Progress | None = None,
) -> Path:
    return train.run_stage(
        stage,
        model=model,
        data=data,
        config=config,
        seed=3,
        init=None,
        out=out,
        recipe_yaml="{}\n",
        store=FeatureStore(),
        progress=progress or Progress(quiet=True),
        ranks=Ranks(),
    )


def fixed(path: Path) -> list[dict]:
    """The log without what varies, and without the events of a start."""
    records = [{k: v for k, v in r.items() if k not in VARYING} for r in read_journal(path)]
    return [r for r in records if r.get("event") not in ("resume", "flops")]


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


def test_a_resumed_run_logs_what_a_whole_one_logs(model_config, data, tmp_path, monkeypatch) -> None:
    config = Stage1Config(**SHORT, tensorboard=True)
    whole = train_one("stage1", config, model_config, data, tmp_path / "whole")
    step, seen = Stepper.step, []

    def dying(self, number, indices, draws):
        if len(seen) == 8:
            raise Killed
        seen.append(number)
        return step(self, number, indices, draws)

    monkeypatch.setattr(Stepper, "step", dying)
    with pytest.raises(Killed):
        train_one("stage1", config, model_config, data, tmp_path / "cut")
    left = read_journal(tmp_path / ".cut.log" / "training.jsonl")
    assert left[-1]["step"] == 8, "the killed run had logged beyond its resume point"
    monkeypatch.setattr(Stepper, "step", step)
    cut = train_one("stage1", config, model_config, data, tmp_path / "cut")
    assert fixed(cut / "training.jsonl") == fixed(whole / "training.jsonl")
    assert json.loads((cut / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
    steps = [r["step"] for r in read_journal(cut / "training.jsonl") if r["kind"] == "step"]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in read_journal(cut / "training.jsonl") if r.get("event") == "resume"] == [5]
    assert not (tmp_path / ".cut.log").exists()
    for folder in (whole, cut):
        scalars = scalars_of(folder / "tensorboard")
        assert [step for step, _ in scalars["losses/itm"]] == steps, "TensorBoard shows each step once"
        logged = [r["losses"]["itm"] for r in read_journal(folder / "training.jsonl") if r["kind"] == "step"]
        assert [value for _, value in scalars["losses/itm"]] == pytest.approx(logged)
        assert [step for step, _ in scalars["held_out/itm_accuracy"]] == [6, 12]


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """As TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_a_step_says_how_fast_it_was(model_config, data, tmp_path) -> None:
    out = train_one("stage2", Stage2Config(**SHORT, precision="fp32"), model_config, data, tmp_path / "out")
    records = read_journal(out / "training.jsonl")
    head = records[0]
    assert head["kind"] == "run"
    assert head["lines"]["loss"]["chance"] > 3
    flops = next(r for r in records if r.get("event") == "flops")
    assert flops["per_step_and_process"] > 1e6
    last = [r for r in records if r["kind"] == "step"][-1]
    speed = last["speed"]
    assert speed["samples_per_s"] == pytest.approx(8 / speed["step_ms"] * 1e3)
    assert speed["data_wait_share"] == pytest.approx(speed["data_wait_ms"] / speed["step_ms"])
    achieved = flops["per_step_and_process"] / speed["step_ms"] * 1e3
    assert speed["model_flop_utilisation"] == pytest.approx(achieved / flops["peak_per_second"])
    assert 0 < speed["model_flop_utilisation"] < 1
    assert len(last["learning_rates"]) >= 1
    assert last["gradient_norm"] > 0
    assert last["memory"]["resident_mib"] > 50


def test_steps_faster_than_the_measured_peak_raise_it(model_config, data, tmp_path, monkeypatch) -> None:
    """The machine was busy when the peak was measured: no step reads above 100 %, and the log says what was raised."""
    monkeypatch.setattr("trainer.logs.training_log.peak_of", lambda *_: Peak(1e6, "measured"))
    out = train_one("stage2", Stage2Config(**SHORT, precision="fp32"), model_config, data, tmp_path / "out")
    records = read_journal(out / "training.jsonl")
    peaks = [r["peak_per_second"] for r in records if r.get("event") == "flops"]
    assert peaks[0] == 1e6
    assert len(peaks) > 1
    assert peaks == sorted(peaks)
    shares = [r["speed"]["model_flop_utilisation"] for r in records if r["kind"] == "step"]
    assert shares[0] is None
    assert all(0 < share <= 1 for share in shares[1:])


def test_a_data_sheets_peak_is_not_raised(model_config, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.logs.training_log.peak_of", lambda *_: Peak(1e6, "data sheet"))
    out = train_one("stage2", Stage2Config(**SHORT, precision="fp32"), model_config, data, tmp_path / "out")
    records = read_journal(out / "training.jsonl")
    assert [r["peak_per_second"] for r in records if r.get("event") == "flops"] == [1e6]
    assert [r for r in records if r["kind"] == "step"][-1]["speed"]["model_flop_utilisation"] > 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_knows_the_lines_of_what_it_shows(stage, model_config, data, tmp_path) -> None:
    short = dict(steps=1, batch_size=8, eval_items=2, precision="fp32")
    config = getattr(Recipe(), stage).model_copy(update=short)
    out = train_one(stage, config, model_config, data, tmp_path / "out")
    head, *records = read_journal(out / "training.jsonl")
    assert head["lines"].keys() <= next(r for r in records if r["kind"] == "step")["losses"].keys()
    assert head["lines"]


def test_images_that_cannot_be_read_are_told_of(model_config, data, world, tmp_path) -> None:
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    (copy / "images" / "train-00003.png").write_bytes(b"not a picture")
    damaged = resolve(DataConfig(), copy)
    out = train_one("stage1", Stage1Config(**SHORT), model_config, damaged, tmp_path / "out")
    last = read_journal(out / "training.jsonl")[-1]
    assert (last["event"], last["step"]) == ("broken_images", 12)
    assert [Path(path).name for path in last["images"]] == ["train-00003.png"]


def test_tensorboard_that_is_not_installed_names_the_extra(model_config, data, tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(BackendUnavailable, match=r"qforge\[tensorboard\]"):
        train_one("stage2", Stage2Config(**SHORT, tensorboard=True), model_config, data, tmp_path / "out")


COLLAPSED = dict(steps=80, batch_size=8, eval_every=1_000, eval_items=4, save_every=1_000, log_every=5, warmup_steps=5)


def test_a_run_that_cannot_learn_alarms(model_config, data, tmp_path, capsys) -> None:
    """A rate of nothing leaves every loss where it began; each is told of once, here and in both files."""
    config = Stage1Config(**COLLAPSED, learning_rate=1e-12, min_learning_rate=0)
    out = train_one("stage1", config, model_config, data, tmp_path / "out", Progress())
    alarms = json.loads((out / "metrics.json").read_text())["alarms"]
    assert {"itc_stuck", "itm_stuck", "itg_stuck"} == {alarm["kind"] for alarm in alarms}
    logged = [r for r in read_journal(out / "training.jsonl") if r.get("event") == "alarm"]
    assert [(r["alarm"], r["step"]) for r in logged] == [(alarm["kind"], alarm["step"]) for alarm in alarms]
    told = " ".join(capsys.readouterr().err.split())
    for alarm in alarms:
        assert told.count(alarm["text"]) == 1


def test_images_that_tell_nothing_alarm_at_a_normal_rate(model_config, data, world, tmp_path) -> None:
    """Every image is the same grey: contrast cannot fall below chance, and matching learns its prior alone."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    for image in (copy / "images").glob("train-*.png"):
        Image.new("RGB", (32, 32), (128, 128, 128)).save(image)
    grey = resolve(DataConfig(), copy)
    config = Stage1Config(**COLLAPSED, learning_rate=1e-3, itg_weight=0)
    out = train_one("stage1", config, model_config, grey, tmp_path / "out")
    alarms = {alarm["kind"]: alarm for alarm in json.loads((out / "metrics.json").read_text())["alarms"]}
    assert alarms.keys() == {"itc_stuck", "itm_stuck"}
    last = [r["losses"] for r in read_journal(out / "training.jsonl") if r["kind"] == "step"][-5:]
    assert sum(losses["itm"] for losses in last) / 5 == pytest.approx(0.6365, abs=0.01)
    assert sum(losses["itc"] for losses in last) / 5 == pytest.approx(math.log(8), abs=0.15)


def test_a_run_that_learns_does_not_alarm(model_config, data, tmp_path) -> None:
    config = Stage2Config(**COLLAPSED, learning_rate=3e-3, precision="fp32")
    out = train_one("stage2", config, model_config, data, tmp_path / "out")
    losses = [r["losses"]["loss"] for r in read_journal(out / "training.jsonl") if r["kind"] == "step"]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((out / "metrics.json").read_text())["alarms"] == []
