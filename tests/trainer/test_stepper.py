"""One optimiser step: precision, parts, clipping, and a loss that is no number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.errors import InputError
from runtime.files import sha256_of
from runtime.progress import Progress
from tests.trainer.together import SHORT, Notes
from trainer import plans
from trainer.blip2 import new_blip2
from trainer.checkpoint import load_checkpoint
from trainer.config import ModelConfig, Stage2Config
from trainer.data import FeatureStore, ResolvedData
from trainer.draws import StepDraws
from trainer.guard import TrainingFailed
from trainer.ranks import Ranks
from trainer.stepper import Stepper, clip, gradient_norm, rows_per_process
from trainer.train import run_stage


class OneRow:
    """An objective whose loss, a mean over rows, is a known function of few weights."""

    def __init__(self, poison: float = 1.0) -> None:
        self.poison = poison

    def loss(self, model: Any, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        rows = torch.tensor(indices, dtype=torch.float32)
        loss = (model.bridge.query_tokens.sum() * rows).mean() * self.poison
        return loss, {"rows": float(len(indices))}


@pytest.fixture
def stepper(model_config: ModelConfig) -> Any:
    def make(objective: Any, **changes: Any) -> tuple[nn.Parameter, Stepper]:
        torch.manual_seed(0)
        model = new_blip2(model_config, question_conditioned=False)
        config = Stage2Config(**(SHORT | dict(clip_norm=0) | changes))
        return model.bridge.query_tokens, Stepper("stage2", model, objective, config, Ranks())

    return make


DRAWS = StepDraws((0, 1, 0), 0, 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_masters_stay_fp32_and_gradients_are_unscaled(precision: str, stepper: Any) -> None:
    weights, steps = stepper(OneRow(), precision=precision)
    stepped = steps.step(0, list(range(8)), DRAWS)
    assert weights.dtype == torch.float32
    assert weights.grad is not None
    assert torch.allclose(weights.grad, torch.full_like(weights, 3.5))
    assert stepped.gradient_norm == pytest.approx(3.5 * weights.numel() ** 0.5, rel=1e-4)
    assert steps.scaler.is_enabled() == (precision == "fp16")


def test_parts_have_the_gradient_of_the_whole(stepper: Any) -> None:
    whole, whole_steps = stepper(OneRow())
    parts, parts_steps = stepper(OneRow(), accumulation=4)
    whole_steps.step(0, list(range(8)), DRAWS)
    stepped = parts_steps.step(0, list(range(8)), DRAWS)
    assert torch.allclose(whole.grad, parts.grad)
    assert torch.allclose(whole, parts)
    assert stepped.figures == {"rows": 2.0}


def test_clipping(stepper: Any) -> None:
    weights, steps = stepper(OneRow(), clip_norm=1.0)
    stepped = steps.step(0, list(range(8)), DRAWS)
    assert float(weights.grad.norm()) == pytest.approx(1.0)
    assert stepped.gradient_norm == pytest.approx(3.5 * weights.numel() ** 0.5, rel=1e-4)
    small = nn.Parameter(torch.ones(2))
    small.grad = torch.tensor([0.3, 0.4])
    clip([small], gradient_norm([small]), 1.0)
    assert torch.equal(small.grad, torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_weights_are_untouched_by_a_loss_that_is_no_number(poison: float, stepper: Any) -> None:
    weights, steps = stepper(OneRow(poison))
    before = weights.detach().clone()
    assert not steps.step(0, list(range(8)), DRAWS).finite
    assert torch.equal(weights, before)


def test_an_overflow_of_fp16_is_skipped_with_a_smaller_scale(stepper: Any) -> None:
    weights, steps = stepper(OneRow(1e35), precision="fp16")
    before, scale = weights.detach().clone(), steps.scaler.get_scale()
    stepped = steps.step(0, list(range(8)), DRAWS)
    assert stepped.finite
    assert torch.equal(weights, before)
    assert steps.scaler.get_scale() == scale / 2


def test_a_batch_that_does_not_divide_is_refused() -> None:
    ranks = Ranks()
    ranks.count = 2
    config = Stage2Config(**(SHORT | dict(batch_size=6, accumulation=2)))
    with pytest.raises(InputError, match=r"stage2.batch_size: expected a multiple of 2 processes x 2 parts .* found 6"):
        rows_per_process("stage2", config, ranks)


def train(model: ModelConfig, data: ResolvedData, out: Path, **changes: Any) -> list[dict[str, Any]]:
    notes = Notes()
    run_stage(
        "stage2",
        model=model,
        data=data,
        config=Stage2Config(**(SHORT | changes)),
        seed=3,
        init=None,
        out=out,
        recipe_yaml="{}\n",
        store=FeatureStore(),
        progress=Progress(quiet=True),
        ranks=Ranks(),
        watchers=[notes],
    )
    return notes.steps


def test_a_failed_step_leaves_a_checkpoint_its_images_and_a_resume_point(
    model_config: ModelConfig, data: ResolvedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = plans.Stage2.loss, list[int]()

    def poisoned(self: Any, *arguments: Any) -> tuple[Tensor, dict[str, float]]:
        calls.append(1)
        loss, figures = real(self, *arguments)
        return (loss * float("nan") if len(calls) == 4 else loss), figures

    monkeypatch.setattr(plans.Stage2, "loss", poisoned)
    with pytest.raises(TrainingFailed, match=r"the loss is nan at step 4 of 4.*nothing is lost"):
        train(model_config, data, tmp_path / "out", save_every=100)
    failed = tmp_path / "stage2-failed-at-step-4"
    ids = json.loads((failed / "failure.json").read_text())["image_ids_by_process"]
    assert len(ids[0]) == 8
    assert all(name.startswith("train-") for name in ids[0])
    load_checkpoint(failed)
    after = train(model_config, data, tmp_path / "out", save_every=100)  # the poison is gone: the step is tried again
    assert [step["step"] for step in after] == [4]
    whole = train(model_config, data, tmp_path / "whole", save_every=100)
    assert whole[3]["loss"] == after[0]["loss"]
    assert sha256_of(tmp_path / "out/model.safetensors") == sha256_of(tmp_path / "whole/model.safetensors")


@pytest.mark.slow
def test_compiled_halves_learn_the_same(
    model_config: ModelConfig, data: ResolvedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two frozen halves, and nothing else, go through torch.compile (its tracer; the code generator is torch's)."""
    compiled = list[str]()
    compile_in_place = nn.Module.compile

    def tracing(self: nn.Module) -> None:
        compiled.append(type(self).__name__)
        compile_in_place(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", tracing)
    plain = train(model_config, data, tmp_path / "plain", steps=2)
    traced = train(model_config, data, tmp_path / "traced", steps=2, compile=True)
    assert compiled == ["CLIPVisionModel", "OPTForCausalLM"]
    assert [step["loss"] for step in traced] == pytest.approx([step["loss"] for step in plain], abs=1e-5)


def test_a_half_is_not_shared_out_by_one_process(model_config: ModelConfig, data: ResolvedData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stage2.shard: expected several processes .* found one; .* torchrun"):
        train(model_config, data, tmp_path / "out", shard=("language",))
