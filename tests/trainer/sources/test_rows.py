"""A manifest read row by row has the rows of the list reader, whatever its lines look like, and flat memory."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from runtime.dataset import read_manifest
from runtime.errors import DataError, InputError, MissingFile
from trainer.sources import cache as cache_module
from trainer.sources import rows as rows_module
from trainer.sources.mixture import MixedRows, Part, open_rows, split_rows
from trainer.sources.rows import ManifestRows
from trainer.sources.source import Source

ODD = "\ufeff" + "\n \t \n".join(
    [
        '{"image": "ä.png", "captions": ["eins"]}',
        '  {"image": "2.png", "image_id": 2, "captions": ["zwei"]}\r',
        '{"image": "3.png", "question": "drei?"}',
    ]
)


def write(path: Path, count: int, first: int = 0) -> Path:
    lines = (
        json.dumps({"image": f"{i // 3}.png", "image_id": f"i{i // 3}", "captions": [f"text {i}"]})
        for i in range(first, first + count)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=[5, 64, 2**20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Line ends fall within pieces and between them; the index goes to the disk."""
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(rows_module, "SMALL_BYTES", 0)
    return request.param


@pytest.mark.parametrize("text", [ODD, ODD + "\n", ODD + "\n\n\r\n  ", "\n\n" + ODD[1:]])
def test_rows_are_those_of_the_list_reader(tmp_path: Path, chunk: int, text: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(text.encode())
    rows = ManifestRows(path)
    assert list(rows) == read_manifest(path)
    assert [rows[-1], rows[0]] == [read_manifest(path)[2], read_manifest(path)[0]]
    assert rows[1:] == read_manifest(path)[1:]
    assert list(rows.image_ids()) == [row.image_id for row in rows]
    with pytest.raises(IndexError):
        rows[3]


def test_a_wrong_line_is_named_when_it_is_asked_for(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "m.jsonl"
    good = b'{"image": "a.png", "captions": ["x"]}\n'
    path.write_bytes(good + b"\n" + b'{"image": 3}\n' + good + b'{"image": "\xff"}\n')
    rows = ManifestRows(path)
    assert len(rows) == 4 and rows[2].captions == ("x",)
    with pytest.raises(DataError, match=r"m.jsonl:3: expected text under 'image', found 3"):
        rows[1]
    with pytest.raises(DataError, match=r"m.jsonl:5: expected UTF-8 text"):
        rows[3]


def test_rows_that_have_not_what_they_are_read_for(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"image": "a.png", "captions": ["x"]}\n{"image": "a.png", "question": "q"}\n'
        '{"image": "a.png", "question": "q", "answers": ["a"]}\n{"image": "a.png", "turns": [["q", "a"]]}\n'
    )
    captions, questions = ManifestRows(path, "captions"), ManifestRows(path, "questions")
    assert captions[0].captions == ("x",) and questions[2].answers == ("a",) and questions[3].turns == (("q", "a"),)
    with pytest.raises(DataError, match=r"m.jsonl:3: expected a row with captions, found one without"):
        captions[2]
    with pytest.raises(DataError, match=r"m.jsonl:2: expected a row with a question and its answers"):
        questions[1]


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"none.jsonl: expected a manifest"):
        ManifestRows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="found a folder"):
        ManifestRows(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="empty data set"):
        ManifestRows(tmp_path / "empty.jsonl")


def test_an_index_is_made_once_and_again_when_the_file_changed(tmp_path: Path, cache: Path, chunk: int) -> None:
    path = write(tmp_path / "m.jsonl", 9)
    assert len(ManifestRows(path)) == 9
    (index,) = (folder for folder in cache.iterdir() if folder.is_dir())
    made = (index / "starts.i64").stat().st_ino
    assert len(ManifestRows(path)) == 9 and (index / "starts.i64").stat().st_ino == made
    old = ManifestRows(path)
    write(path, 12)
    assert len(ManifestRows(path)) == 12
    assert len(old) == 9, "who read the old index keeps it"
    assert [folder for folder in cache.iterdir() if folder.is_dir()] == [index]


def test_processes_that_ask_at_once_make_one_index(tmp_path: Path, cache: Path) -> None:
    path, made = write(tmp_path / "m.jsonl", 3), list[int]()

    def ask() -> None:
        with cache_module.cached_folder("x", {}, [path], lambda folder: made.append(1)):
            pass

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_cache_that_cannot_be_written(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"m.jsonl cannot be written there .* set XDG_CACHE_HOME"):
        ManifestRows(write(tmp_path / "m.jsonl", 3))


def test_data_sets_laid_end_to_end(tmp_path: Path) -> None:
    rows = open_rows([Source(write(tmp_path / "a.jsonl", 3)), Source(write(tmp_path / "b.jsonl", 4, 100), weight=2)])
    assert isinstance(rows, MixedRows) and len(rows) == 7
    assert [row.captions[0] for row in rows] == [f"text {i}" for i in (0, 1, 2, 100, 101, 102, 103)]
    assert rows[-1].captions == ("text 103",) and [row.captions for row in rows[2:4]] == [("text 2",), ("text 100",)]
    assert [(len(part.rows), part.weight) for part in rows.parts] == [(3, 1.0), (4, 2)]
    with pytest.raises(IndexError):
        MixedRows([Part([], 1.0)])[0]


@pytest.mark.parametrize("small", [True, False])
def test_an_image_is_held_out_with_all_its_rows(tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.sources.mixture.SMALL_BYTES", 10**9 if small else 0)
    path = write(tmp_path / "m.jsonl", 3000)
    kept, watched = split_rows([Source(path)], 0.1)
    ids = {row.image_id for row in kept}, {row.image_id for row in watched}
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 1000
    assert len(kept) + len(watched) == 3000 and 60 < len(ids[1]) < 140
    assert [row.captions for row in split_rows([Source(path)], 0.1)[1]] == [row.captions for row in watched]
    with pytest.raises(DataError, match="holding out 10% of its images leaves"):
        split_rows([Source(write(tmp_path / "one.jsonl", 3))], 0.1)


def test_ten_million_places_are_mapped_not_read(tmp_path: Path, chunk: int) -> None:
    rows = ManifestRows(write(tmp_path / "m.jsonl", 50))
    assert isinstance(rows._starts, np.memmap) and rows._starts.itemsize == 8
