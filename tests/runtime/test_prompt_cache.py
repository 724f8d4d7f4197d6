"""What is remembered of prompts: found by image and tokens, bounded in bytes, never the last position."""

import threading

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.prompt_cache import PromptCache

QUERIES = 2


def prefix(seed):
    return np.random.default_rng(seed).normal(size=(QUERIES, 3)).astype(np.float32)


def arrays(positions, value=1.0):
    """8 bytes a position."""
    return {name: np.full((1, 1, positions, 1), value, np.float32) for name in ("past_key_0", "past_value_0")}


def put(cache, seed, ids, value=1.0):
    cache.put(prefix(seed), ids, arrays(QUERIES + len(ids), value))


def known(cache, seed, ids):
    """Positions that need not be computed; None for a miss."""
    found = cache.longest(prefix(seed), ids)
    return None if found is None else found["past_key_0"].shape[2]


def test_the_longest_common_head_is_found():
    cache = PromptCache(1000)
    assert known(cache, 0, [1, 2]) is None
    put(cache, 0, [1, 2, 3])
    put(cache, 0, [1, 2, 4, 5, 6])
    assert known(cache, 0, [1, 2, 4, 5, 9, 9]) == QUERIES + 4
    assert known(cache, 0, [1, 2, 3, 7]) == QUERIES + 3
    assert known(cache, 0, [7, 7]) == QUERIES, "the image at least"
    assert known(cache, 1, [1, 2, 3]) is None, "another image"
    assert (cache.hits, cache.misses) == (3, 2)


def test_the_last_position_is_always_computed():
    cache = PromptCache(1000)
    put(cache, 0, [1, 2, 3])
    assert known(cache, 0, [1, 2, 3]) == QUERIES + 2
    assert known(cache, 0, [1]) == QUERIES
    assert known(cache, 0, []) == QUERIES - 1


def test_the_numbers_are_those_of_the_head_that_fits():
    cache = PromptCache(1000)
    put(cache, 0, [1, 2, 3], value=3.0)
    put(cache, 0, [4, 5, 6], value=6.0)
    found = cache.longest(prefix(0), [4, 5, 1])
    assert found["past_value_0"].max() == found["past_value_0"].min() == 6.0
    with pytest.raises(ValueError, match="read-only"):
        found["past_value_0"][:] = 0


def test_the_head_of_a_longer_entry_is_not_kept_beside_it():
    cache = PromptCache(1000)
    for ids in ([1], [1, 2, 3], [1, 2], [2], [1, 2, 3]):
        put(cache, 0, ids)
    counted = cache.statistics()["prompts"]
    assert counted["entries"] == 2 and counted["evictions"] == 0
    assert counted["bytes"] == 8 * (2 * QUERIES + 3 + 1)


def test_bytes_are_bounded_and_the_oldest_go():
    cache = PromptCache(8 * 3 * (QUERIES + 1))
    for seed in range(3):
        put(cache, seed, [1])
    assert known(cache, 0, [1]) is not None  # and so it is the latest
    put(cache, 3, [1])
    assert [known(cache, seed, [1]) is not None for seed in range(4)] == [True, False, True, True]
    assert (cache.evictions, cache.bytes) == (1, cache.max_bytes)
    put(cache, 4, [1] * 100)
    assert known(cache, 4, [1]) is None, "larger than the whole bound"
    assert cache.bytes == cache.max_bytes


def test_nothing_is_remembered_in_no_bytes():
    cache = PromptCache(0)
    put(cache, 0, [])
    assert known(cache, 0, [1]) is None
    assert cache.statistics() == {
        "prompts": {"hits": 0, "misses": 0, "evictions": 0, "entries": 0, "bytes": 0, "max_bytes": 0}
    }
    with pytest.raises(InputError, match="expected 0 or more bytes, found -1"):
        PromptCache(-1)


def test_threads_share_it():
    cache, wrong = PromptCache(8 * 40), []

    def work(offset):
        rng = np.random.default_rng(offset)
        for _ in range(200):
            seed, ids = int(rng.integers(3)), rng.integers(0, 2, int(rng.integers(1, 5))).tolist()
            found = cache.longest(prefix(seed), ids)
            if found is not None and found["past_key_0"].max() != seed:
                wrong.append(seed)
            put(cache, seed, ids, value=seed)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.hits > 0 and cache.evictions > 0
    counted = cache.statistics()["prompts"]
    assert counted["bytes"] == sum(a.nbytes for entry in cache._entries.values() for a in entry.values()) <= 8 * 40
