"""The order of a shuffled epoch without a list of it: place → row is a bijection that is computed, not stored.

A permutation of ten million rows as an array is 80 MB and a second of work per epoch and process. Beyond 65,536 rows
a Feistel network takes its place (Luby & Rackoff 1988): eight rounds of a keyed hash permute the smallest domain of
4^k numbers that holds all rows, and a number that is none of theirs is permuted again until it is one
("cycle walking", Black & Rogaway 2002), fewer than four times on average.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

LISTED = 65_536
"""Most rows whose order is an array."""
ROUNDS = 8

Numbers = npt.NDArray[np.uint64]


def shuffled(places: npt.NDArray[np.int64], count: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Which of `count` rows lie at `places` (each below `count`) of the order that `key` names."""
    if count <= LISTED:
        return _listed(count, key)[places]
    return feistel(places, count, key)


def feistel(places: npt.NDArray[np.int64], count: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """`shuffled` by the network, for any count of at least two."""
    half_bits = np.uint64((max(count - 1, 1).bit_length() + 1) // 2)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64).astype(np.uint64)
    rows = _permuted(places.astype(np.uint64), half_bits, round_keys)
    while (outside := rows >= count).any():
        rows[outside] = _permuted(rows[outside], half_bits, round_keys)
    return rows.astype(np.int64)


@lru_cache(maxsize=8)
def _listed(count: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    order = np.random.default_rng(key).permutation(count)
    order.flags.writeable = False
    return order


def _permuted(numbers: Numbers, half_bits: np.uint64, round_keys: Numbers) -> Numbers:
    """One pass through the network: the domain is all numbers of twice `half_bits` bits."""
    low = np.uint64((1 << int(half_bits)) - 1)
    left, right = numbers >> half_bits, numbers & low
    for round_key in round_keys:
        left, right = right, left ^ (_mixed(right ^ round_key) & low)
    return (left << half_bits) | right


def _mixed(numbers: Numbers) -> Numbers:
    """A hash of 64 bits (the finalizer of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
