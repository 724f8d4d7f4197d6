"""An entry is read as it was written, or not at all."""

import numpy as np
import pytest

from runtime.cache_entry import ALIGNMENT, MAGIC, DamagedEntry, decode, encode

KEY, OTHER = "5" * 64, "6" * 64
ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.arange(12, dtype=np.float16).reshape(2, 6)[:, ::2],
    np.float32(7).reshape(()),
    np.zeros((0, 5), np.float32),
    np.array([1.5, np.nan, -np.inf], ">f4"),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_an_array_comes_back(array):
    content = encode(KEY, array)
    found = decode(content, KEY)
    assert (found.shape, found.dtype) == (array.shape, array.dtype.newbyteorder("<"))
    assert np.array_equal(found, array, equal_nan=True)
    assert not found.flags.writeable and found.flags.aligned
    assert (len(content) - array.nbytes) % ALIGNMENT == 0


def test_a_flipped_bit_anywhere_is_found():
    """The line of the format, the checksum, the key, type and shape, the padding, the array."""
    content = encode(KEY, ARRAYS[0])
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            with pytest.raises(DamagedEntry):
                decode(bytes(flipped), KEY)


def test_a_cut_or_longer_entry_is_found():
    content = encode(KEY, ARRAYS[0])
    for wrong in [*(content[:length] for length in range(len(content))), content + b"\0", content + content]:
        with pytest.raises(DamagedEntry):
            decode(wrong, KEY)


def test_the_entry_of_another_key_is_not_taken():
    with pytest.raises(DamagedEntry, match="another key"):
        decode(encode(OTHER, ARRAYS[0]), KEY)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"key": "KEY", "dtype": "O", "shape": [1]}',
        b'{"key": "KEY", "dtype": "<f4", "shape": [3]}',
        b'{"key": "KEY", "dtype": "<f4", "shape": [-1]}',
        b'{"key": "KEY", "dtype": "<f4", "shape": 2}',
        b'{"key": "KEY", "dtype": "V4", "shape": [2]}',
        b'{"key": "KEY", "dtype": "no type", "shape": [2]}',
        b"\xff\xfe",
    ],
)
def test_a_foreign_header_with_a_right_checksum_is_not_taken(header):
    import hashlib

    body = header.replace(b"KEY", KEY.encode()) + b"\n" + bytes(8)
    content = MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    with pytest.raises(DamagedEntry):
        decode(content, KEY)


def test_only_plain_numbers_are_written():
    with pytest.raises(TypeError, match="object"):
        encode(KEY, np.array([{}], object))
