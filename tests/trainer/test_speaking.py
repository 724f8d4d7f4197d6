"""Objectives that speak: the head sees only what predicts, and contrast beside the language model's loss."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from runtime.dataset import Row
from runtime.text import normalise_caption
from tests.families import write_family
from trainer.blip2 import Blip2, new_blip2, text_batch
from trainer.config import ModelConfig, Stage2Config, VqaConfig
from trainer.draws import StepDraws
from trainer.generative import language_loss
from trainer.ranks import Ranks
from trainer.speaking import Stage2, VqaObjective
from trainer.targets import Target, caption_target

TARGETS = [
    Target("Question: what is it? Answer:", "a circle", "what is it?"),
    Target("", "a small red circle above two large blue squares", None),
]


class Rows:
    """Stands for `ImageRows`: rows with features at hand."""

    def __init__(self, rows: list[Row], features_BNE: torch.Tensor) -> None:
        self.rows, self.features_BNE = rows, features_BNE

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: list[int], draws: StepDraws | None) -> tuple[list[Row], torch.Tensor]:
        return [self.rows[index] for index in indices], self.features_BNE[list(indices)]


def captioned(*captions: str) -> list[Row]:
    return [Row(Path(f"{i}.png"), str(i), (caption,), None, (), {}) for i, caption in enumerate(captions)]


@pytest.mark.parametrize("family", ["opt", "t5"])
@torch.no_grad()
def test_the_head_sees_the_positions_that_predict_and_no_other(
    family: str, model_config: ModelConfig, tmp_path: Path
) -> None:
    model = new_blip2(write_family(family, model_config, tmp_path), question_conditioned=True).eval()
    seen = list[tuple[int, ...]]()
    head = model.language_model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, given, out: seen.append(tuple(out.shape)))
    language_loss(model, torch.randn(2, 17, 32), TARGETS)
    watch.remove()
    texts = [f" {t.answer}" if t.prompt and family == "opt" else t.answer for t in TARGETS]
    said = sum(len(model.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts)
    assert seen == [(said, model.language_model.config.vocab_size)]
    assert not head._forward_pre_hooks, "nothing is left on the frozen model"


def test_contrast_beside_the_language_loss(model_config: ModelConfig) -> None:
    """Against torch's cross entropy over cosines by hand; its gradient reaches the text side, as speech never does."""
    torch.manual_seed(0)
    model = new_blip2(model_config, question_conditioned=False).eval()
    texts = ("a red circle", "two blue squares", "a green star")
    rows = Rows(captioned(*texts), torch.randn(3, 17, 32))
    config = Stage2Config(itc_weight=0.5, label_smoothing=0.1)
    draws = StepDraws((0, 1, 0), first=0, rows=3)
    loss, figures = Stage2(config, rows).loss(model, [0, 1, 2], draws, Ranks())
    alone, none = Stage2(Stage2Config(), rows).loss(model, [0, 1, 2], draws, Ranks())
    assert none == {}
    assert figures["lm"] == pytest.approx(float(alone.detach()))
    bridge, tokens = model.bridge, text_batch(model, [normalise_caption(text) for text in texts])
    keys = bridge.image_keys(bridge.post_layernorm(rows.features_BNE))
    cosines = (bridge.image_features(keys, 3) @ bridge.text_features(tokens.ids, tokens.mask).T).amax(1) / 0.07
    own = torch.arange(3)
    both = [F.cross_entropy(logits, own, label_smoothing=0.1) for logits in (cosines, cosines.T)]
    torch.testing.assert_close(loss - alone, 0.5 * sum(both) / 2, atol=1e-5, rtol=0)
    text_side = bridge.text_projection.weight
    assert torch.autograd.grad(alone, text_side, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(loss, text_side)[0].any()


def test_dialogues_and_questions_share_a_batch(model_config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = new_blip2(model_config, question_conditioned=True).eval()
    asked = Row(Path("a.png"), "a", (), "What is it?", ("a circle",), {})
    talked = Row(Path("b.png"), "b", (), None, (), {}, turns=(("What colour?", "Red, I think."),))
    features = torch.randn(2, 17, 32)
    objective = VqaObjective(Rows([asked, talked], features), Rows(captioned("a star"), features), 0.0, 64)
    loss, _ = objective.loss(model, [0, 1], StepDraws((0, 2, 0), first=0, rows=2), Ranks())
    targets = [
        Target("Question: what is it? Answer:", "a circle", "what is it?"),
        Target("Question: what colour? Answer:", "Red, I think.", "what colour?", VqaConfig().dialogue_tokens),
    ]
    torch.testing.assert_close(loss, language_loss(model, features, targets))


def test_language_dropout_is_on_when_asked_and_only_in_training(model_config: ModelConfig) -> None:
    def trained(**changes: bool) -> Blip2:
        model = new_blip2(model_config, question_conditioned=False)
        model.prepare(Stage2Config(**changes))
        return model.train()

    assert not trained().language_model.training
    model = trained(language_dropout=True)
    assert model.language_model.training
    assert not model.vision.training
    assert not model.eval().language_model.training
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert caption_target(model, captioned("A red circle.")[0], StepDraws((0,), 0, 1).row(0)).answer == "a red circle"
