"""Text rules of BLIP-2's training."""

import pytest

from runtime.answers import Request
from runtime.errors import InputError
from runtime.text import MAX_WORDS, fill_prompt, normalise_caption, normalise_question, qformer_text


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


def test_a_request_brings_its_own_prompt_or_takes_the_models():
    models = {"caption": "a photo of", "vqa": "Question: {} Answer:"}
    assert Request("a.png").filled_prompt(**models) == "a photo of"
    assert Request("a.png", prompt="").filled_prompt(**models) == ""
    assert Request("a.png", "What?").filled_prompt(**models) == "Question: what? Answer:"
    assert Request("a.png", "What?", "{} In a word:").filled_prompt(**models) == "what? In a word:"
    with pytest.raises(InputError):
        Request("a.png", prompt="{}").filled_prompt(**models)


def test_what_the_qformer_reads():
    assert qformer_text("question", "What?", "Question: what? Answer:") == "what?"
    assert qformer_text("question", None, "a photo of") is None
    assert qformer_text("prompt", "What?", "Q: what? A:") == "Q: what? A:"
    assert qformer_text("prompt", None, "A Photo of") == "A Photo of", "neither lower-cased nor stripped"
