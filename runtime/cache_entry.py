"""One array as the bytes of a file, and back only when every one of them is as it was written.

    qforge query cache 1
    <SHA-256 of all that follows, in hex>
    {"key": "…", "dtype": "<f4", "shape": [32, 768]}
    <the array, C order>

The first line names the format and its version. The key says which entry it is, so that a file that was moved under
another name is not taken for that one. No pickle: the element type is one of numpy's plain numbers.
"""

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt

MAGIC = b"qforge query cache 1\n"
_BODY = len(MAGIC) + 65  # the digest in hex and its line end
ALIGNMENT = 16
"""The header is padded so that the array begins at a multiple of this (bytes)."""


class DamagedEntry(ValueError):
    """Bytes that are not the entry that was asked for, whole and unchanged."""


def encode(key: str, array: npt.NDArray[Any]) -> bytes:
    """The bytes of an entry; the array holds floats or integers."""
    if array.dtype.kind not in "fiu":
        raise TypeError(f"expected an array of floats or integers, found {array.dtype}")
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    header = json.dumps({"key": key, "dtype": little.dtype.str, "shape": list(array.shape)}).encode()
    header += b" " * (-(_BODY + len(header) + 1) % ALIGNMENT) + b"\n"
    digest = hashlib.sha256(header)
    digest.update(little.data)
    return b"".join((MAGIC, digest.hexdigest().encode(), b"\n", header, little.data))


def decode(content: bytes, key: str) -> npt.NDArray[Any]:
    """The array (read-only) of the entry `key`.

    Raises:
        DamagedEntry: other bytes than `encode` gave for this key.
    """
    digest, line_end = content[len(MAGIC) : _BODY - 1], content[_BODY - 1 : _BODY]
    if not content.startswith(MAGIC) or line_end != b"\n":
        raise DamagedEntry("not an entry of this version")
    if hashlib.sha256(memoryview(content)[_BODY:]).hexdigest().encode() != digest:
        raise DamagedEntry("changed or cut since it was written")
    try:
        start = content.index(b"\n", _BODY) + 1
        header = json.loads(content[_BODY:start])
        dtype, shape, found = np.dtype(header["dtype"]), list(header["shape"]), header["key"]
        array = np.frombuffer(content, dtype, offset=start).reshape(shape)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedEntry("a header that no writer of ours makes") from error
    if found != key or dtype.kind not in "fiu" or list(array.shape) != shape:
        raise DamagedEntry("the entry of another key or type")
    return array
