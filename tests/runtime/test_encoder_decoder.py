"""Greedy decoding against a small honest encoder-decoder in numpy: the encoder sees both ways, the decoder its past."""

import numpy as np
import pytest

from runtime.backends.host import HostEngine
from runtime.bundle import read_bundle
from runtime.encoder_decoder import EncoderDecoder
from runtime.errors import BundleError, CheckFailed, InputError
from runtime.manifest import Generation, Limits
from runtime.speaker import LANGUAGE_GRAPHS, open_decoder
from runtime.stopwatch import Stopwatch

WIDTH, VOCABULARY, HEADS, HEAD_WIDTH, POSITIONS = 8, 11, 2, 4, 40
PAD, END, START = 0, 1, 2
PROMPTS = [[3], [4, 5, 6, 7, 8], [], [9, 10, 3]]


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def heads(states_BLD):
    return states_BLD.reshape(*states_BLD.shape[:2], HEADS, HEAD_WIDTH).transpose(0, 2, 1, 3)


def attend(queries, keys, values, mask):
    scores = np.where(mask, queries @ keys.transpose(0, 1, 3, 2) / np.sqrt(HEAD_WIDTH), -1e30)
    mixed = softmax(scores) @ values
    return mixed.transpose(0, 2, 1, 3).reshape(mixed.shape[0], mixed.shape[2], WIDTH)


class Embed:
    def __init__(self, rng):
        self.table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)

    def run(self, feeds):
        return {"inputs_embeds": self.table[feeds["input_ids"]]}


class Encoder:
    """One layer that sees both ways; relative positions are left out, so padding on either side counts the same."""

    def __init__(self, rng):
        self.mix = rng.normal(size=(3, WIDTH, WIDTH))
        self.key, self.value = rng.normal(size=(2, WIDTH, WIDTH))
        self.calls = []

    def run(self, feeds):
        states = feeds["inputs_embeds"]
        self.calls.append(states.shape[:2])
        mask = feeds["attention_mask"].astype(bool)[:, None, None, :]
        hidden = states + attend(*(heads(states @ matrix) for matrix in self.mix), mask)
        cross = {"cross_key_0": heads(hidden @ self.key), "cross_value_0": heads(hidden @ self.value)}
        return {"encoder_hidden": hidden} | cross


class Decoder(HostEngine):
    """One layer of self-attention over the cache, then cross-attention over what was read."""

    def __init__(self, rng):
        self.query, self.key, self.value, self.across = rng.normal(size=(4, WIDTH, WIDTH))
        self.positions = rng.normal(size=(POSITIONS, WIDTH))
        self.head = rng.normal(size=(WIDTH, VOCABULARY))
        self.calls = []

    def inputs(self):
        past = ("B", HEADS, "P", HEAD_WIDTH)
        return {
            "inputs_embeds": ("B", 1, WIDTH),
            "past_key_0": past,
            "past_value_0": past,
            "cross_key_0": past,
            "cross_value_0": past,
        }

    def compute(self, feeds):
        new = feeds["inputs_embeds"].shape[1]
        self.calls.append(new)
        done = feeds["past_key_0"].shape[2]
        states = feeds["inputs_embeds"] + self.positions[done : done + new]
        keys = np.concatenate([feeds["past_key_0"], heads(states @ self.key)], axis=2)
        values = np.concatenate([feeds["past_value_0"], heads(states @ self.value)], axis=2)
        causal = np.arange(done + new)[None, :] <= np.arange(done, done + new)[:, None]
        states = np.tanh(states + attend(heads(states @ self.query), keys, values, causal))
        mask = feeds["attention_mask"].astype(bool)[:, None, None, :]
        cross = attend(heads(states @ self.across), feeds["cross_key_0"], feeds["cross_value_0"], mask)
        logits = (np.tanh(states + cross) @ self.head)[:, -1].astype(np.float32)
        present = {"present_key_0": keys.astype(np.float32), "present_value_0": values.astype(np.float32)}
        return {"logits": logits, **present}


def tiny(seed=0, ends=(END,), start=START):
    rng = np.random.default_rng(seed)
    graphs = Embed(rng), Encoder(rng), Decoder(rng)
    limits = Limits(max_batch=8, max_positions=12, max_question_tokens=4, max_new_tokens=20)
    generation = Generation(eos_token_ids=ends, pad_token_id=PAD, max_new_tokens=10, start_token_id=start)
    return *graphs, EncoderDecoder(*graphs, generation, limits)


def prefixes(count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 3, WIDTH)).astype(np.float32)


def recomputed(embed, encoder, decoder, prefix_QD, prompt, count):
    """Slow judge: no cache, no batch, no padding, everything said again for every token."""
    read = np.concatenate([prefix_QD, embed.table[np.array(prompt, int)]])[None]
    mask = np.ones(read.shape[:2], np.int64)
    seen = encoder.run({"inputs_embeds": read, "attention_mask": mask})
    none, ids = np.zeros((1, HEADS, 0, HEAD_WIDTH), np.float32), []
    for _ in range(count):
        given = embed.table[np.array([START, *ids])][None]
        feeds = {"inputs_embeds": given, "attention_mask": mask, "past_key_0": none, "past_value_0": none, **seen}
        token = int(decoder.run(feeds)["logits"][0].argmax())
        if token == END:
            break
        ids.append(token)
    return tuple(ids)


@pytest.mark.parametrize("seed", range(8))
def test_cached_batch_with_unequal_prompts_equals_recomputing_each_row(seed):
    *graphs, speaker = tiny(seed)
    prefix_BQD = prefixes(4, seed)
    found = speaker.generate(prefix_BQD, PROMPTS, 12, Stopwatch())
    assert found == [recomputed(*graphs, row, prompt, 12) for row, prompt in zip(prefix_BQD, PROMPTS, strict=True)]


def test_seeds_above_reach_both_ways_to_stop():
    lengths = {len(ids) for seed in range(8) for ids in tiny(seed)[-1].generate(prefixes(4), PROMPTS, 12, Stopwatch())}
    assert 12 in lengths, "some row runs into max_new_tokens"
    assert any(0 < length < 12 for length in lengths), "some row ends by its end token"


def test_the_encoder_runs_once_and_each_step_says_one_token():
    _, encoder, decoder, speaker = tiny(ends=())
    watch = Stopwatch()
    speaker.generate(prefixes(2), [[3, 4], [5]], 6, watch)
    assert encoder.calls == [(2, 3 + 2)]
    assert decoder.calls == [1] * 6
    assert watch.timings_ms()["prefill"] > 0 < watch.timings_ms()["decode"]


def test_only_empty_prompts():
    *graphs, speaker = tiny(seed=2)
    prefix_BQD = prefixes(2)
    found = speaker.generate(prefix_BQD, [[], []], 5, Stopwatch())
    assert found == [recomputed(*graphs, row, [], 5) for row in prefix_BQD]


def test_rows_of_a_graph_without_a_mask_over_what_was_said_join_at_equal_steps_only():
    """Its positions count from the beginning of the cache, so a pad there would be another beginning."""
    *_, speaker = tiny()
    prefix_BQD = prefixes(2)
    (_, ahead), (_, behind) = (speaker.start(prefix_BQD[row : row + 1], [[3]], 6) for row in (0, 1))
    assert ahead.can_join(behind)
    for _ in range(2):
        ahead.step(np.array([4]))
    assert not ahead.can_join(behind)
    with pytest.raises(ValueError, match="have said 3 tokens cannot share a batch with rows that have said 1"):
        ahead.join(behind)


def test_limits():
    *_, speaker = tiny()
    assert speaker.generate(prefixes(1), [[3] * 9], 20, Stopwatch())  # 3 + 9 = 12 are read; 20 more are said
    with pytest.raises(InputError, match="image and prompt take 13 positions, this bundle has 12"):
        speaker.generate(prefixes(1), [[3] * 10], 1, Stopwatch())
    for wrong in (0, 21):
        with pytest.raises(InputError, match=f"expected 1 to 20 .*found {wrong}"):
            speaker.generate(prefixes(1), [[3]], wrong, Stopwatch())


def test_scores_that_are_not_numbers_are_reported():
    *_, decoder, speaker = tiny()
    decoder.head[:] = np.nan
    with pytest.raises(CheckFailed, match="graph 'decoder': expected numbers, found NaN"):
        speaker.generate(prefixes(1), [[3]], 2, Stopwatch())


def test_a_manifest_without_a_first_token_is_refused():
    with pytest.raises(BundleError, match=r"generation\.start_token_id: expected the token"):
        tiny(start=None)


def test_the_manifest_decides_which_graphs_are_opened(tiny_bundle):
    """Also of a bundle without a language model, which says so."""
    manifest, opened = read_bundle(tiny_bundle).manifest, []
    graphs = dict(zip(("embed", "encoder", "decoder"), tiny()[:3], strict=True))

    def engine(name):
        opened.append(name)
        return graphs.get(name, graphs["decoder"])

    def of(style):
        return manifest.model_copy(
            update={
                "model": manifest.model.model_copy(update={"style": style}),
                "generation": manifest.generation.model_copy(update={"start_token_id": START}),
                "graphs": manifest.graphs | {"decoder": manifest.graphs["language"]},  # both state their caches' type
            }
        )

    assert isinstance(open_decoder(of("encoder-decoder"), engine), EncoderDecoder)
    assert opened == ["embed", "encoder", "decoder"]
    opened.clear()
    open_decoder(of("decoder-only"), engine)
    assert opened == ["embed", "language"]
    with pytest.raises(InputError, match="this bundle has no language model: it can search"):
        open_decoder(of("none"), engine)
    assert set(LANGUAGE_GRAPHS) == {"decoder-only", "encoder-decoder", "none"}
