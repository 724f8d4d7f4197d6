"""Drawn tokens: from transformers' distribution, repeatable by seed, and never touched by a neighbour."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from runtime.decoding import Decoding
from runtime.decoding import processors as rules
from runtime.decoding.one_by_one import Draw
from runtime.decoding.task import Task
from runtime.errors import CheckFailed, InputError
from runtime.manifest import Generation
from tests.runtime.decoding.family import NEW_TOKENS, PAD, Family

TOLERANCE = 1e-6
"""Largest difference of a probability."""

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 0},
    {"top_k": 5},
    {"top_k": 0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.6},
    {"top_k": 0, "top_p": 0.01},
    {"top_k": 0, "top_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 30},
]


def theirs(model, settings: dict[str, Any], given: int, ends: tuple[int, ...]) -> LogitsProcessorList:
    """The chain that `generate` itself makes, without a mask: as for rows that are not padded."""
    ids = {"eos_token_id": list(ends), "pad_token_id": PAD, "decoder_start_token_id": 1}
    config = GenerationConfig(do_sample=True, **{"top_k": 50} | ids | settings)
    model._prepare_special_tokens(config, device="cpu")
    return model._get_logits_processor(config, given, torch.zeros(1, 1, 32), model_kwargs={}, device="cpu")


def off_the_border(scores_BV: np.ndarray, top_p: float) -> np.ndarray:
    """Rows in which no token lies so near the border of `top_p` that single precision may put it on either side."""
    weights = np.sort(np.exp(scores_BV - scores_BV.max(axis=1, keepdims=True)), axis=1)
    sums = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    return np.abs(sums - (1 - top_p)).min(axis=1) > 5e-7 if top_p < 1 else np.ones(len(sums), bool)


@pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)`")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_scores_are_filtered_as_transformers_does(family: Family, settings, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary, ends = 3000, family.end_token_ids
    start = 1 if family.reads_first else None
    generation = Generation(eos_token_ids=ends, pad_token_id=PAD, max_new_tokens=9, start_token_id=start)
    task = Task(Decoding(do_sample=True, **settings), generation, 9, "language")
    for said in (0, 1, 2, 7, 40):
        scores_BV = rng.normal(size=(16, vocabulary), scale=rng.choice([0.5, 3.0, 12.0])).astype(np.float32)
        drawn = rng.integers(4, 12, (16, said))  # few different ones, so that n-grams repeat
        history_BL = np.concatenate([task.given(16), drawn], axis=1)
        chain = theirs(family.language_model, settings, task.given(0).shape[1], ends)
        expected = torch.softmax(chain(torch.from_numpy(history_BL), torch.from_numpy(scores_BV)), dim=-1).numpy()
        found = rules.probabilities(task.warped(task.processed(scores_BV, history_BL)))
        unfiltered = theirs(family.language_model, settings | {"top_p": 1.0}, task.given(0).shape[1], ends)
        before = unfiltered(torch.from_numpy(history_BL), torch.from_numpy(scores_BV)).numpy().astype(np.float64)
        clear = off_the_border(before, settings.get("top_p", 1.0))
        assert clear.sum() >= 14
        np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=TOLERANCE)
        assert ((found > 0) == (expected > 0))[clear].all()


@pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)`")
def test_every_step_of_real_texts_has_transformers_distribution(family: Family, monkeypatch) -> None:
    """What `Draw` draws from at each step, beside `generate`'s own chain on the same history."""
    settings = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    processed = Task.processed

    def noted(task: Task, scores_BV, history_BL):
        result = processed(task, scores_BV, history_BL)
        seen.append((scores_BV.copy(), history_BL.copy(), rules.probabilities(task.warped(result))))
        return result

    monkeypatch.setattr(Task, "processed", noted)
    family.ours(Decoding(do_sample=True, seed=3, **settings))
    assert len(seen) == NEW_TOKENS
    chain = theirs(family.language_model, settings, int(family.reads_first), family.end_token_ids)
    for scores_BV, history_BL, found in seen:
        expected = torch.softmax(chain(torch.from_numpy(history_BL), torch.from_numpy(scores_BV)), dim=-1).numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_draws_repeat_by_seed_and_alone(family: Family) -> None:
    drawn = Decoding(do_sample=True, seed=5, num_return_sequences=3)
    found = family.ours(drawn)
    assert family.ours(drawn) == found
    assert [family.ours(drawn, [row])[0] for row in range(0, len(found), 5)] == found[::5]
    backwards = range(len(found) - 1, -1, -1)
    assert family.ours(drawn, backwards) == found[::-1]
    assert sum(len(set(texts)) == 3 for texts in found) > len(found) / 2, "the sequences of an image differ"
    assert family.ours(Decoding(do_sample=True, seed=6, num_return_sequences=3)) != found
    assert family.ours(Decoding(do_sample=True, seed=5)) == [texts[:1] for texts in found]
    fresh = Decoding(do_sample=True)
    assert family.ours(fresh) != family.ours(fresh), "without a seed every call draws anew"


def test_one_likeliest_token_is_greedy(family: Family) -> None:
    assert family.ours(Decoding(do_sample=True, top_k=1)) == family.ours()
    assert family.ours(Decoding(do_sample=True, top_k=0, top_p=1e-6)) == family.ours()


def one_draw(scores: list[float], draws: int, **settings: Any) -> np.ndarray:
    """How often each token is drawn."""
    generation = Generation(eos_token_ids=(0,), pad_token_id=0, max_new_tokens=9)
    task = Task(Decoding(do_sample=True, seed=1, **settings), generation, 9, "language")
    draw, rows = Draw(task, 1), np.array([scores], np.float32)
    return np.bincount([int(draw(rows)[0]) for _ in range(draws)], minlength=len(scores))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = np.array([0.5, 0.0, 0.25, 0.15, 0.1])
    with np.errstate(divide="ignore"):
        found = one_draw(np.log(probabilities).tolist(), 20_000)
    spread = np.sqrt(20_000 * probabilities * (1 - probabilities))
    assert (np.abs(found - 20_000 * probabilities) <= 4 * spread).all(), found
    assert found[1] == 0
    assert (one_draw([0.0, -np.inf, -np.inf], 200) == [200, 0, 0]).all()


def test_nothing_left_to_draw_is_a_sentence() -> None:
    with pytest.raises(InputError, match="they ban every token of the vocabulary"):
        one_draw([-np.inf, -np.inf], 1)
    with pytest.raises(CheckFailed, match="graph 'language': expected numbers, found NaN"):
        one_draw([0.0, np.nan], 1)
