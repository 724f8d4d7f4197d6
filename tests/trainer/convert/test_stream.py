"""Weights pass through without ever being in memory; what is written is what other readers read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import CheckpointError
from trainer.convert import stream
from trainer.convert.stream import piece_of, read_safetensors, read_weights, write_safetensors, write_weights

MIB = 1 << 20


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(0.07),
        "empty": torch.empty(0, 4),
        "numbers": torch.arange(6).reshape(2, 3),
        "turned": torch.randn(4, 3).T,
    }


def test_what_is_written_is_read_by_safetensors_itself(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {k: piece_of(t, tmp_path) for k, t in tensors().items()})
    found = load_file(tmp_path / "a.safetensors")
    assert all(
        torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors().items()
    )
    again = read_safetensors(tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.safetensors", again)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(torch.equal(piece.load(), tensors()[key]) for key, piece in again.items())


def test_parts_have_an_index_and_no_part_is_too_large(tmp_path: Path) -> None:
    many = {f"layer.{n}": torch.full((100,), float(n)) for n in range(9)}
    write_weights(tmp_path, {key: piece_of(tensor, tmp_path) for key, tensor in many.items()}, largest=900)
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert [part.name for part in parts][:2] == ["model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 9 * 400
    assert all(torch.equal(piece.load(), many[key]) for key, piece in read_weights(tmp_path).items())


def test_pieces_convert_shrink_and_grow(tmp_path: Path) -> None:
    rows = torch.arange(12.0).reshape(4, 3).half()
    save_file({"rows": rows}, tmp_path / "a.safetensors")
    piece = read_safetensors(tmp_path / "a.safetensors")["rows"]
    assert torch.equal(piece.as_type(torch.float32).load(), rows.float())
    assert torch.equal(piece.first_rows(2).load(), rows[:2])
    assert torch.equal(piece.with_row_again(0, 6).load(), torch.cat([rows, rows[:1], rows[:1]]))
    assert torch.equal(piece.with_row_again(0, 6).first_rows(4).load(), rows)


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
    piece = read_safetensors(tmp_path / "a.safetensors")["a"]
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:900])
    with pytest.raises(CheckpointError, match="became shorter"):
        write_safetensors(tmp_path / "b.safetensors", {"a": piece})


def test_types_we_do_not_move_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found torch\.complex64"):
        piece_of(torch.zeros(2, dtype=torch.complex64), tmp_path)


def test_chunks_are_small() -> None:
    assert stream.CHUNK_BYTES <= 16 * MIB
