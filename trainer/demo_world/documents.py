"""What the demo's language halves read in pre-training: the facts of one scene, then what follows from them.

Both kinds of model are told the same documents. A decoder-only one reads a document from its beginning to its end. An
encoder-decoder reads facts and question in its encoder, as it later reads image prefix and prompt, and says the answer
in its decoder; of a caption it says all or, half the time, what follows a word before its midpoint. Notes are for the
encoder alone: what it makes of "the star" behind the facts is compared with what follows, eight times in a document.
Told through the decoder they taught the decoder to look up, and the encoder nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trainer.demo_world.language import QuestionWriter, caption, facts, notes
from trainer.demo_world.scene import WIDE, Scene
from trainer.language import split_caption
from trainer.losses import IGNORED

Number = TypeVar("Number", int, float)

DOCUMENT_TOKENS = 54
"""What is read is cut here; notes fill up what the facts leave."""
SAID_TOKENS = 32
"""What an encoder-decoder says is cut here."""
QUESTIONS = 4
"""Questions asked about one scene, each in a document of its own."""
NOTES = 8
"""Most notes in one document."""
CAPTION, QUESTION = "caption", "question"
"""Kinds of documents that are no notes."""
OPEN_WEIGHT, ANSWER_WEIGHT = 0.1, 4.0
"""Weight of a token the facts do not decide (facts, wording of questions) and of an answer; what else is told has 1."""


@dataclass(frozen=True)
class Document:
    """One scene as text: its facts, then what a reader of the facts can say."""

    facts: str
    told: tuple[tuple[str, str], ...]
    """(what is given, what follows from it and the facts); nothing is given for a caption."""
    kind: str
    """`CAPTION`, `QUESTION` or a page of `language.notes`."""
    weight: float = 1.0
    """How much a token of what follows counts."""

    def texts(self) -> list[str]:
        """Everything in it, for a tokenizer to learn from."""
        return [self.facts, *(given + said for given, said in self.told)]


def documents(scene: Scene, writer: QuestionWriter, rng: np.random.Generator, prompt: str) -> list[Document]:
    """Short documents about a scene: a caption, questions one by one, and notes.

    The notes ("the star blue small", "the stars: 2") are there for density: a dozen words in one document that only a
    look into the facts decides. The model begins with them alone; without them it guesses among the colours it sees
    for thousands of steps.
    """
    told = facts(scene)
    made = [Document(told, (("", caption(scene)),), CAPTION)]
    for question in writer.ask(scene, QUESTIONS):
        told_answer = ((prompt.format(question.text), f" {question.answer}"),)
        made.append(Document(told, told_answer, QUESTION, ANSWER_WEIGHT))
    if len(scene.objects) > 1:
        for kind, page in notes(scene, rng, WIDE).items():
            said = [note for i in rng.permutation(len(page)) for note in page[i]]
            made.append(Document(told, tuple(said[:NOTES]), kind))
    return made


# Shape letters: N documents, S tokens read by an encoder, T tokens said
@dataclass(frozen=True)
class Lesson:
    """Documents as tokens, padded on the right to one length."""

    said_NT: Tensor
    weights_NT: Tensor
    """How much each token said counts: what the facts decide counts more than what they do not, padding nothing."""
    read_NS: Tensor | None = None
    """What an encoder reads; None for a decoder-only model."""
    asked_NS: Tensor | None = None
    """What follows in truth where a question or the beginning of a note ends in it; elsewhere `IGNORED`."""

    def rows(self, places: Tensor) -> "Lesson":
        """The documents at `places`."""
        read, asked = (None if part is None else part[places] for part in (self.read_NS, self.asked_NS))
        return Lesson(self.said_NT[places], self.weights_NT[places], read, asked)


def lesson_decoder_only(docs: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> Lesson:
    """Each document from beginning to end; every text in it begins with </s>."""
    ids, weights = list[list[int]](), list[list[float]]()
    text_ids, said_ids = _ids(tokenizer, special=True), _ids(tokenizer, special=False)
    for doc in docs:
        row = text_ids(doc.facts)
        counts = [OPEN_WEIGHT] * len(row)
        for given, said in doc.told:
            heard, spoken = text_ids(given), said_ids(said)
            row += heard + spoken
            counts += [OPEN_WEIGHT] * len(heard) + [doc.weight] * len(spoken)
        ids.append([*row, tokenizer.eos_token_id])
        weights.append([*counts, 1.0])
    return Lesson(_padded(ids, DOCUMENT_TOKENS, tokenizer.pad_token_id), _padded(weights, DOCUMENT_TOKENS, 0.0))


def lesson_encoder_decoder(
    docs: Sequence[Document], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> Lesson:
    """Facts and what is given are read, what follows is said; of notes nothing is: they are asked of the encoder."""
    read, asked, ids, weights = list[list[int]](), list[list[int]](), list[list[int]](), list[list[float]]()
    ids_of = _ids(tokenizer, special=False)
    for doc in docs:
        heard, spoken = ids_of(doc.facts), list[int]()
        follows = [IGNORED] * len(heard)
        for given, said in doc.told:
            if not given and rng.random() < 0.5:
                given, said = split_caption(said, rng)
            before, spoken = ids_of(given.strip()), ids_of(said.strip())
            heard += before
            follows += [*[IGNORED] * (len(before) - 1), spoken[0]] if doc.kind != CAPTION else [IGNORED] * len(before)
        says = doc.kind in (CAPTION, QUESTION)
        read.append([*heard, tokenizer.eos_token_id])
        asked.append([*follows, IGNORED])
        ids.append([*spoken, tokenizer.eos_token_id] if says else [])
        weights.append([*[doc.weight] * len(spoken), 1.0] if says else [])
    pad = tokenizer.pad_token_id
    return Lesson(
        said_NT=_padded(ids, SAID_TOKENS, pad),
        weights_NT=_padded(weights, SAID_TOKENS, 0.0),
        read_NS=_padded(read, DOCUMENT_TOKENS, pad),
        asked_NS=_padded(asked, DOCUMENT_TOKENS, IGNORED),
    )


def _ids(tokenizer: PreTrainedTokenizerFast, special: bool) -> Callable[[str], list[int]]:
    """Text → ids, looked up where the text was met before: most notes and answers come a thousand times."""
    coded = cache(lambda text: tuple(tokenizer(text, add_special_tokens=special).input_ids))
    return lambda text: list(coded(text))


def _padded(rows: Sequence[Sequence[Number]], length: int, filler: Number) -> Tensor:
    """[N, length], cut or padded on the right."""
    filled = (list(row[:length]) + [filler] * (length - len(row)) for row in rows)
    return torch.tensor(list(filled))
