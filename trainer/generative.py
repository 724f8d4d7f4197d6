"""Stage 2 and the VQA fine-tune: the frozen language model's loss reaches the bridge through its soft prefix.

Stage 2 sees captions only. In the VQA fine-tune the question conditions the Q-Former (it enters beside the
queries, InstructBLIP's way, the nearest published code to the paper's section 4.3), and a share of each batch
stays captioning, so that one model keeps both skills.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.dataset import Row
from runtime.text import fill_prompt, normalise_caption, normalise_question
from trainer.blip2 import Blip2, text_batch
from trainer.data import ImageRows
from trainer.losses import IGNORED, text_loss_by_row


# Shape letters: B pairs, N image tokens, E image width, Q queries, D language width, T text tokens
@dataclass(frozen=True)
class Target:
    """What the language model reads and what it must say."""

    prompt: str
    answer: str
    question: str | None
    """Given to the Q-Former; None for a caption."""


def caption_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's captions after the caption prompt."""
    return Target(model.config.caption_prompt, normalise_caption(str(rng.choice(row.captions))), None)


def question_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's answers after the question prompt; frequent ones are drawn more often (VQAv2 soft targets)."""
    question = normalise_question(row.question or "")
    return Target(
        fill_prompt(model.config.vqa_prompt, question), normalise_caption(str(rng.choice(row.answers))), question
    )


def language_loss(model: Blip2, features_BNE: Tensor, targets: Sequence[Target]) -> Tensor:
    """Loss (nats per token, rows weighing the same) of the answers and their end tokens.

    Prefix and prompt are read, not predicted. A text longer than the limit is cut before its end token is added
    (LAVIS loses the end token).
    """
    image_embeds_BNE = model.bridge.post_layernorm(features_BNE)
    prefix_BQD = model.query_prefix(image_embeds_BNE, *question_tokens(model, [t.question for t in targets]))
    ids_BT, mask_BT, labels_BT = _language_tokens(model, targets)
    embeds_BTD = model.language_model.get_input_embeddings()(ids_BT)
    seen_BQ = torch.ones(prefix_BQD.shape[:2], dtype=torch.long, device=mask_BT.device)
    logits_BTV = model.language_model(
        inputs_embeds=torch.cat([prefix_BQD.to(embeds_BTD.dtype), embeds_BTD], dim=1),
        attention_mask=torch.cat([seen_BQ, mask_BT], dim=1),
        logits_to_keep=ids_BT.shape[1],  # no vocabulary-wide logits where nothing is predicted
        use_cache=False,
    ).logits
    return text_loss_by_row(logits_BTV, labels_BT)


def question_tokens(model: Blip2, questions: Sequence[str | None]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Q-Former ids and mask [B, T]; a caption row is wholly masked, which equals no text. None for captions alone."""
    if all(question is None for question in questions):
        return None, None
    texts = text_batch(model, [question or "" for question in questions])
    asked_B1 = torch.tensor([[question is not None] for question in questions])
    return texts.ids, texts.mask * asked_B1


def _language_tokens(model: Blip2, targets: Sequence[Target]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and labels [B, T]: begin token and prompt, then answer and end token."""
    tokenizer, limit = model.tokenizer, model.config.qformer.max_text_tokens
    ids, labels = [], []
    for target in targets:
        prompt = tokenizer(target.prompt).input_ids
        answer = f" {target.answer}" if target.prompt else target.answer
        said = [*tokenizer(answer, add_special_tokens=False).input_ids[: limit - 1], model.end_token_id]
        ids.append(prompt + said)
        labels.append([IGNORED] * len(prompt) + said)
    length = max(map(len, ids))
    pad = tokenizer.pad_token_id

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    return padded(ids, pad), padded([[1] * len(row) for row in ids], 0), padded(labels, IGNORED)


class CaptionObjective:
    """Stage 2 over caption rows."""

    def __init__(self, train: ImageRows) -> None:
        self.train = train

    def loss(self, model: Blip2, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of the rows at `indices`."""
        rows, features_BNE = self.train.batch(indices)
        return language_loss(model, features_BNE, [caption_target(model, row, rng) for row in rows]), {}


class VqaObjective:
    """The VQA fine-tune over question rows, with `caption_fraction` of each batch from caption rows."""

    def __init__(self, questions: ImageRows, captions: ImageRows, caption_fraction: float) -> None:
        self.questions, self.captions, self.caption_fraction = questions, captions, caption_fraction

    def loss(self, model: Blip2, indices: list[int], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch; its last `caption_fraction` are captions of rows drawn at random."""
        described = round(len(indices) * self.caption_fraction)
        rows, features_BNE = self.questions.batch(indices[: len(indices) - described])
        targets = [question_target(model, row, rng) for row in rows]
        if described:
            caption_rows, caption_BNE = self.captions.batch(
                [int(i) for i in rng.integers(len(self.captions), size=described)]
            )
            targets += [caption_target(model, row, rng) for row in caption_rows]
            features_BNE = torch.cat([features_BNE, caption_BNE])
        return language_loss(model, features_BNE, targets), {}
