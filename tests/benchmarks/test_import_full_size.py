"""The full-size measurement at a thirtieth of the size: an import keeps less than one part in memory."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.import_full_size import SHAPES, measure, run, write_folder
from runtime.errors import InputError
from trainer.convert.stream import read_weights

COMMITTED = Path(__file__).parent.parent.parent / "benchmarks/results/import-opt-2.7b.json"
LIMIT = 1.3
"""Peak growth over the largest part."""


def test_peak_memory_stays_below_the_largest_part(tmp_path: Path) -> None:
    """Growth of the whole process, mapped pages of files included."""
    result = run("tiny", tmp_path)
    assert result["source"]["parts"] > 3
    assert result["source"]["weights_bytes"] > 150 << 20
    assert result["memory_bytes"]["grown"]["resident"] < LIMIT * result["source"]["largest_part_bytes"]
    assert not list(tmp_path.iterdir()), "what was generated is gone again"


def test_pytorch_files_are_mapped_not_read(tmp_path: Path) -> None:
    """Pages of the file come and go with the system's cache; what the process keeps itself is small."""
    source = tmp_path / "source"
    write_folder(source, SHAPES["tiny"])
    tensors = {key: piece.load() for key, piece in read_weights(source).items()}
    for path in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    size = (source / "pytorch_model.bin").stat().st_size
    measured = measure(source, tmp_path / "checkpoint")
    assert measured["peak"]["anonymous"] - measured["before"]["anonymous"] < size / 3


def test_nothing_of_the_users_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match="expected a folder without source/ and checkpoint/"):
        run("tiny", tmp_path)


def test_the_committed_result_holds_the_promise() -> None:
    result = json.loads(COMMITTED.read_text())
    assert result["source"]["weights_bytes"] > 7.4e9
    assert result["memory_bytes"]["peak"]["resident"] < 24 * 2**30
    assert result["memory_bytes"]["grown"]["resident"] < LIMIT * result["source"]["largest_part_bytes"]
