"""Text as the model reads it: the same rules when training and when serving.

The rules are those BLIP-2 was trained with (LAVIS text processors; reference/training.md §1.13).
"""

import re
from collections.abc import Iterable
from typing import Literal

from runtime.errors import InputError

QFormerReads = Literal["question", "prompt"]
"""Which text a conditioned Q-Former is given."""

MAX_WORDS = 50
"""Longer captions and questions are cut here, as in the published training."""

PUNCTUATION = '.!"()*#:;~'
"""Removed from captions and questions; the comma, the question mark and the apostrophe stay."""

MAX_CHARACTERS = 100_000
"""Of a prompt or question: no language model reads so many, and to tokenise gigabytes only to say so takes minutes."""

_NOT_TEXT = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f\\ud800-\\udfff]")
_TO_SPACE = str.maketrans(dict.fromkeys(PUNCTUATION, " "))
_TO_NOTHING = str.maketrans("", "", PUNCTUATION)


def require_text(text: str, name: str) -> None:
    """Whether a prompt or question of a request is text; `name` is what it is called in the error.

    Tabs and line ends are text. Other control characters are refused: BERT's tokenizer drops them and a byte-level one
    spells them out, so the Q-Former and the language model would read two different texts, and no model was trained
    on any. Half a surrogate pair is what Python makes of bytes that are not UTF-8; no tokenizer takes one.

    Raises:
        InputError: no text, too long, with a control character, or not UTF-8.
    """
    if not isinstance(text, str):
        raise InputError(f"{name}: expected text, found {type(text).__name__}")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{name}: expected at most {MAX_CHARACTERS:,} characters, found {len(text):,}; shorten it")
    found = _NOT_TEXT.search(text)
    if found is None:
        return
    place, code = found.start() + 1, ord(found[0])
    if code >= 0xD800:
        raise InputError(f"{name}: expected UTF-8, found other bytes at character {place}; write it in UTF-8")
    raise InputError(f"{name}: expected text, found the control character U+{code:04X} at {place}; remove it")


def is_text(text: str) -> bool:
    """Whether `require_text` lets it pass."""
    return len(text) <= MAX_CHARACTERS and _NOT_TEXT.search(text) is None


def normalise_caption(caption: str) -> str:
    """Lower-case, punctuation replaced by spaces, single spaces, at most 50 words."""
    return _words(caption.lower().translate(_TO_SPACE))


def normalise_question(question: str) -> str:
    """Lower-case, punctuation removed, single spaces, at most 50 words."""
    return _words(question.lower().translate(_TO_NOTHING))


def _words(text: str) -> str:
    return " ".join(text.split()[:MAX_WORDS])


def fill_prompt(template: str, question: str | None) -> str:
    """The language model's prompt: the template itself for a caption, else its one `{}` filled with the question.

    Raises:
        InputError: a caption template with `{}`, a question template without exactly one, a question without words.
    """
    places = template.count("{}")
    if question is None:
        if places:
            raise InputError(f"prompt: expected no '{{}}' in a caption prompt, found {template!r}; give a question too")
        return template
    if places != 1:
        raise InputError(f"prompt: expected exactly one '{{}}' for the question, found {places} in {template!r}")
    words = normalise_question(question)
    if not words:
        raise InputError(f"question: expected words, found {question!r}")
    return template.replace("{}", words)


def with_history(turns: Iterable[tuple[str, str]], template: str, own_prompt: str) -> str:
    """The prompt of a question behind earlier ones, as LAVIS's BLIP-2 chat writes it; `turns` the oldest first.

    Question: what is it? Answer: a circle. Question: which colour? Answer:
    """
    said = [f"{fill_prompt(template, question).rstrip()} {' '.join(answer.split())}" for question, answer in turns]
    return " ".join([*(turn if turn.endswith((".", "!", "?")) else f"{turn}." for turn in said), own_prompt])


def qformer_text(reads: QFormerReads, question: str | None, prompt: str) -> str | None:
    """What a conditioned Q-Former reads beside the image; None for nothing.

    `question`: the bare question, normalised; nothing for a caption. `prompt`: the language model's filled prompt as
    it stands, for captions too (InstructBLIP's habit).
    """
    if reads == "prompt":
        return prompt
    return None if question is None else normalise_question(question)
