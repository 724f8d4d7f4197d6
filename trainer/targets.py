"""What the language model reads and what it must say, for a row of data: captions, beginnings of captions, questions,
turns of a dialogue. Every draw comes from the row's own generator.
"""

from dataclasses import dataclass

import numpy as np

from runtime.dataset import Row
from runtime.text import fill_prompt, normalise_caption, normalise_question, with_history
from trainer.blip2 import Blip2
from trainer.language import split_caption


@dataclass(frozen=True)
class Target:
    """One text to learn."""

    prompt: str
    answer: str
    question: str | None
    """Normalised; None for a caption."""
    longest: int | None = None
    """Most tokens of the answer with its end token; None: as many as the Q-Former reads."""


def caption_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's captions after the caption prompt."""
    return Target(model.config.caption_prompt, normalise_caption(str(rng.choice(row.captions))), None)


def split_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's captions: its beginning is read after the caption prompt, the rest is said."""
    beginning, rest = split_caption(normalise_caption(str(rng.choice(row.captions))), rng)
    return Target(" ".join(filter(None, [model.config.caption_prompt, beginning])), rest, None)


def question_target(model: Blip2, row: Row, rng: np.random.Generator) -> Target:
    """One of the row's answers after the question prompt.

    VQAv2's soft targets: of ten annotators' answers one is drawn each time, so an answer weighs as much as annotators
    gave it.
    """
    question = normalise_question(row.question or "")
    return Target(
        fill_prompt(model.config.vqa_prompt, question), normalise_caption(str(rng.choice(row.answers))), question
    )


def turn_target(model: Blip2, row: Row, rng: np.random.Generator, prompt_tokens: int) -> Target:
    """One turn of the row's dialogue, drawn evenly: its answer after the turns before it and its question.

    The prompt is the one that `runtime.chat` writes, and like there the Q-Former is given the last question alone, and
    the oldest turns are left out, whole, when the prompt is longer than `prompt_tokens`. The answer keeps its letters
    and marks, as the history shows it.
    """
    place = int(rng.integers(len(row.turns)))
    question, answer = row.turns[place]
    template = model.config.vqa_prompt
    own = fill_prompt(template, question)
    dropped = 0
    prompt = with_history(row.turns[:place], template, own)
    while dropped < place and len(model.tokenizer(prompt).input_ids) > prompt_tokens:
        dropped += 1
        prompt = with_history(row.turns[dropped:place], template, own)
    return Target(prompt, " ".join(answer.split()), normalise_question(question), model.config.max_new_tokens)
