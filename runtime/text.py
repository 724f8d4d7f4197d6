"""Text as the model reads it: the same rules when training and when serving.

The rules are those BLIP-2 was trained with (LAVIS text processors; reference/training.md §1.13).
"""

from typing import Literal

from runtime.errors import InputError

QFormerReads = Literal["question", "prompt"]
"""Which text a conditioned Q-Former is given."""

MAX_WORDS = 50
"""Longer captions and questions are cut here, as in the published training."""

PUNCTUATION = '.!"()*#:;~'
"""Removed from captions and questions; the comma, the question mark and the apostrophe stay."""

_TO_SPACE = str.maketrans(dict.fromkeys(PUNCTUATION, " "))
_TO_NOTHING = str.maketrans("", "", PUNCTUATION)


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


def qformer_text(reads: QFormerReads, question: str | None, prompt: str) -> str | None:
    """What a conditioned Q-Former reads beside the image; None for nothing.

    `question`: the bare question, normalised; nothing for a caption. `prompt`: the language model's filled prompt as
    it stands, for captions too (InstructBLIP's habit).
    """
    if reads == "prompt":
        return prompt
    return None if question is None else normalise_question(question)
