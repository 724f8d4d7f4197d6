"""Training: a resumed run ends with the bits of a whole one; every stage learns; broken images are replaced."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.errors import CheckpointError, DataError, InputError
from runtime.files import sha256_of
from runtime.progress import Progress
from trainer import plans, train
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint
from trainer.config import STAGES, ModelConfig, StageName
from trainer.data import FeatureStore, ResolvedData, resolve
from trainer.data_config import DataConfig
from trainer.guard import TrainingFailed
from trainer.logs.journal import FILE, read_journal
from trainer.optimiser import learning_rate, make_optimiser
from trainer.order import rows_at
from trainer.ranks import Ranks
from trainer.stage_config import CaptionConfig, RetrievalConfig, Stage1Config, Stage2Config, StageConfig, VqaConfig
from trainer.stepper import Stepper
from trainer.watch import StepReport, Watcher

SHORT = dict(steps=6, batch_size=8, warmup_steps=2, eval_every=3, eval_items=8, save_every=2, learning_rate=1e-3)
CONFIGS: dict[StageName, StageConfig] = {
    "stage1": Stage1Config(**SHORT),
    "stage2": Stage2Config(**SHORT, precision="fp32"),
    "caption": CaptionConfig(**SHORT),
    "vqa": VqaConfig(**SHORT),
    "retrieval": RetrievalConfig(**SHORT, candidates=10),
}


def run(
    stage: StageName,
    model: ModelConfig,
    data: ResolvedData,
    out: Path,
    init: Path | None = None,
    watchers: Sequence[Watcher] = (),
    progress: Progress | None = None,
    **changes,
) -> Path:
    config = CONFIGS[stage].model_copy(update=changes)
    return train.run_stage(
        stage,
        model=model,
        data=data,
        config=config,
        seed=3,
        init=init,
        out=out,
        recipe_yaml="{}\n",
        store=FeatureStore(),
        progress=progress or Progress(quiet=True),
        ranks=Ranks(),
        watchers=watchers,
    )


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.mark.parametrize(("stage", "changes"), [*((stage, {}) for stage in STAGES), ("stage1", {"itc_queue": 16})])
def test_resumed_equals_uninterrupted(stage, changes, model_config, data, tmp_path, monkeypatch) -> None:
    whole = run(stage, model_config, data, tmp_path / "whole", **changes)
    step, seen = Stepper.step, []

    def dying(self, number, indices, draws):
        if number == 5 and len(seen) == 5:
            raise Killed
        seen.append(number)
        return step(self, number, indices, draws)

    monkeypatch.setattr(Stepper, "step", dying)
    with pytest.raises(Killed):
        run(stage, model_config, data, tmp_path / "cut", **changes)
    assert not (tmp_path / "cut").exists()
    cut = run(stage, model_config, data, tmp_path / "cut", **changes)
    assert seen == [0, 1, 2, 3, 4, 4, 5], "training goes on from the resume point at step 4"
    assert sha256_of(cut / "model.safetensors") == sha256_of(whole / "model.safetensors")
    assert json.loads((cut / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
    assert not (tmp_path / ".cut.partial").exists()


def test_a_run_goes_on_with_other_settings_of_the_log(model_config, data, tmp_path, monkeypatch) -> None:
    """And to the same bits; with measurements at other steps it does not go on."""
    whole = run("stage1", model_config, data, tmp_path / "whole")
    step = Stepper.step

    def dying(self, number, indices, draws):
        if number == 3:
            raise Killed
        return step(self, number, indices, draws)

    monkeypatch.setattr(Stepper, "step", dying)
    with pytest.raises(Killed):
        run("stage1", model_config, data, tmp_path / "cut")
    monkeypatch.setattr(Stepper, "step", step)
    with pytest.raises(InputError, match=r"other settings: stage1\.eval_every was 3, is now 2\. "):
        run("stage1", model_config, data, tmp_path / "cut", eval_every=2, log_every=1)
    cut = run("stage1", model_config, data, tmp_path / "cut", log_every=1, save_every=1, tensorboard=True)
    assert sha256_of(cut / "model.safetensors") == sha256_of(whole / "model.safetensors")
    assert json.loads((cut / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())
    logged = [record["step"] for record in read_journal(cut / "training.jsonl") if record["kind"] == "step"]
    assert logged == [1, 3, 4, 5, 6]


def test_long_texts_are_counted_over_kill_and_resume(model_config, world, tmp_path, monkeypatch) -> None:
    """48 rows in 6 steps of 8 are one epoch, so each row is read once: 10 have a caption of 51 words."""
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    rows = [json.loads(line) for line in (copy / "captions_train.jsonl").read_text().splitlines()]
    for row in rows[:10]:
        row["captions"] = [*row["captions"], "word " * 51]
    (copy / "captions_train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, step = resolve(DataConfig(), copy), Stepper.step

    def dying(self, number, indices, draws):
        if number == 5:
            raise Killed
        return step(self, number, indices, draws)

    monkeypatch.setattr(Stepper, "step", dying)
    with pytest.raises(Killed):
        run("stage2", model_config, data, tmp_path / "out")
    monkeypatch.setattr(Stepper, "step", step)
    told = Progress(quiet=True)
    said = list[str]()
    monkeypatch.setattr(told, "note", said.append)
    out = run("stage2", model_config, data, tmp_path / "out", progress=told)
    assert len(rows) == 48
    assert json.loads((out / "metrics.json").read_text())["cut_texts"] == 10
    assert any("10 of the 48 rows trained on" in line and "more than 50 words" in line for line in said)


def test_stages_follow_each_other_and_keep_the_text_side(model_config, data, tmp_path) -> None:
    first = run("stage1", model_config, data, tmp_path / "stage1")
    second = run("stage2", model_config, data, tmp_path / "stage2", init=first)
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert before.keys() == after.keys()
    kept = "qformer.encoder.layer.0.intermediate.dense.weight", "temperature", "itg_head.dense.weight"
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert not torch.equal(before["query_tokens"], after["query_tokens"])
    loaded = load_checkpoint(second)
    assert torch.equal(loaded.bridge.query_tokens, after["query_tokens"])


class Frozen(Watcher):
    """The bytes of everything outside the bridge, after the last step that was told."""

    def after_step(self, model: Blip2, report: StepReport) -> None:
        self.bytes = frozen_bytes(model)


def frozen_bytes(model: Blip2) -> dict[str, bytes]:
    halves = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("bridge.")}
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in halves.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_halves_do_not_change(stage, model_config, data, tmp_path) -> None:
    """Byte for byte, in memory and in their files."""
    weights = [next(Path(folder).glob("*.safetensors")) for folder in (model_config.vision, model_config.language)]
    hashes, watcher = [sha256_of(path) for path in weights], Frozen()
    checkpoint = run(stage, model_config, data, tmp_path / stage, watchers=[watcher])
    assert [sha256_of(path) for path in weights] == hashes
    model = load_checkpoint(checkpoint)
    assert len(watcher.bytes) > 30
    assert watcher.bytes == frozen_bytes(model)
    assert not any(p.requires_grad for p in [*model.vision.parameters(), *model.language_model.parameters()])


@pytest.mark.parametrize("stage", ["stage1", "stage2", "vqa"])  # caption and retrieval minimise the same
def test_loss_falls(stage, model_config, data, tmp_path) -> None:
    out = run(stage, model_config, data, tmp_path / stage, steps=60, eval_every=30, save_every=100)
    history = json.loads((out / "metrics.json").read_text())["held_out"]
    assert history[-1]["train_loss"] < 0.9 * train_loss_at_start(stage, model_config, data, tmp_path)


@pytest.mark.parametrize("loss", ["itc", "itm", "itg"])
def test_each_loss_of_stage_1_trains_alone(loss, model_config, data, tmp_path) -> None:
    off = {f"{other}_weight": 0.0 for other in ("itc", "itm", "itg") if other != loss}
    out = run("stage1", model_config, data, tmp_path / "out", steps=2, warmup_steps=1, **off)
    steps = [record for record in read_journal(out / FILE) if record["kind"] == "step"]
    assert steps
    assert {name for step in steps for name in step["losses"]} == {"loss", loss}


def train_loss_at_start(stage, model_config, data, tmp_path) -> float:
    out = run(stage, model_config, data, tmp_path / "start", steps=1, warmup_steps=0)
    return json.loads((out / "metrics.json").read_text())["held_out"][0]["train_loss"]


def test_broken_images_are_replaced_and_reported(model_config, data, world, tmp_path) -> None:
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    (copy / "images" / "train-00003.png").write_bytes(b"not a picture")
    (copy / "images" / "train-00007.png").unlink()
    moved = resolve(DataConfig(), copy)
    out = run("stage2", model_config, moved, tmp_path / "out")
    broken = json.loads((out / "metrics.json").read_text())["broken_images"]
    assert sorted(Path(path).name for path in broken) == ["train-00003.png", "train-00007.png"]
    for image in (copy / "images").glob("train-*.png"):
        image.unlink()
    with pytest.raises(DataError, match="none of the 48 images"):
        run("stage2", model_config, moved, tmp_path / "none")


def test_nan_stops_training_and_keeps_the_resume_point(model_config, data, tmp_path, monkeypatch) -> None:
    objective = plans.Stage2
    real = objective.loss
    calls = []

    def poisoned(self, model, indices, draws, ranks):
        calls.append(1)
        loss, figures = real(self, model, indices, draws, ranks)
        return (loss * float("nan") if len(calls) == 4 else loss), figures

    monkeypatch.setattr(objective, "loss", poisoned)
    with pytest.raises(TrainingFailed, match="step 4 of 6"):
        run("stage2", model_config, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "resume.pt").is_file()


def test_a_changed_half_is_refused(model_config, data, tmp_path) -> None:
    halves = tmp_path / "halves"
    shutil.copytree(Path(model_config.vision).parent, halves)
    moved = model_config.model_copy(
        update={
            "vision": str(halves / "vision"),
            "language": str(halves / "language"),
            "text_tokenizer": str(halves / "text"),
        }
    )
    out = run("stage2", moved, data, tmp_path / "out", steps=1)
    weights = next((halves / "language").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"frozen language/model.safetensors"):
        load_checkpoint(out)


def test_damaged_and_foreign_checkpoints_are_refused(model_config, data, tmp_path) -> None:
    out = run("stage2", model_config, data, tmp_path / "out", steps=1)
    weights = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(out)
    (out / "model.safetensors").write_bytes(weights)
    config = json.loads((out / "config.json").read_text())
    config["model"]["qformer"]["width"] = 16
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected shape"):
        load_checkpoint(out)
    (out / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 1, found 99"):
        load_checkpoint(out)


def test_rows_are_shuffled_epochs() -> None:
    seen = [row for step in range(10) for row in rows_at(step, 3, 15, seed=0)]
    assert sorted(seen[:15]) == sorted(seen[15:]) == list(range(15))
    assert seen[:15] != seen[15:]
    assert rows_at(4, 3, 15, seed=0) == seen[12:15]


def test_schedule_and_decay_groups(model_config) -> None:
    config = Stage1Config(**(SHORT | dict(steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)))
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    model = train.new_blip2(model_config, question_conditioned=True)
    decayed, kept = (set(map(id, group["params"])) for group in make_optimiser(model, config).param_groups)
    assert id(model.bridge.temperature) in kept
    assert id(model.bridge.query_tokens) in kept
    assert id(model.bridge.embeddings.word_embeddings.weight) in kept
    assert id(model.bridge.itm_head.weight) in decayed
    assert len(decayed) + len(kept) == len(list(model.bridge.parameters()))
