"""Rows that step, change places, leave and join, against plain numpy; and that no memory is made while they step."""

import tracemalloc

import numpy as np
import pytest

from runtime.backends.host import HostBuffer, HostEngine
from runtime.kv_cache import KvCache, Memory, cache_shapes, row_moves

HEADS, WIDTH = 2, 3
NAMES = ("past_key_0", "past_value_0")


class Appends(HostEngine):
    """Puts what it is fed behind the cache; the scores are the number of the last position."""

    def __init__(self):
        self.buffers, self.fails = [], False

    def inputs(self):
        return {"inputs_embeds": ("B", "S", HEADS * WIDTH)} | dict.fromkeys(NAMES, ("B", HEADS, "P", WIDTH))

    def buffer(self, elements, dtype):
        self.buffers.append(HostBuffer(elements, dtype))
        return self.buffers[-1]

    def compute(self, feeds):
        if self.fails:
            raise RuntimeError("out of memory")
        batch, new, _ = feeds["inputs_embeds"].shape
        fresh = feeds["inputs_embeds"].reshape(batch, new, HEADS, WIDTH).transpose(0, 2, 1, 3)
        present = {
            name.replace("past", "present"): np.concatenate([feeds[name], fresh * (1 + place)], axis=2)
            for place, name in enumerate(NAMES)
        }
        return {"logits": present["present_key_0"][:, 0, -1], **present}


def new_cache(engine, rows, reach, memory=None):
    return KvCache(memory or Memory(engine, "float32"), cache_shapes(engine), rows, reach)


def some(rows, positions, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, positions, HEADS * WIDTH)).astype(np.float32)


def keys(fed):
    """What the first tensor must hold."""
    return fed.reshape(*fed.shape[:2], HEADS, WIDTH).transpose(0, 2, 1, 3)


def holds(cache, fed):
    found = cache.arrays()
    np.testing.assert_array_equal(found["past_key_0"], keys(fed))
    np.testing.assert_array_equal(found["past_value_0"], 2 * keys(fed))


def test_steps_add_positions_without_new_memory():
    engine = Appends()
    cache, fed = new_cache(engine, 3, 9), some(3, 9)
    cache.advance({"inputs_embeds": fed[:, :4]})
    made = len(engine.buffers)
    assert made == 2 * len(NAMES)
    for step in range(4, 9):
        logits = cache.advance({"inputs_embeds": fed[:, step : step + 1]})
        np.testing.assert_array_equal(logits, keys(fed)[:, 0, step])
        holds(cache, fed[:, : step + 1])
        rows = np.array([1, 0, 2]) if step % 2 else np.array([0, 0, 1])  # beams
        cache.select(rows)
        fed = fed[rows]
        holds(cache, fed[:, : step + 1])
    assert len(engine.buffers) == made
    with pytest.raises(ValueError, match="memory was asked for 9 positions, and 10 are needed"):
        cache.advance({"inputs_embeds": fed[:, :1]})


def test_a_step_allocates_less_than_one_cache():
    """Whole rows, changed or not, never pass through memory that is made for the purpose."""

    class Still(Appends):
        def compute(self, feeds):
            return {"logits": np.zeros(1)} | {
                name.replace("past", "present"): np.broadcast_to(
                    np.float32(0), (*feeds[name].shape[:2], feeds[name].shape[2] + 1, WIDTH)
                )
                for name in NAMES
            }

    engine = Still()
    cache = new_cache(engine, 4, 3000)
    cache.assign({name: np.ones((4, HEADS, 2900, WIDTH), np.float32) for name in NAMES})
    feeds = {"inputs_embeds": np.zeros((4, 1, HEADS * WIDTH), np.float32)}
    cache.advance(feeds)
    tracemalloc.start()
    try:
        for _ in range(20):
            cache.select(np.array([1, 0, 3, 3]))
            cache.advance(feeds)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one_row = HEADS * 2900 * WIDTH * 4
    assert most < one_row / 2


def test_memory_of_a_batch_that_is_gone_serves_the_next():
    engine = Appends()
    memory = Memory(engine, "float32")
    for rows, reach in ((2, 8), (1, 8), (2, 5), (1, 3)):
        cache, fed = new_cache(engine, rows, reach, memory), some(rows, 3)
        cache.advance({"inputs_embeds": fed})
        holds(cache, fed)
        del cache
    assert len(engine.buffers) == 4
    first, second = (new_cache(engine, 2, 8, memory) for _ in range(2))
    one, other = some(2, 8, 1), some(2, 8, 2)
    for cache, fed in ((first, one), (second, other)):
        cache.advance({"inputs_embeds": fed[:, :7]})
    for cache, fed in ((first, one), (second, other)):
        cache.advance({"inputs_embeds": fed[:, 7:]})
        holds(cache, fed)
    del first, second, cache
    assert len(engine.buffers) == len(memory._free) == 8, "as many as were in use together"
    for reach in range(9, 20):  # each a little larger than all before
        new_cache(engine, 2, reach, memory).advance({"inputs_embeds": some(2, 3)})
    sizes = [size for size, _ in memory._free]
    assert len(sizes) == 8 and min(sizes) == 3 * HEADS * WIDTH * 18, "the largest stay"


def test_a_failing_graph_changes_nothing():
    engine = Appends()
    cache, fed = new_cache(engine, 2, 6), some(2, 6)
    cache.advance({"inputs_embeds": fed[:, :5]})
    engine.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.advance({"inputs_embeds": fed[:, 5:]})
    holds(cache, fed[:, :5])
    engine.fails = False
    cache.advance({"inputs_embeds": fed[:, 5:]})
    holds(cache, fed)


@pytest.mark.parametrize("seed", range(30))
def test_any_selection_equals_indexing(seed):
    """Rows repeated, dropped, in rings, more of them and fewer, with pads in front or without."""
    rng = np.random.default_rng(seed)
    engine = Appends()
    fed = some(int(rng.integers(1, 6)), 5, seed)
    cache = new_cache(engine, len(fed), 12)
    cache.advance({"inputs_embeds": fed})
    for _ in range(6):
        rows = rng.integers(0, len(fed), int(rng.integers(1, 7)))
        pads = int(rng.integers(0, 2)) if fed.shape[1] > 2 else 0
        cache.select(rows, pads)
        fed = fed[rows][:, pads:]
        holds(cache, fed)
        more = some(len(rows), 1, seed + 100)
        cache.advance({"inputs_embeds": more})
        fed = np.concatenate([fed, more], axis=1)
        holds(cache, fed)


@pytest.mark.parametrize("seed", range(20))
def test_moves_copy_only_rows_that_change(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 6, 6).tolist() if seed % 2 else rng.permutation(6).tolist()
    place = [*range(6), None]
    moves = row_moves(rows, spare=6)
    for target, source in moves:
        place[target] = place[source]
    assert place[:6] == rows
    assert {target for target, _ in moves} - {6} == {place for place, row in enumerate(rows) if place != row}
    changed = sum(place != row for place, row in enumerate(rows))
    assert len(moves) <= changed + changed // 2, "a ring has two rows at least, and costs one copy more"


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(5, 2), (2, 5), (4, 4)])
def test_rows_join_behind_the_present_ones(right, ours, theirs):
    engine = Appends()
    memory = Memory(engine, "float32")
    first, second = some(2, ours, 1), some(3, theirs, 2)
    caches = [new_cache(engine, len(fed), fed.shape[1] + left, memory) for fed, left in ((first, 2), (second, 6))]
    for cache, fed in zip(caches, (first, second), strict=True):
        cache.advance({"inputs_embeds": fed})
    cache = caches[0]
    cache.join(caches[1], right=right)
    longest = max(ours, theirs)
    fed = np.concatenate(
        [
            np.pad(part, ((0, 0), (missing, 0) if right else (0, missing), (0, 0)))
            for part in (first, second)
            for missing in [longest - part.shape[1]]
        ]
    )
    holds(cache, fed)
    made = len(engine.buffers)
    for step in range(6):  # as many as the one that had the most before it
        more = some(5, 1, step)
        cache.advance({"inputs_embeds": more})
        fed = np.concatenate([fed, more], axis=1)
        holds(cache, fed)
    assert len(engine.buffers) <= made + len(NAMES), "the second buffer of each tensor, once"
