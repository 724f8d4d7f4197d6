"""Element types as they lie in device memory; numpy has all of them but bfloat16, which arrays carry as float32."""

from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError
from runtime.precision import carried

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
"""Type → bytes of an element."""
QUIET_NAN = 0x7FC0
"""bfloat16's not-a-number: rounding the bits of one could make an infinity of it."""


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a contiguous array; InputError for a type that no plan has."""
    if dtype not in ITEM_BYTES:
        raise InputError(f"dtype: expected one of {', '.join(ITEM_BYTES)}, found {dtype!r}")
    return int(np.prod(shape, dtype=np.int64)) * ITEM_BYTES[dtype]


def packed(array: npt.NDArray[Any], dtype: str, what: str) -> npt.NDArray[np.uint8]:
    """The bytes of an array as the device has them; InputError, naming `what`, when it is of another type."""
    if array.dtype != carried(dtype):
        raise InputError(f"{what}: expected elements of {carried(dtype)}, found {array.dtype}")
    array = np.ascontiguousarray(array)
    if dtype == "bfloat16":
        bits = array.view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        array = np.where(np.isnan(array), np.uint16(QUIET_NAN), nearest)
    return array.reshape(-1).view(np.uint8)


def unpacked(content: npt.NDArray[np.uint8], shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """An array of its own from bytes as the device has them."""
    if dtype == "bfloat16":
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return content.view(dtype).reshape(shape).copy()
