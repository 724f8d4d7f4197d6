"""Hugging Face datasets as the datasets library reads them."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from runtime.errors import BackendUnavailable, DataError
from runtime.preprocess import load_image
from tests.trainer.sources.conftest import colour
from trainer.sources.check import check_source
from trainer.sources.convert import as_manifest
from trainer.sources.detect import format_of
from trainer.sources.rows import ManifestRows
from trainer.sources.source import Source


def numbers(count: int) -> datasets.Dataset:
    """Pictures with captions; the fifth has none of either text."""
    table = {
        "image": [colour(i) for i in range(count)],
        "caption": [[f"picture {i}", f"number {i}"] for i in range(count)],
        "image_id": [100 + i for i in range(count)],
        "unused": [0.5] * count,
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("int64"),
            "unused": datasets.Value("float32"),
        }
    )
    return datasets.Dataset.from_dict(table, features)


def assert_same(source: Source, theirs: datasets.Dataset) -> None:
    assert format_of(source.path) == "huggingface"
    rows = ManifestRows(as_manifest([source]))
    assert len(rows) == len(theirs)
    for row, sample in zip(rows, theirs, strict=True):
        assert row.captions == tuple(sample["caption"]) and row.image_id == str(sample["image_id"])
        assert np.array_equal(np.asarray(load_image(row.image)), np.asarray(sample["image"].convert("RGB")))


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    numbers(7).save_to_disk(tmp_path / "set", num_shards=2)
    assert_same(Source(tmp_path / "set"), datasets.load_from_disk(tmp_path / "set"))


def test_splits_of_a_dictionary(tmp_path: Path) -> None:
    both = datasets.DatasetDict({"train": numbers(3), "validation": numbers(2)})
    both.save_to_disk(tmp_path / "set")
    assert_same(Source(tmp_path / "set", split="validation"), both["validation"])
    assert len(ManifestRows(as_manifest([Source(tmp_path / "set", split="all")]))) == 5
    with pytest.raises(DataError, match=r"as it has 2 \(train, validation\); name one \(split: train\)"):
        as_manifest([Source(tmp_path / "set")])


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = numbers(300)
    found.to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    numbers(2).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    assert_same(Source(tmp_path, split="train"), found)
    assert_same(Source(tmp_path / "data/test-00000-of-00001.parquet"), numbers(2))


def test_images_beside_the_table(tmp_path: Path, draw) -> None:
    paths = [str(draw(tmp_path / f"pictures/{i}.png", i)) for i in range(2)]
    columns = {"image": paths, "question": ["what?", "why?"], "answers": [["a", "a", "b"], []]}
    found = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    found.save_to_disk(tmp_path / "set")
    first, second = ManifestRows(as_manifest([Source(tmp_path / "set")]))
    assert (first.question, first.answers, second.answers) == ("what?", ("a", "a", "b"), ())
    assert [load_image(row.image).size for row in (first, second)] == [(6, 4), (6, 4)]


def test_the_check_knows_this_format(tmp_path: Path) -> None:
    both = {"train": numbers(3), "test": numbers(1)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "set")
    report = check_source(Source(tmp_path / "set", split="train"))
    assert report.ok and (report.rows, report.images, report.captions) == (3, 3, 6)


def test_what_is_no_image_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "words")
    with pytest.raises(DataError, match=r"expected a column 'image' of bytes.* found text"):
        as_manifest([Source(tmp_path / "words")])
    (tmp_path / "odd.arrow").write_bytes(b"not arrow at all, by any means")
    with pytest.raises(DataError, match=r"odd.arrow: expected an Arrow file"):
        as_manifest([Source(tmp_path / "odd.arrow")])
    table = pa.table({"image": [colour(i).tobytes() * 50 for i in range(3)], "caption": ["x"] * 3})
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    sink = pa.OSFile(str(tmp_path / "packed.arrow"), "wb")
    with sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="expected uncompressed record batches"):
        as_manifest([Source(tmp_path / "packed.arrow")])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'qforge\[data\]'"):
        as_manifest([Source(tmp_path / "words", split="all")])
