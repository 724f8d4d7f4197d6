"""Pre-training of the demo's small language models: text alone, until answers are read off the facts."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from runtime.progress import Progress
from trainer.config import DemoHalvesConfig
from trainer.demo_world.documents import (
    ANSWER_WEIGHT,
    CAPTION,
    QUESTION,
    Document,
    Lesson,
    documents,
    lesson_decoder_only,
    lesson_encoder_decoder,
)
from trainer.demo_world.language import PAGES, QuestionWriter
from trainer.demo_world.optimise import optimise
from trainer.demo_world.scene import WIDE, Split, random_scenes
from trainer.demo_world.vocabulary import train_language_tokenizer
from trainer.language import Style, style_of
from trainer.losses import IGNORED
from trainer.new_halves import new_encoder_decoder, new_language_model

EVERY, DENSE, NOTES = "every", "dense", "notes"
"""What a step may be drawn from beside one kind: all documents, those with several notes, all notes."""
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
    places = defaultdict[str, list[int]](list)
    for place, doc in enumerate(told.train):
        for kind in (doc.kind, *_groups(doc)):
            places[kind].append(place)
    among = {kind: torch.tensor(found) for kind, found in places.items()}
    order, plan = torch.Generator().manual_seed(config.seed), _plan(config, style)

    def step() -> Tensor:
        rows = among[next(plan)]
        size = config.language_batch_size if style == "decoder-only" else config.t5_batch_size
        return _loss(model, train.rows(rows[torch.randint(len(rows), (size,), generator=order)]))

    steps = config.language_steps if style == "decoder-only" else config.t5_steps
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
    asked = _lesson(model, tokenizer, [doc for doc in docs if doc.kind == QUESTION])
    logits_NTV, said_NT, weights_NT = _predict(model, asked)
    right = ((logits_NTV.argmax(-1) == said_NT) | (weights_NT != ANSWER_WEIGHT)).all(1)
    return float(right.float().mean())


def _groups(doc: Document) -> list[str]:
    """What a step may be drawn from that this document belongs to, beside its own kind."""
    found = [EVERY]
    if doc.kind not in (CAPTION, QUESTION):
        found.append(NOTES)
    if len(doc.told) > 1:
        found.append(DENSE)
    return found


def _plan(config: DemoHalvesConfig, style: Style) -> Iterator[str]:
    """Which documents each step is drawn from, endlessly.

    A decoder-only model begins with notes, then reads all kinds mixed. The encoder of an encoder-decoder learns each
    kind of note in a hundred steps when nothing else is asked, and not in a thousand among the others; and a step of
    its has one kind, for answers are short and would be padded beside captions.
    """
    if style == "decoder-only":
        yield from repeat(DENSE, config.note_steps)
        yield from repeat(EVERY)
    for page in PAGES:
        yield from repeat(page, config.t5_page_steps)
    yield from repeat(NOTES, config.t5_note_steps)
    yield from cycle((QUESTION, CAPTION, QUESTION, NOTES))


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
    return new_encoder_decoder(**common, layers=4, decoder_layers=2)


def _lesson(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, docs: Sequence[Document]) -> Lesson:
    if style_of(model) == "decoder-only":
        return lesson_decoder_only(docs, tokenizer)
    return lesson_encoder_decoder(docs, tokenizer, np.random.default_rng(CAPTION_SPLITS))


# Shape letters: N documents, S tokens read by an encoder, A places in them that are asked, T tokens said, V vocabulary
def _predict(model: PreTrainedModel, lesson: Lesson, states_NSD: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, T, V], what should have been said [N, T] and how much it counts [N, T].

    `states_NSD` is what the encoder made of the text that is read; None: it reads it now.
    """
    if lesson.read_NS is None:
        # What follows a token, pads included, never reaches it.
        return model(input_ids=lesson.said_NT).logits[:, :-1], lesson.said_NT[:, 1:], lesson.weights_NT[:, 1:]
    states_NSD = _encode(model, lesson.read_NS) if states_NSD is None else states_NSD
    said = int((lesson.weights_NT > 0).sum(1).max())
    said_NT = lesson.said_NT[:, :said]
    begun_NT = F.pad(said_NT[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    seen_NS = lesson.read_NS[:, : states_NSD.shape[1]] != model.config.pad_token_id
    logits_NTV = model(
        encoder_outputs=BaseModelOutput(states_NSD), attention_mask=seen_NS, decoder_input_ids=begun_NT
    ).logits
    return logits_NTV, said_NT, lesson.weights_NT[:, :said]


def _encode(model: PreTrainedModel, read_NS: Tensor) -> Tensor:
    """What the encoder makes of a text [N, S, D], as long as the longest."""
    seen_NS = read_NS != model.config.pad_token_id
    longest = int(seen_NS.sum(1).max())
    encoder = model.get_encoder()
    states_NSD: Tensor = encoder(input_ids=read_NS[:, :longest], attention_mask=seen_NS[:, :longest]).last_hidden_state
    return states_NSD


def _loss(model: PreTrainedModel, lesson: Lesson) -> Tensor:
    """Mean loss (nats) of what is said, by weight; of an encoder-decoder also of what its encoder was asked.

    The encoder is read with the table of embeddings, as the decoder is.
    """
    losses, states_NSD = list[Tensor](), None
    if lesson.read_NS is not None and lesson.asked_NS is not None:
        states_NSD = _encode(model, lesson.read_NS)
        asked_NS = lesson.asked_NS[:, : states_NSD.shape[1]]
        asks_NS = asked_NS != IGNORED
        if asks_NS.any():
            logits_AV = states_NSD[asks_NS] @ model.get_input_embeddings().weight.T
            losses.append(F.cross_entropy(logits_AV, asked_NS[asks_NS]))
    if lesson.weights_NT.any():
        logits_NTV, said_NT, weights_NT = _predict(model, lesson, states_NSD)
        of_token = F.cross_entropy(logits_NTV.flatten(0, 1), said_NT.flatten(), reduction="none")
        losses.append((of_token * weights_NT.flatten()).sum() / weights_NT.sum())
    return torch.stack(losses).sum()
