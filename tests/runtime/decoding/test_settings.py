"""What cannot be asked is one sentence that says what to do."""

from typing import Any

import numpy as np
import pytest

from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from runtime.manifest import Limits
from runtime.stopwatch import Stopwatch
from tests.runtime.decoding.family import NEW_TOKENS, Family


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_beams": 0}, "num_beams: expected a whole number of at least 1, found 0"),
        ({"num_beams": 2.0}, "num_beams: expected a whole number of at least 1, found 2.0"),
        ({"num_return_sequences": True}, "num_return_sequences: expected a whole number of at least 1, found True"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: expected a whole number of at least 0, found -1"),
        ({"min_new_tokens": -3}, "min_new_tokens: expected a whole number of at least 0, found -3"),
        ({"do_sample": True, "top_k": -1}, "top_k: expected a whole number of at least 0, found -1"),
        ({"do_sample": True, "seed": -1}, "seed: expected a whole number of at least 0, found -1"),
        ({"do_sample": True, "temperature": 0.0}, "temperature: expected a number from 0.001 to 1000, found 0.0"),
        (
            {"do_sample": True, "temperature": float("nan")},
            "temperature: expected a number from 0.001 to 1000, found nan",
        ),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number from 0.001 to 1000, found 0"),
        ({"do_sample": True, "top_p": 0}, "top_p: expected a number above 0 and at most 1, found 0"),
        ({"do_sample": True, "top_p": 1.1}, "top_p: expected a number above 0 and at most 1, found 1.1"),
        (
            {"num_beams": 2, "length_penalty": float("inf")},
            "length_penalty: expected a number from -10 to 10, found inf",
        ),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping: expected true, false or 'never', found 'soon'"),
        ({"stop_strings": "."}, "stop_strings: expected a tuple of texts that are not empty, found '.'"),
        ({"stop_strings": ("a", "")}, "stop_strings: expected a tuple of texts that are not empty, found ('a', '')"),
        ({"do_sample": True, "num_beams": 2}, "num_beams: expected 1 with do_sample, found 2"),
        ({"temperature": 0.5}, "temperature: has no effect without do_sample; add do_sample, or leave"),
        ({"top_k": 5}, "top_k: has no effect without do_sample"),
        ({"top_p": 0.5}, "top_p: has no effect without do_sample"),
        ({"seed": 0}, "seed: has no effect without do_sample"),
        ({"length_penalty": 0.5}, "length_penalty: has no effect without beams; add num_beams of at least 2"),
        ({"early_stopping": True}, "early_stopping: has no effect without beams"),
        (
            {"num_return_sequences": 2},
            "num_return_sequences: expected at most num_beams (1) without do_sample",
        ),
        ({"num_beams": 2, "num_return_sequences": 3}, "expected at most num_beams (2) without do_sample, found 3"),
    ],
    ids=str,
)
def test_one_sentence_each(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        Decoding(**settings)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def generate(family: Family, decoding: Decoding, new_tokens: int = NEW_TOKENS) -> list[tuple[int, ...]]:
    return family.decoder.generate(family.prefix_BQD[:5], family.prompts[:5], new_tokens, Stopwatch(), decoding)


def test_what_only_the_call_can_know(family: Family) -> None:
    with pytest.raises(InputError, match=r"min_new_tokens: expected at most max_new_tokens \(3\), found 4"):
        generate(family, Decoding(min_new_tokens=4), 3)
    with pytest.raises(InputError, match=r"num_beams: expected at most 200 .*runs at once.*export\.max_batch=201"):
        generate(family, Decoding(num_beams=201))
    with pytest.raises(InputError, match="num_return_sequences: expected at most 200"):
        generate(family, Decoding(do_sample=True, num_return_sequences=201))
    streams = {
        "num_beams: expected 1 in a stream, found 3: beams may change": Decoding(num_beams=3),
        "num_return_sequences: expected 1 in a stream": Decoding(do_sample=True, num_return_sequences=2),
    }
    for sentence, decoding in streams.items():
        with pytest.raises(InputError, match=sentence):
            family.decoder.stream(family.prefix_BQD[:1], family.prompts[0], 3, Stopwatch(), decoding)


def test_never_more_sequences_at_once_than_the_bundle_has(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of three beams in a bundle of eight: two, two and one, and the same texts."""
    sizes, start = list[int](), family.decoder.start
    beams = Decoding(num_beams=3, num_return_sequences=2)
    whole = generate(family, beams)
    limits = Limits(max_batch=8, max_positions=90, max_question_tokens=4, max_new_tokens=NEW_TOKENS)
    monkeypatch.setattr(family.decoder, "_limits", limits)
    monkeypatch.setattr(family.decoder, "start", lambda *read: sizes.append(len(read[1])) or start(*read))
    assert generate(family, beams) == whole
    assert sizes == [2, 2, 1]


def test_the_stream_says_what_the_answer_says(family: Family) -> None:
    for decoding in (GREEDY, Decoding(do_sample=True, seed=2), Decoding(repetition_penalty=1.3, min_new_tokens=4)):
        for row in range(12):
            prefix_1QD, prompt = family.prefix_BQD[row : row + 1], family.prompts[row]
            tokens = family.decoder.stream(prefix_1QD, prompt, NEW_TOKENS, Stopwatch(), decoding)
            assert tuple(tokens) == family.decoder.generate(prefix_1QD, [prompt], NEW_TOKENS, Stopwatch(), decoding)[0]


def test_a_token_is_said_before_the_next_is_computed(family: Family) -> None:
    watch, row = Stopwatch(), int(np.argmax([len(texts[0]) for texts in family.ours()]))
    tokens = family.decoder.stream(family.prefix_BQD[row : row + 1], family.prompts[row], NEW_TOKENS, watch)
    next(tokens)
    first_ms = watch.timings_ms()["decode"]
    assert len(list(tokens)) == NEW_TOKENS - 1
    assert watch.timings_ms()["decode"] > 3 * first_ms, "the other steps ran after the first token was there"
