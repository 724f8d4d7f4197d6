"""Bounded, counted, and no two different inputs under one key."""

import itertools
import threading

import numpy as np
import pytest

from runtime.errors import InputError
from runtime.query_cache import QueryCache, cache_key


def test_keys_of_different_inputs_differ():
    """The collisions that other projects shipped: shape, type, framing, field names, order of parts."""
    flat = np.arange(6, dtype=np.float32)
    inputs = [
        {"pixels": flat},
        {"pixels": flat.reshape(2, 3)},
        {"pixels": flat.reshape(3, 2)},
        {"pixels": flat.reshape(2, 3).T},
        {"pixels": flat.view(np.int32)},
        {"pixels": flat.astype(np.float64)},
        {"pixels": flat.view(np.uint8)},
        {"image": flat},
        {"pixels": flat[:3], "more": flat[3:]},
        {"pixels": flat, "question_ids": [1, 2]},
        {"pixels": flat, "question_ids": [1, 2, 0]},
        {"pixels": flat, "question_ids": []},
        {"pixels": flat, "bundle": "a"},
        {"a": "bc", "d": "e"},
        {"a": "b", "cd": "e"},
        {"ab": "c", "d": "e"},
        {"p": "x", "q": "y"},
        {"ptext(1,)xq": "y"},
        {"a": ""},
        {"a": "1"},
        {"a": [1]},
        {"a": np.frombuffer(b"1", np.uint8)},
    ]
    keys = [cache_key(fields) for fields in inputs]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_keys_of_equal_inputs_agree():
    pixels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    strided = np.asfortranarray(pixels)
    assert cache_key({"pixels": pixels, "ids": [1, 2]}) == cache_key({"pixels": strided, "ids": (1, 2)})


def block(fill, count=25):
    return np.full(count, fill, np.float32)  # 100 bytes


def test_the_least_recently_used_goes_first():
    cache = QueryCache(max_bytes=300)
    for name in "abc":
        cache.put(name, block(ord(name)))
    assert cache.get("a") is not None
    cache.put("d", block(4))
    assert cache.get("b") is None
    assert [cache.get(name) is not None for name in "acd"] == [True] * 3
    assert (cache.bytes, cache.hits, cache.misses, cache.evictions) == (300, 4, 1, 1)


def test_one_large_array_pushes_out_several():
    cache = QueryCache(max_bytes=300)
    for name in "abc":
        cache.put(name, block(0))
    cache.put("large", block(0, count=60))
    assert (cache.bytes, cache.evictions) == (240, 3)


def test_too_large_is_not_kept_and_replacing_counts_once():
    cache = QueryCache(max_bytes=150)
    cache.put("a", block(1))
    cache.put("large", block(0, count=60))
    cache.put("a", block(2))
    assert cache.bytes == 100 and cache.evictions == 0
    assert cache.get("a")[0] == 2 and cache.get("large") is None
    off = QueryCache(max_bytes=0)
    off.put("a", block(1))
    assert off.get("a") is None
    with pytest.raises(InputError, match="found -1"):
        QueryCache(max_bytes=-1)


def test_what_is_kept_cannot_be_changed():
    cache = QueryCache(max_bytes=1000)
    batch = np.stack([block(1), block(2)])
    cache.put("a", batch[0])
    batch[:] = 9
    kept = cache.get("a")
    assert kept[0] == 1 and kept.base is None
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 5


def test_threads_keep_the_books_straight():
    cache = QueryCache(max_bytes=1000)

    def work(offset):
        for step in range(300):
            key = str((step * 7 + offset) % 23)
            found = cache.get(key)
            assert found is None or found[0] == float(key)
            cache.put(key, block(float(key)))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.hits + cache.misses == 1200
    held = [array for array in map(cache.get, map(str, range(23))) if array is not None]
    assert cache.bytes == sum(array.nbytes for array in held) <= 1000
    for first, second in itertools.combinations(held, 2):
        assert first[0] != second[0]
