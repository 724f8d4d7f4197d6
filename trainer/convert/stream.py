"""Weights that are never all in memory: tensors are read one at a time from files and written one at a time into files.

What is read: safetensors (one file, or parts with an index) and PyTorch files (mapped, `weights_only`, never
unpickled freely). What is written: safetensors, in parts when large. A tensor that nobody changes is copied from file
to file in pieces of a few MiB, whatever its type.
"""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.errors import CheckpointError, MissingFile

CHUNK_BYTES = 16 << 20
"""Copied at once."""
LARGEST_PART_BYTES = 5 << 30
"""Weights beyond this are written in parts, as transformers does."""
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Where a Hugging Face folder keeps its weights, in the order they are looked for."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the element types we move."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Chunks: TypeAlias = Iterator[memoryview]


@dataclass(frozen=True)
class Piece:
    """One tensor that can be read, and read again; holding it costs no memory."""

    dtype: str
    """safetensors' name of the element type."""
    shape: tuple[int, ...]
    file: Path
    """Where it comes from, for messages."""
    chunks: Callable[[], Chunks]
    """Its bytes in order, little end first, as safetensors keeps them."""

    @property
    def nbytes(self) -> int:
        """Size (bytes)."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def load(self) -> Tensor:
        """The tensor itself."""
        content = bytearray(self.nbytes)
        place = 0
        for chunk in self.chunks():
            content[place : place + len(chunk)] = chunk
            place += len(chunk)
        if not content:
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).reshape(self.shape)

    def as_type(self, dtype: torch.dtype) -> "Piece":
        """The same numbers in another type, converted when they are read."""
        if DTYPES[self.dtype] == dtype:
            return self
        return Piece(NAMES[dtype], self.shape, self.file, lambda: _bytes_of(self.load().to(dtype)))

    def first_rows(self, rows: int) -> "Piece":
        """The first `rows` of its first axis."""
        kept = Piece(self.dtype, (rows, *self.shape[1:]), self.file, self.chunks)
        return Piece(kept.dtype, kept.shape, kept.file, lambda: _cut(self.chunks(), kept.nbytes))

    def with_row_again(self, row: int, rows: int) -> "Piece":
        """Grown to `rows` of its first axis, each new one a copy of `row`."""

        def grown() -> Chunks:
            yield from self.chunks()
            again = self.load()[row : row + 1].clone()
            for _ in range(rows - self.shape[0]):
                yield from _bytes_of(again)

        return Piece(self.dtype, (rows, *self.shape[1:]), self.file, grown)


Pieces: TypeAlias = dict[str, Piece]


def piece_of(tensor: Tensor, file: Path) -> Piece:
    """A tensor in memory (or mapped from a file) as a piece; CheckpointError for a type we do not move."""
    if tensor.dtype not in NAMES:
        raise CheckpointError(f"{file}: expected tensors of {', '.join(DTYPES)}, found {tensor.dtype}")
    return Piece(NAMES[tensor.dtype], tuple(tensor.shape), file, lambda: _bytes_of(tensor))


def read_weights(folder: Path) -> Pieces:
    """Every tensor of a Hugging Face folder by key.

    Raises:
        MissingFile: no weights, or a part that the index names is not there.
        CheckpointError: a damaged or unsafe file, or an index that contradicts its parts.
    """
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise MissingFile(f"{folder}: expected weights ({' or '.join(WEIGHT_FILES)}), found none of them")
    if found.suffix == ".json":
        return _read_parts(found)
    return read_safetensors(found) if found.suffix == ".safetensors" else read_torch(found)


def read_safetensors(path: Path) -> Pieces:
    """Every tensor of one safetensors file; its bytes stay where they are."""
    try:
        with safe_open(path, "pt"):  # the library checks the header against the file's length
            pass
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: expected weights, found no such file") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy it again from its source") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {key: _in_file(path, key, entry, 8 + length) for key, entry in header.items()}


def read_torch(path: Path) -> Pieces:
    """Every tensor of a PyTorch file with one dictionary of tensors."""
    return {key: piece_of(tensor, path) for key, tensor in load_torch(path).items() if isinstance(tensor, Tensor)}


def load_torch(path: Path) -> dict[str, Any]:
    """The dictionary in a PyTorch file, mapped, not read; nothing that is not data is ever run.

    Raises:
        MissingFile, CheckpointError: not there; damaged; holds more than data; is no dictionary.
    """
    try:
        # Files from before PyTorch 1.6 are no archives and cannot be mapped: those are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: expected weights, found no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected tensors alone (weights_only), found Python objects that would run code when read, or no "
            f"PyTorch file at all; save its state dict with safetensors"
        ) from error
    except Exception as error:  # what is no pickle at all makes the reader raise whatever its bytes happen to mean
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is truncated or damaged ({reason}); copy it again from its source") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(content).__name__}")
    return content


def write_safetensors(path: Path, pieces: Mapping[str, Piece]) -> None:
    """Write one file: the header first, then the tensors, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key, piece in pieces.items():
        header[key] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [place, place + piece.nbytes]}
        place += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, piece in pieces.items():
            start = file.tell()
            for chunk in piece.chunks():
                file.write(chunk)
            if file.tell() - start != piece.nbytes:
                raise CheckpointError(f"{piece.file}: {key} changed while it was read; run the command again")


def write_weights(folder: Path, pieces: Mapping[str, Piece], largest: int = LARGEST_PART_BYTES) -> None:
    """Write `model.safetensors`, or numbered parts of at most `largest` bytes with an index."""
    parts: list[dict[str, Piece]] = [{}]
    for key, piece in pieces.items():
        if parts[-1] and sum(one.nbytes for one in parts[-1].values()) + piece.nbytes > largest:
            parts.append({})
        parts[-1][key] = piece
    if len(parts) == 1:
        write_safetensors(folder / WEIGHT_FILES[0], parts[0])
        return
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        write_safetensors(folder / name, part)
    index = {
        "metadata": {"total_size": sum(piece.nbytes for piece in pieces.values())},
        "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part},
    }
    (folder / WEIGHT_FILES[1]).write_text(json.dumps(index, indent=2) + "\n")


def _read_parts(index: Path) -> Pieces:
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: expected JSON with a weight_map, found a damaged file ({error})") from error
    pieces: Pieces = {}
    for name in dict.fromkeys(places.values()):
        path = index.parent / name
        if path.parent != index.parent:
            raise CheckpointError(f"{index}: expected parts beside it, found {name!r}")
        found = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
        said = {key for key, place in places.items() if place == name}
        if odd := sorted(said ^ found.keys()):
            where = "only in the index" if odd[0] in said else "not in the index"
            raise CheckpointError(
                f"{path}: {len(odd)} tensors differ from {index.name}, the first is {odd[0]} ({where})"
            )
        pieces |= found
    return pieces


def _in_file(path: Path, key: str, entry: Mapping[str, Any], data_start: int) -> Piece:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {key} expected one of the types {', '.join(DTYPES)}, found {entry['dtype']}")
    start, end = (data_start + offset for offset in entry["data_offsets"])

    def chunks() -> Chunks:
        with path.open("rb") as file:
            file.seek(start)
            left = end - start
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{path} became shorter while it was read; run the command again")
                left -= len(chunk)
                yield memoryview(chunk)

    return Piece(entry["dtype"], tuple(entry["shape"]), path, chunks)


def _bytes_of(tensor: Tensor) -> Chunks:
    """The content of a tensor, little end first (the order of every machine PyTorch runs on)."""
    if tensor.numel():
        yield tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _cut(chunks: Chunks, length: int) -> Chunks:
    for chunk in chunks:
        yield chunk[:length]
        length -= len(chunk)
        if length <= 0:
            return
