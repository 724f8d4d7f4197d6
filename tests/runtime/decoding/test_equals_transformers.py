"""Token for token what transformers' `generate` says, in fp32, for every setting."""

from typing import Any

import pytest

from runtime.decoding import Decoding
from tests.runtime.decoding.family import NEW_TOKENS

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy-repetition": {"repetition_penalty": 1.4},
    "greedy-repetition-below-1": {"repetition_penalty": 0.8},
    "greedy-ngram": {"no_repeat_ngram_size": 2},
    "greedy-no-token-twice": {"no_repeat_ngram_size": 1},
    "greedy-min": {"min_new_tokens": 6},
    "greedy-all": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
    "beams": {"num_beams": 4},
    "beams-long": {"num_beams": 3, "length_penalty": 2.0},
    "beams-no-length": {"num_beams": 3, "length_penalty": 0.0},
    "beams-short": {"num_beams": 3, "length_penalty": -1.0},
    "beams-early": {"num_beams": 3, "early_stopping": True},
    "beams-never": {"num_beams": 3, "early_stopping": "never"},
    "beams-never-no-length": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.0},
    "beams-never-short": {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5},
    "beams-ngram": {"num_beams": 3, "no_repeat_ngram_size": 2},
    "beams-repetition": {"num_beams": 3, "repetition_penalty": 1.4},
    "beams-min": {"num_beams": 3, "min_new_tokens": 6},
    "beams-all": {
        "num_beams": 4,
        "length_penalty": 0.6,
        "early_stopping": True,
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.2,
        "min_new_tokens": 4,
        "num_return_sequences": 3,
    },
    "beams-every-one": {"num_beams": 3, "num_return_sequences": 3},
}


@pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)`")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_batched_and_single(family, settings: dict[str, Any]) -> None:
    """Batches have prompts of unequal length; a row alone has no pads at all."""
    decoding = Decoding(**settings)
    expected = family.theirs(do_sample=False, **settings)
    assert family.ours(decoding) == expected
    assert [family.ours(decoding, [row])[0] for row in range(len(expected))] == expected


def test_the_settings_above_say_different_texts(family) -> None:
    """And reach both ways to end: a setting that changed nothing would test nothing."""
    plain = {beams: family.ours(Decoding(num_beams=beams)) for beams in (1, 3, 4)}
    lengths = {len(sequence) for row in plain[1] for sequence in row}
    assert NEW_TOKENS in lengths and any(0 < length < NEW_TOKENS for length in lengths)
    for name, settings in SETTINGS.items():
        best = [texts[0] for texts in family.ours(Decoding(**settings))]
        changed = best != [texts[0] for texts in plain[settings.get("num_beams", 1)]]
        assert changed == (name not in {"greedy", "beams", "beams-every-one"}), name


def test_stop_strings(family) -> None:
    """Cut out of what is really said, inside words and across them."""
    texts = [family.text_tokenizer.continuation(sequence) for row in family.ours() for sequence in row]
    cuts = [text[first:last] for text in texts for first, last in ((4, 6), (3, 8))]
    stops = [cut for cut in cuts if len(cut) > 1 and cut.isascii()][:3]  # no halves of characters
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True}):
        ended = Decoding(stop_strings=tuple(stops), **settings)
        found = family.ours(ended)
        assert found == family.theirs(do_sample=False, stop_strings=stops, **settings)
        assert found != family.ours(Decoding(**settings))
        assert [family.ours(ended, [row])[0] for row in range(0, len(found), 7)] == found[::7]
