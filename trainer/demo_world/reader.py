"""Pre-training of the demo's small language models: text alone, until answers are read off the facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from runtime.progress import Progress
from trainer.config import DemoHalvesConfig
from trainer.demo_world.documents import (
    ANSWER_WEIGHT,
    Document,
    Lesson,
    documents,
    lesson_decoder_only,
    lesson_encoder_decoder,
)
from trainer.demo_world.language import QuestionWriter
from trainer.demo_world.optimise import optimise
from trainer.demo_world.scene import WIDE, Split, random_scenes
from trainer.demo_world.vocabulary import train_language_tokenizer
from trainer.language import Style, style_of
from trainer.new_halves import new_encoder_decoder, new_language_model

CAPTION_SPLITS = 1
"""Seed of where an encoder-decoder is given captions' beginnings."""
HELD_SCENES = 128
"""Val-split scenes that the models are asked about at the end."""


@dataclass(frozen=True)
class Told:
    """Documents of the train and the val split."""

    train: list[Document]
    held: list[Document]

    def texts(self) -> list[str]:
        """What tokenizers learn from."""
        return [text for doc in self.train for text in doc.texts()]


def tell(config: DemoHalvesConfig, prompt: str) -> Told:
    """The documents of the language models, the same for each; `prompt` is how questions are put."""
    rng, writer = np.random.default_rng(config.seed), QuestionWriter(config.seed, WIDE)

    def written(scenes_told: int, split: Split) -> list[Document]:
        scenes = random_scenes(scenes_told, split, config.seed + 2000, WIDE)
        return [doc for scene in scenes for doc in documents(scene, writer, rng, prompt)]

    return Told(written(config.told_scenes, "train"), written(HELD_SCENES, "val"))


def pretrain_language(
    config: DemoHalvesConfig, told: Told, style: Style, out: Path, progress: Progress
) -> dict[str, float]:
    """Train tokenizer and model, save them in `out`; returns held-out weighted loss and answers read off the facts."""
    torch.manual_seed(config.seed)
    tokenizer = train_language_tokenizer(told.texts(), style)
    model = _blank_model(style, tokenizer)
    train = _lesson(model, tokenizer, told.train)
    steps, note_steps, size = (
        (config.language_steps, config.note_steps, config.language_batch_size)
        if style == "decoder-only"
        else (config.t5_steps, config.t5_note_steps, config.t5_batch_size)
    )
    every, (notes, questions, others) = torch.arange(len(told.train)), _kinds(told.train)
    mixed = [every] if style == "decoder-only" else [notes, questions, others]
    shares = torch.tensor([float(len(places)) for places in mixed])
    order, of_kind = (torch.Generator().manual_seed(config.seed) for _ in range(2))
    taken = count()

    def step() -> Tensor:
        kind = int(torch.multinomial(shares, 1, generator=of_kind))
        among = notes if next(taken) < note_steps else mixed[kind]
        return _loss(model, train.rows(among[torch.randint(len(among), (size,), generator=order)]))

    optimise([model], step, steps, config.language_learning_rate, progress, f"{style} language model")
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float().eval()
    with torch.no_grad():
        loss = float(_loss(model, _lesson(model, tokenizer, told.held)))
    answers = answers_read_off(model, tokenizer, told.held)
    return {"weighted_loss_nats": round(loss, 4), "answers_read_off_context": round(answers, 4)}


@torch.no_grad()
def answers_read_off(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, docs: Sequence[Document]) -> float:
    """Share of the questions among `docs` whose answer is the model's first choice after facts and question."""
    asked = _lesson(model, tokenizer, [doc for doc in docs if doc.weight == ANSWER_WEIGHT])
    logits_NTV, said_NT, weights_NT = _predict(model, asked)
    right = ((logits_NTV.argmax(-1) == said_NT) | (weights_NT != ANSWER_WEIGHT)).all(1)
    return float(right.float().mean())


def _kinds(docs: Sequence[Document]) -> tuple[Tensor, Tensor, Tensor]:
    """Places of documents with several notes, of questions, and of the others.

    An encoder-decoder takes a step over one kind: questions have short answers, and beside notes they would be padded.
    """
    notes = torch.tensor([len(doc.told) > 1 for doc in docs])
    questions = torch.tensor([doc.weight == ANSWER_WEIGHT for doc in docs])
    return notes.nonzero()[:, 0], questions.nonzero()[:, 0], (~notes & ~questions).nonzero()[:, 0]


def _blank_model(style: Style, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    common = {
        "vocabulary": len(tokenizer),
        "width": 128,
        "heads": 4,
        "end": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    if style == "decoder-only":
        return new_language_model(**common, layers=4, positions=256)
    return new_encoder_decoder(**common, layers=3, decoder_layers=3)


def _lesson(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, docs: Sequence[Document]) -> Lesson:
    if style_of(model) == "decoder-only":
        return lesson_decoder_only(docs, tokenizer)
    return lesson_encoder_decoder(docs, tokenizer, np.random.default_rng(CAPTION_SPLITS))


# Shape letters: N documents, S tokens read by an encoder, T tokens said, V vocabulary
def _predict(model: PreTrainedModel, lesson: Lesson) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, T, V], what should have been said [N, T] and how much it counts [N, T]."""
    if lesson.read_NS is None:
        # What follows a token, pads included, never reaches it.
        return model(input_ids=lesson.said_NT).logits[:, :-1], lesson.said_NT[:, 1:], lesson.weights_NT[:, 1:]
    seen_NS = lesson.read_NS != model.config.pad_token_id
    read, said = int(seen_NS.sum(1).max()), int((lesson.weights_NT > 0).sum(1).max())
    said_NT = lesson.said_NT[:, :said]
    begun_NT = F.pad(said_NT[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    logits_NTV = model(
        input_ids=lesson.read_NS[:, :read], attention_mask=seen_NS[:, :read], decoder_input_ids=begun_NT
    ).logits
    return logits_NTV, said_NT, lesson.weights_NT[:, :said]


def _loss(model: PreTrainedModel, lesson: Lesson) -> Tensor:
    """Mean loss (nats) of what is said, by weight."""
    logits_NTV, said_NT, weights_NT = _predict(model, lesson)
    losses = F.cross_entropy(logits_NTV.flatten(0, 1), said_NT.flatten(), reduction="none")
    return (losses * weights_NT.flatten()).sum() / weights_NT.sum()
