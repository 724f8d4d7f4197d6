"""Stage 2 and the VQA fine-tune: the frozen language model's loss reaches the bridge through its soft prefix.

Stage 2 sees captions only: a decoder-only model says them; an encoder-decoder reads the beginning and says the rest
(prefix language modelling, the paper's section 3.3). In the VQA fine-tune the question conditions the Q-Former (it
enters beside the queries, InstructBLIP's way, the nearest published code to the paper's section 4.3), and a share of
each batch stays captioning, so that one model keeps both skills.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from runtime.dataset import Row
from runtime.text import fill_prompt, normalise_caption, normalise_question, qformer_text
from trainer.blip2 import Blip2, text_batch
from trainer.data import ImageRows
from trainer.draws import StepDraws
from trainer.language import continuation, split_caption, takes
from trainer.losses import IGNORED, text_loss_by_row
from trainer.ranks import Ranks


# Shape letters: B pairs, N image tokens, E image width, Q queries, D language width, T text tokens, S = Q + T,
# V vocabulary
@dataclass(frozen=True)
class Target:
    """What the language model reads and what it must say."""

    prompt: str
    answer: str
    question: str | None
    """Normalised; None for a caption."""


def caption_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's captions after the caption prompt."""
    return Target(model.config.caption_prompt, normalise_caption(str(rng.choice(row.captions))), None)


def split_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's captions: its beginning is read after the caption prompt, the rest is said."""
    beginning, rest = split_caption(normalise_caption(str(rng.choice(row.captions))), rng)
    return Target(" ".join(filter(None, [model.config.caption_prompt, beginning])), rest, None)


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
    reads = model.config.qformer_reads
    texts = [qformer_text(reads, t.question, t.prompt) if model.question_conditioned else None for t in targets]
    prefix_BQD = model.query_prefix(image_embeds_BNE, *condition_tokens(model, texts))
    speak = _decoder_only if model.style == "decoder-only" else _encoder_decoder
    return text_loss_by_row(*speak(model, prefix_BQD, targets))


def condition_tokens(model: Blip2, texts: Sequence[str | None]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Q-Former ids and mask [B, T]; a row without text is wholly masked. None when no row has any."""
    if all(text is None for text in texts):
        return None, None
    batch = text_batch(model, [text or "" for text in texts])
    given_B1 = torch.tensor([[text is not None] for text in texts])
    return batch.ids, batch.mask * given_B1


def _decoder_only(model: Blip2, prefix_BQD: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Logits [B, 1 + T, V] from the last query on and labels [B, 1 + T] of a decoder-only model.

    It reads prefix, prompt (with its begin token, where the family has one), answer and end token, padded on the
    right. Without any prompt token the last query predicts the first word.
    """
    ids, labels = [], []
    for target in targets:
        read, said = continuation(model.tokenizer, target.prompt, target.answer)
        said = _ended(model, said)
        ids.append(read + said)
        labels.append([IGNORED] * (1 + len(read)) + said)
    ids_BT, mask_BT = _padded(ids, model.pad_token_id), _padded([[1] * len(row) for row in ids], 0)
    kept = 1 + ids_BT.shape[1]
    # No vocabulary-wide logits where nothing is predicted; a family that cannot leave them out computes them all.
    fewer = {"logits_to_keep": kept} if takes(model.language_model, "logits_to_keep") else {}
    logits_BTV = model.language_model(**_read(model, prefix_BQD, ids_BT, mask_BT), use_cache=False, **fewer).logits
    return logits_BTV[:, -kept:], _padded(labels, IGNORED)


def _encoder_decoder(model: Blip2, prefix_BQD: Tensor, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and labels [B, T] of an encoder-decoder: it reads prefix and prompt, and says the answer."""
    read = [list(model.tokenizer(target.prompt).input_ids) for target in targets]
    said = [_ended(model, model.tokenizer(t.answer, add_special_tokens=False).input_ids) for t in targets]
    ids_BT, mask_BT = _padded(read, model.pad_token_id), _padded([[1] * len(row) for row in read], 0)
    start = model.start_token_id
    assert start is not None, "load_language refuses an encoder-decoder without one"
    given = [[start, *row] for row in said]
    logits_BTV = model.language_model(
        **_read(model, prefix_BQD, ids_BT, mask_BT),
        decoder_input_ids=_padded(given, model.pad_token_id),  # pads come last, so nothing before them sees them
        use_cache=False,
    ).logits
    return logits_BTV, _padded([[IGNORED, *row] for row in said], IGNORED)


def _read(model: Blip2, prefix_BQD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """Embeddings [B, S, D] and mask [B, S] of prefix and tokens."""
    embeds_BTD = model.language_model.get_input_embeddings()(ids_BT)
    seen_BQ = torch.ones(prefix_BQD.shape[:2], dtype=torch.long, device=mask_BT.device)
    return {
        "inputs_embeds": torch.cat([prefix_BQD.to(embeds_BTD.dtype), embeds_BTD], dim=1),
        "attention_mask": torch.cat([seen_BQ, mask_BT], dim=1),
    }


def _ended(model: Blip2, ids: Sequence[int]) -> list[int]:
    """The tokens and the end token, within the limit."""
    return [*ids[: model.config.qformer.max_text_tokens - 1], model.end_token_ids[0]]


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """[B, T], padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long)


class CaptionObjective:
    """Stage 2 over caption rows."""

    def __init__(self, train: ImageRows) -> None:
        self.train = train

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Loss of the rows at `indices`, every row weighing the same."""
        rows, features_BNE = self.train.batch(indices, draws)
        target_of = caption_target if model.style == "decoder-only" else split_target
        targets = [target_of(model, row, draws.row(place)) for place, row in enumerate(rows)]
        return language_loss(model, features_BNE, targets), {}


class VqaObjective:
    """The VQA fine-tune over question rows, with `caption_fraction` of each batch from caption rows."""

    def __init__(self, questions: ImageRows, captions: ImageRows, caption_fraction: float) -> None:
        self.questions, self.captions, self.caption_fraction = questions, captions, caption_fraction

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch, every row weighing the same.

        Which places are captions, of rows drawn at random, depends on their number in the global batch alone, evenly
        spread: every process has about as many.
        """
        described = [place for place in range(len(indices)) if self._is_caption(draws.place(place))]
        asked = [place for place in range(len(indices)) if not self._is_caption(draws.place(place))]
        targets, features = list[Target](), list[Tensor]()
        if asked:
            rows, features_BNE = self.questions.batch([indices[place] for place in asked], draws.at(asked))
            targets += [question_target(model, row, draws.row(place)) for place, row in zip(asked, rows, strict=True)]
            features.append(features_BNE)
        if described:
            drawn = [int(draws.row(place, "row").integers(len(self.captions))) for place in described]
            rows, features_BNE = self.captions.batch(drawn, draws.at(described))
            targets += [
                caption_target(model, row, draws.row(place)) for place, row in zip(described, rows, strict=True)
            ]
            features.append(features_BNE)
        return language_loss(model, torch.cat(features), targets), {}

    def _is_caption(self, place: int) -> bool:
        """True for `caption_fraction` of any row of consecutive places, to the nearest."""
        share = self.caption_fraction
        return math.floor((place + 1) * share + 0.5) > math.floor(place * share + 0.5)
