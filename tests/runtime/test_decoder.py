"""Greedy decoding against a small honest language model in numpy: softmax attention over a real KV cache."""

import threading

import numpy as np
import pytest

from runtime.backends.host import HostEngine
from runtime.decoder import Decoder
from runtime.decoding import Decoding
from runtime.decoding.one_by_one import choose_greedy
from runtime.errors import CheckFailed, InputError
from runtime.manifest import Generation, Limits
from runtime.stopwatch import Stopwatch

WIDTH, VOCABULARY, HEADS, HEAD_WIDTH, POSITIONS = 8, 11, 2, 4, 40
PAD, END, OTHER_END = 0, 1, 2


class TinyEmbed:
    """Token ids → embeddings."""

    def __init__(self, rng):
        self.table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)

    def run(self, feeds):
        return {"inputs_embeds": self.table[feeds["input_ids"]]}


class TinyLanguage(HostEngine):
    """One causal attention layer; positions are counted by the mask, as in the exported graph."""

    def __init__(self, rng):
        self.positions = rng.normal(size=(POSITIONS, WIDTH))
        self.query, self.key, self.value = rng.normal(size=(3, WIDTH, WIDTH))
        self.head = rng.normal(size=(WIDTH, VOCABULARY))
        self.calls = []

    def inputs(self):
        past = ("B", HEADS, "P", HEAD_WIDTH)
        return {
            "inputs_embeds": ("B", "S", WIDTH),
            "attention_mask": ("B", "P+S"),
            "past_key_0": past,
            "past_value_0": past,
        }

    def compute(self, feeds):
        mask = feeds["attention_mask"].astype(bool)
        new = feeds["inputs_embeds"].shape[1]
        self.calls.append(new)
        place = np.clip(mask.cumsum(axis=1) - 1, 0, None)[:, -new:]
        states = feeds["inputs_embeds"] + self.positions[place]

        def heads(matrix):
            return (states @ matrix).reshape(*states.shape[:2], HEADS, HEAD_WIDTH).transpose(0, 2, 1, 3)

        keys = np.concatenate([feeds["past_key_0"], heads(self.key)], axis=2)
        values = np.concatenate([feeds["past_value_0"], heads(self.value)], axis=2)
        scores = heads(self.query) @ keys.transpose(0, 1, 3, 2) / np.sqrt(HEAD_WIDTH)
        total = keys.shape[2]
        causal = np.arange(total)[None, :] <= np.arange(total - new, total)[:, None]
        scores = np.where(causal[None, None] & mask[:, None, None, :], scores, -1e30)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ values
        last = np.tanh(mixed.transpose(0, 2, 1, 3).reshape(*states.shape)[:, -1] + states[:, -1])
        logits = (last @ self.head).astype(np.float32)
        return {
            "logits": logits,
            "present_key_0": keys.astype(np.float32),
            "present_value_0": values.astype(np.float32),
        }


def tiny(seed=0, ends=(END,), max_positions=POSITIONS, prompt_cache_bytes=0):
    rng = np.random.default_rng(seed)
    embed, language = TinyEmbed(rng), TinyLanguage(rng)
    limits = Limits(max_batch=8, max_positions=max_positions, max_question_tokens=4, max_new_tokens=20)
    generation = Generation(eos_token_ids=ends, pad_token_id=PAD, max_new_tokens=10)
    decoder = Decoder(embed, language, generation, limits, prompt_cache_bytes=prompt_cache_bytes)
    return embed, language, decoder


def prefixes(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 3, WIDTH)).astype(np.float32)


def recomputed(embed, language, prefix_QD, prompt, count, ends):
    """Slow judge: no cache, no batch, the whole row again for every token."""
    ids = []
    none = np.zeros((1, HEADS, 0, HEAD_WIDTH), np.float32)
    for _ in range(count):
        embeds = np.concatenate([prefix_QD, embed.table[np.array([*prompt, *ids], int)]])[None]
        mask = np.ones(embeds.shape[:2], np.int64)
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "past_key_0": none, "past_value_0": none}
        token = int(language.run(feeds)["logits"][0].argmax())
        if token in ends:
            break
        ids.append(token)
    return tuple(ids)


@pytest.mark.parametrize("seed", range(8))
def test_cached_batch_with_unequal_prompts_equals_recomputing_each_row(seed):
    embed, language, decoder = tiny(seed)
    prompts = [[3], [4, 5, 6, 7, 8], [], [9, 10, 3]]
    prefix_BQD = prefixes(4, seed)
    found = decoder.generate(prefix_BQD, prompts, 12, Stopwatch())
    expected = [
        recomputed(embed, language, prefix_QD, prompt, 12, {END})
        for prefix_QD, prompt in zip(prefix_BQD, prompts, strict=True)
    ]
    assert found == expected


def test_seeds_above_reach_both_ways_to_stop():
    lengths = set()
    for seed in range(8):
        _, _, decoder = tiny(seed)
        answers = decoder.generate(prefixes(4, seed), [[3], [4, 5, 6, 7, 8], [], [9, 10, 3]], 12, Stopwatch())
        lengths |= {len(ids) for ids in answers}
    assert 12 in lengths, "some row runs into max_new_tokens"
    assert any(0 < length < 12 for length in lengths), "some row ends by its end token"


def test_after_the_prefill_each_step_reads_one_position():
    _, language, decoder = tiny(ends=())
    decoder.generate(prefixes(2), [[3, 4], [5]], 6, Stopwatch())
    assert language.calls == [3 + 2, 1, 1, 1, 1, 1]


def test_any_end_token_ends_and_is_left_out():
    _, _, endless = tiny(seed=3, ends=())
    full = endless.generate(prefixes(1), [[3]], 10, Stopwatch())[0]
    first_end = full[4]
    _, language, decoder = tiny(seed=3, ends=(OTHER_END + 100, first_end))
    cut = full.index(first_end)
    assert decoder.generate(prefixes(1), [[3]], 10, Stopwatch()) == [full[:cut]]
    assert len(language.calls) == cut + 1, "decoding stops as soon as every row has ended"


def test_single_rows_begin_behind_what_is_remembered():
    """Turns about one image, another image, and the first again; every answer is that of a decoder that forgets."""
    embed, language, decoder = tiny(ends=(), prompt_cache_bytes=1 << 20)
    _, _, forgetful = tiny(ends=())
    asked = [(0, [3, 4]), (0, [3, 4, 5, 6]), (0, [3, 7]), (1, [3, 4]), (0, [3, 4, 5, 6]), (0, [])]
    prefix_BQD, positions = prefixes(2), []
    for image, prompt in asked:
        prefix_1QD = prefix_BQD[image : image + 1]
        language.calls.clear()
        found = decoder.generate(prefix_1QD, [prompt], 4, Stopwatch())
        positions.append(language.calls[0])
        assert found == forgetful.generate(prefix_1QD, [prompt], 4, Stopwatch())
        assert found == [recomputed(embed, language, prefix_1QD[0], prompt, 4, ())]
    assert positions == [3 + 2, 2, 1, 3 + 2, 1, 1]
    counted = decoder.statistics()["prompts"]
    assert (counted["hits"], counted["misses"]) == (4, 2)
    assert counted["bytes"] == 2 * 4 * HEADS * HEAD_WIDTH * (3 + 4 + 3 + 2 + 3 + 2)


def test_rows_of_a_batch_are_computed_whole():
    _, language, decoder = tiny(ends=(), prompt_cache_bytes=1 << 20)
    for _ in range(2):
        language.calls.clear()
        decoder.generate(prefixes(2), [[3, 4], [5]], 2, Stopwatch())
        assert language.calls == [3 + 2, 1]
    assert decoder.prompt_cache.hits == decoder.prompt_cache.misses == 0


def test_beams_and_streams_begin_there_too():
    _, language, decoder = tiny(seed=3, prompt_cache_bytes=1 << 20)
    _, _, forgetful = tiny(seed=3)
    for decoding in (Decoding(num_beams=3), Decoding(do_sample=True, seed=1, num_return_sequences=3)):
        for prompt in ([3, 4], [3, 4, 5]):
            expected = forgetful.generate(prefixes(1), [prompt], 8, Stopwatch(), decoding)
            assert decoder.generate(prefixes(1), [prompt], 8, Stopwatch(), decoding) == expected
    expected = forgetful.generate(prefixes(1), [[3, 4, 5]], 8, Stopwatch())
    language.calls.clear()
    assert [tuple(decoder.stream(prefixes(1), [3, 4, 5], 8, Stopwatch()))] == expected
    assert language.calls[0] == 1


def test_threads_share_a_decoder():
    """Each batch has memory of its own, also when it is the memory of one that is gone."""
    _, _, decoder = tiny(ends=(), prompt_cache_bytes=2000)
    cases = [(prefixes(rows, rows), [[3 + row] * (1 + (rows + row) % 3) for row in range(rows)]) for rows in (1, 2, 3)]
    expected = [decoder.generate(*case, 6, Stopwatch()) for case in cases]
    wrong = []

    def work(offset):
        for turn in range(30):
            place = (offset + turn) % len(cases)
            if decoder.generate(*cases[place], 6, Stopwatch()) != expected[place]:
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_empty_prompts():
    embed, language, decoder = tiny(seed=2)
    prefix_BQD = prefixes(2)
    found = decoder.generate(prefix_BQD, [[], []], 5, Stopwatch())
    assert found == [recomputed(embed, language, prefix_QD, [], 5, {END}) for prefix_QD in prefix_BQD]


def test_limits():
    _, _, decoder = tiny(max_positions=9, ends=())
    assert len(decoder.generate(prefixes(1), [[3, 4]], 5, Stopwatch())[0]) == 5  # 3 + 2 + 5 - 1 = 9: the last fits
    with pytest.raises(InputError, match="take 10 positions, this bundle has 9"):
        decoder.generate(prefixes(1), [[3, 4]], 6, Stopwatch())
    for wrong in (0, -1, 21):
        with pytest.raises(InputError, match=f"expected 1 to 20 .*found {wrong}"):
            decoder.generate(prefixes(1), [[3]], wrong, Stopwatch())


def test_scores_that_are_not_numbers_are_reported():
    assert choose_greedy(np.array([[0.0, 2.0, 1.0], [-np.inf, -3.0, -4.0]], np.float32), "language").tolist() == [1, 1]
    with pytest.raises(CheckFailed, match="graph 'language': expected numbers, found NaN"):
        choose_greedy(np.array([[0.0, 1.0], [np.nan, 1.0]], np.float32), "language")
