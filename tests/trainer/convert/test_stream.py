"""Weights pass through without ever being in memory; what is written is what other readers read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import CheckpointError
from trainer.convert import stream
from trainer.convert.stream import piece_of, read_safetensors, read_weights, write_safetensors, write_weights

MIB = 1 << 20
PART_MIB, PARTS = 48, 4


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


PEAK = """
import resource, sys
from pathlib import Path
import torch
from trainer.convert.stream import read_weights, write_weights

def rss(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

before = rss("VmRSS:")
pieces = read_weights(Path(sys.argv[1]))
changed = {key: piece.as_type(torch.float32) if key.startswith("bridge") else piece for key, piece in pieces.items()}
out = Path(sys.argv[2])
out.mkdir()
write_weights(out, changed)
print(rss("VmHWM:") - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of 48 MiB: one tensor of 24, one of 16, and small ones, in half precision."""
    folder = tmp_path_factory.mktemp("large")
    places = {}
    for n in range(PARTS):
        sizes = {f"language.{n}": 24, f"tower.{n}": 16, **{f"bridge.{n}.{i}": 1 for i in range(8)}}
        part = {key: torch.full((size * MIB // 2,), float(n)).half() for key, size in sizes.items()}
        name = f"model-{n + 1:05d}-of-{PARTS:05d}.safetensors"
        save_file(part, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_peak_memory_stays_below_the_largest_part(large: Path, tmp_path: Path) -> None:
    """Growth of the whole process (resident, mapped pages included) over what Python with PyTorch had before."""
    assert sum(path.stat().st_size for path in large.glob("*.safetensors")) > PARTS * PART_MIB * MIB
    command = [sys.executable, "-c", PEAK, str(large), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * PART_MIB * MIB
    found = read_weights(tmp_path / "out")
    assert found["bridge.0.0"].dtype == "F32"
    assert len(found) == PARTS * 10


def test_chunks_are_small() -> None:
    assert stream.CHUNK_BYTES <= 16 * MIB
