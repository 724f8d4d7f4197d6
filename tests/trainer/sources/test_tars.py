"""Tar shards as webdataset reads them, images found by their place in the shard."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from runtime.errors import DataError, ImageError, MissingFile
from runtime.files import sha256_of
from runtime.preprocess import load_image
from tests.trainer.sources.conftest import colour
from trainer.sources.check import check_source
from trainer.sources.convert import as_manifest, files_behind
from trainer.sources.detect import format_of
from trainer.sources.rows import ManifestRows
from trainer.sources.source import Source

DAMAGED = "expected an image (JPEG, PNG, WebP, GIF, TIFF, BMP …), found other data"


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    colour(number).save(buffer, "png")
    return buffer.getvalue()


def write_shard(path: Path, samples: list[dict[str, object]]) -> Path:
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards: captions as text, then captions and questions as JSON; a sample without an image among them."""
    text = [{"__key__": f"a/{i:03d}", "png": png(i), "txt": f"picture {i}"} for i in range(3)]
    write_shard(tmp_path / "s-00.tar", [*text, {"__key__": "index", "txt": "no image here"}])
    told = [
        {"__key__": "b/0", "png": png(7), "json": {"caption": "seven", "image_id": 7, "width": 6}},
        {"__key__": "b/1", "png": png(8), "json": {"question": "which?", "answers": ["eight", "8"]}},
        {"__key__": "b/2", "png": png(9), "json": {"turns": [["which?", "nine"]]}, "txt": "nine"},
    ]
    write_shard(tmp_path / "s-01.tar", told)
    return tmp_path / "s-{00..01}.tar"


def test_rows_are_those_of_webdataset(shards: Path) -> None:
    assert format_of(shards) == format_of(shards.parent) == format_of(shards.with_name("s-*.tar")) == "webdataset"
    rows = ManifestRows(as_manifest([Source(shards)]))
    theirs = [s for s in webdataset.WebDataset(str(shards), shardshuffle=False, empty_check=False) if "png" in s]
    assert len(rows) == len(theirs) == 6
    for row, sample in zip(rows, theirs, strict=True):
        assert np.array_equal(np.asarray(load_image(row.image)), np.asarray(load_image(sample["png"])))
        if sample["__key__"].startswith("a"):
            assert row.captions == (sample["txt"].decode(),)
    assert (rows[3].captions, rows[3].image_id, rows[3].extra) == (("seven",), "7", {"width": 6})
    assert (rows[4].question, rows[4].answers) == ("which?", ("eight", "8"))
    assert (rows[5].turns, rows[5].captions) == ((("which?", "nine"),), ("nine",))
    assert len({row.image_id for row in rows}) == 6


def test_an_image_in_a_shard_is_a_path(shards: Path) -> None:
    image = ManifestRows(as_manifest([Source(shards)]))[1].image
    assert image.name == "001.png" and image.is_absolute()
    assert sha256_of(image) == sha256_of_bytes(png(1))
    image_of_nothing = Path(str(image).replace("s-00", "gone"))
    with pytest.raises(ImageError, match=r"expected an image file, found nothing under that name"):
        load_image(image_of_nothing)
    (shards.parent / "s-00.tar").write_bytes(b"")
    with pytest.raises(ImageError, match=r"expected an image .* found other data"):
        load_image(image)


def sha256_of_bytes(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_a_changed_shard_is_read_again(shards: Path, cache: Path) -> None:
    assert len(ManifestRows(as_manifest([Source(shards)]))) == 6
    (made,) = (path for path in cache.iterdir() if path.is_dir())
    before = (made / "stamp.json").stat().st_mtime_ns
    as_manifest([Source(shards)])
    assert (made / "stamp.json").stat().st_mtime_ns == before, "an unchanged one is not"
    write_shard(shards.with_name("s-01.tar"), [{"__key__": "x", "png": png(1), "txt": "one"}])
    assert len(ManifestRows(as_manifest([Source(shards)]))) == 4
    assert [path for path in cache.iterdir() if path.is_dir()] == [made]


def test_shards_that_cannot_be_read(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"s-02.tar: expected a tar shard"):
        files_behind(Source(tmp_path / "s-{00..02}.tar"))
    whole = (tmp_path / "s-01.tar").read_bytes()
    (tmp_path / "s-01.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"s-01.tar: expected an uncompressed tar"):
        as_manifest([Source(shards)])
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    with pytest.raises(DataError, match="a compressed one is to be unpacked first"):
        as_manifest([Source(tmp_path / "packed.tar", format="webdataset")])


def test_the_check_counts_and_names(tmp_path: Path) -> None:
    samples = [
        {"__key__": "0", "png": png(0), "txt": "zero"},
        {"__key__": "1", "png": png(1)[:40], "txt": "one"},
        {"__key__": "2", "png": png(2), "txt": " "},
        {"__key__": "3", "png": png(3), "json": json.dumps(["a"]).encode()},
    ]
    report = check_source(Source(write_shard(tmp_path / "t.tar", samples)))
    assert (report.rows, report.images, report.captions, report.modes) == (4, 2, 2, {"RGB": 1})
    empty, odd, broken = report.problems
    assert empty == f"{tmp_path}/t.tar/2: expected text under 'captions', found empty text"
    assert odd.startswith(f"{tmp_path}/t.tar/3.json: expected one JSON object")
    assert broken.startswith(f"{tmp_path}/t.tar/1: ") and broken.endswith("1.png: " + DAMAGED)
