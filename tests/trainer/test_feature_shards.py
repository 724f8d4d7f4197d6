"""Rows on the disk: found by digest, written by several processes at once, whole or absent whatever was cut off."""

import hashlib
import multiprocessing
import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from trainer import feature_shards
from trainer.feature_shards import DIGEST_BYTES, HEADER_BYTES, ShardReader, ShardWriter

VALUES = 10
ROW_BYTES = HEADER_BYTES + 2 * VALUES


def digest(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:DIGEST_BYTES]


def row(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(VALUES).astype(np.float16)


def write(folder: Path, numbers: range) -> None:
    writer = ShardWriter(folder, ROW_BYTES)
    writer.append([digest(n) for n in numbers], np.stack([row(n) for n in numbers]))
    writer.close()


def read(reader: ShardReader, numbers: range) -> list[int]:
    """The numbers that are found; each with the values it was written with."""
    out = np.zeros((len(numbers), VALUES), np.float16)
    found = reader.read([digest(n) for n in numbers], out)
    for place in np.flatnonzero(found):
        np.testing.assert_array_equal(out[place], row(numbers[place]))
    return [numbers[place] for place in np.flatnonzero(found)]


def test_rows_come_back_from_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 4 * ROW_BYTES)
    monkeypatch.setattr(feature_shards, "OPEN_FILES", 2)
    monkeypatch.setattr(feature_shards, "MERGE_AT", 7)
    writer = ShardWriter(tmp_path, ROW_BYTES)
    for start in range(0, 30, 3):
        writer.append([digest(n) for n in range(start, start + 3)], np.stack([row(n) for n in range(start, start + 3)]))
    assert len(list(tmp_path.glob("*.rows"))) == 5, "a shard is left when it has four rows or more"
    reader = ShardReader(tmp_path, ROW_BYTES)
    assert len(reader) == 30
    assert read(reader, range(-5, 40)) == list(range(30))
    writer.append([digest(n) for n in range(30, 40)], np.stack([row(n) for n in range(30, 40)]))
    assert read(reader, range(28, 40)) == [28, 29]
    assert reader.refresh() == 10
    assert read(reader, range(28, 40)) == list(range(28, 40))
    assert reader.refresh() == 0


@pytest.mark.parametrize("ending", [".rows", ".index"])
@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_torn_tail_is_discarded_and_written_over(tmp_path: Path, ending: str, cut: int) -> None:
    write(tmp_path, range(6))
    (torn,) = tmp_path.glob(f"*{ending}")
    os.truncate(torn, torn.stat().st_size - cut)
    reader = ShardReader(tmp_path, ROW_BYTES)
    assert read(reader, range(6)) == list(range(5))
    write(tmp_path, range(10, 12))
    (data,), (index,) = tmp_path.glob("*.rows"), tmp_path.glob("*.index")
    assert (data.stat().st_size, index.stat().st_size) == (7 * ROW_BYTES, 7 * DIGEST_BYTES), "the tail was cut off"
    reader.refresh()
    assert read(reader, range(12)) == [0, 1, 2, 3, 4, 10, 11]


def test_rows_that_are_no_longer_wanted_leave_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    writer = ShardWriter(tmp_path, ROW_BYTES)
    numbers = range(2, 7)
    given = [digest(n) for n in numbers], np.stack([row(n) for n in numbers])
    assert writer.append(*given, lambda _: nullcontext([1, 4])) == 2
    assert writer.append(*given, lambda _: nullcontext([])) == 0
    assert writer.append([digest(9)], row(9)[None]) == 1
    assert read(ShardReader(tmp_path, ROW_BYTES), range(12)) == [0, 1, 3, 6, 9]
    (data,), (index,) = tmp_path.glob("*.rows"), tmp_path.glob("*.index")
    assert (data.stat().st_size, index.stat().st_size) == (5 * ROW_BYTES, 5 * DIGEST_BYTES)


def test_a_damaged_row_is_absent_and_its_successor_counts(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (data,) = tmp_path.glob("*.rows")
    content = bytearray(data.read_bytes())
    content[ROW_BYTES + HEADER_BYTES] ^= 1
    data.write_bytes(content)
    reader = ShardReader(tmp_path, ROW_BYTES)
    assert read(reader, range(3)) == [0, 2]
    write(tmp_path, range(1, 2))
    assert read(ShardReader(tmp_path, ROW_BYTES), range(3)) == [0, 1, 2]


def test_another_image_with_the_same_first_half_does_not_hit(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    lookalike = digest(1)[:8] + bytes(8)
    out = np.zeros((1, VALUES), np.float16)
    assert not ShardReader(tmp_path, ROW_BYTES).read([lookalike], out).any()


def test_shards_that_vanish_are_absent(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    reader = ShardReader(tmp_path, ROW_BYTES)
    for file in tmp_path.iterdir():
        file.unlink()
    assert read(reader, range(3)) == []
    assert reader.refresh() == 0


def test_a_full_disk_leaves_the_shard_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, ROW_BYTES)
    writer.append([digest(0)], row(0)[None])
    real, calls = os.pwrite, []

    def full(descriptor: int, content: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        writer.append([digest(1), digest(2)], np.stack([row(1), row(2)]))
    monkeypatch.undo()
    assert [file.stat().st_size for file in tmp_path.glob("*.rows")] == [ROW_BYTES]
    writer.append([digest(3)], row(3)[None])
    assert read(ShardReader(tmp_path, ROW_BYTES), range(4)) == [0, 3]


def _writer_process(folder: Path, first: int, started: "multiprocessing.synchronize.Barrier") -> None:
    writer = ShardWriter(folder, ROW_BYTES)
    started.wait()
    for start in range(first, first + 200, 10):
        writer.append(
            [digest(n) for n in range(start, start + 10)], np.stack([row(n) for n in range(start, start + 10)])
        )


def test_processes_that_write_at_once_take_shards_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(3)
    processes = [context.Process(target=_writer_process, args=(tmp_path, 1000 * n, started)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("*.rows"))) <= 3
    reader = ShardReader(tmp_path, ROW_BYTES)
    for n in range(3):
        assert read(reader, range(1000 * n, 1000 * n + 201)) == list(range(1000 * n, 1000 * n + 200))
