"""Text rules of BLIP-2's training."""

import pytest

from runtime.errors import InputError
from runtime.text import MAX_WORDS, fill_prompt, normalise_caption, normalise_question


def test_captions():
    assert normalise_caption('  A "red" circle,\n left-of#a (blue)~square!! ') == "a red circle, left-of a blue square"
    assert normalise_caption("one two " * 40).split() == ["one", "two"] * (MAX_WORDS // 2)


def test_questions_keep_the_mark_and_close_the_gap():
    assert normalise_question(" What's  the U.S.A. (colour)? ") == "what's the usa colour?"
    assert len(normalise_question("why " * 60).split()) == MAX_WORDS


def test_prompts():
    assert fill_prompt("a photo of", None) == "a photo of"
    assert fill_prompt("", None) == ""
    assert fill_prompt("Question: {} Answer:", "What {}?") == "Question: what {}? Answer:"
    for template, question in (("{}", None), ("no place", "why"), ("{} {}", "why"), ("{}", " ..")):
        with pytest.raises(InputError):
            fill_prompt(template, question)
