"""Captions that fit are kept: ranking on planted similarities, plumbing on the tiny bundle, jobs that were killed."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime import filter_job
from runtime.answers import Alternative, Answer, Request
from runtime.caption_filter import Counts, How, Scored, distinct, filter_rows, rank
from runtime.dataset import read_manifest
from runtime.dataset_check import check_manifest
from runtime.decoding import GREEDY, Decoding
from runtime.errors import CheckFailed, DataError, InputError, MissingFile
from runtime.filter_job import Job, filter_manifest
from runtime.preprocess import ImageSource
from runtime.retrieval import Floats, ImageEmbeddings
from tests.runtime.both_heads import write_bundle_with_both_heads

HOW = How(captions=3, keep=2, top_p=0.9, temperature=1.0, seed=5, max_new_tokens=None, at_once=3)
COLOURS = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 90)}


class Painter:
    """Describes every image as told, and counts the images; refuses anything but draws with HOW's settings."""

    def __init__(self, says: Sequence[str]) -> None:
        self.says, self.described = list(says), 0
        self.dies_at: int | None = None

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        if self.dies_at is not None and self.described >= self.dies_at:
            raise KeyboardInterrupt
        self.described += len(requests)
        assert decoding == Decoding(do_sample=True, top_p=0.9, seed=5, num_return_sequences=3)
        first, *others = self.says
        return [Answer(None, None, first, (), {}, tuple(Alternative(o, ()) for o in others)) for _ in requests]


class Critic:
    """Similarity by the letters a text and the name of an image's colour share, so that every score can be told."""

    max_batch = 2

    def embed_images(self, images: Sequence[ImageSource]) -> ImageEmbeddings:
        assert len(images) <= self.max_batch
        strongest = [int(np.argmax(np.asarray(image)[0, 0])) for image in images]
        features_BQF = np.stack([np.stack([letters(list(COLOURS)[s]), letters("zzz")]) for s in strongest])
        return ImageEmbeddings(features_BQF, np.zeros((len(images), 1, 1), np.float32))

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        assert len(texts) <= self.max_batch
        return np.stack([letters(text) for text in texts])

    def match(self, image_embeds_BNE: Floats, texts: Sequence[str]) -> Floats:
        raise AssertionError("captions are ranked by contrast alone")


def letters(text: str) -> Floats:
    counts = np.array([text.lower().count(chr(97 + place)) for place in range(26)], np.float32)
    return counts / np.linalg.norm(counts)


def cosine(text: str, colour: str) -> float:
    return float(letters(text) @ letters(colour))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Seven rows: three colours with a right and a wrong caption, a broken and a missing image, two questions."""
    (tmp_path / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (9, 7), colour).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"not a picture")
    rows = [
        *({"image": f"images/{name}.png", "captions": [name, "spam"], "licence": name} for name in COLOURS),
        {"image": "images/broken.png", "captions": ["a caption"]},
        {"image": "images/missing.png", "image_id": 7, "captions": ["a caption"]},
        {"image": "images/red.png", "question": "what colour?", "answers": ["red"]},
        {"image": "images/red.png", "image_id": "r2", "captions": ["red"], "question": "why?", "answers": ["so"]},
    ]
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(manifest: Path, name: str = "out/filtered.jsonl", how: How = HOW, **changes: str) -> Job:
    return Job(manifest, manifest.parent / name, how, 2, {"generator": "g", "scorer": "s"} | changes)


def test_captions_are_one_by_their_words() -> None:
    found = distinct(["A red circle.", "two", "..."], ["a red circle", "blue", "Blue!", ""])
    assert found == {"A red circle.": "original", "two": "original", "blue": "synthetic"}


def test_best_first_and_of_equal_ones_the_original() -> None:
    texts = distinct(["o1", "o2"], ["s1", "s2"])
    assert rank(texts, [0.1, 0.7, 0.9, 0.7]) == [
        Scored("s1", 0.9, "synthetic"),
        Scored("o2", 0.7, "original"),
        Scored("s2", 0.7, "synthetic"),
        Scored("o1", 0.1, "original"),
    ]


def test_the_fitting_captions_win(manifest: Path) -> None:
    """Planted: "red" fits red best, "spam" nothing; of what is made "reed" nearly fits red, "bluey" nearly blue."""
    done = filter_rows(Painter(["reed", "Bluey!", "reed"]), Critic(), read_manifest(manifest)[:3], HOW)
    kept = [[(caption.text, caption.origin) for caption in of_row] for _, of_row in done.rows]
    assert kept == [
        [("red", "original"), ("reed", "synthetic")],
        [("green", "original"), ("reed", "synthetic")],
        [("blue", "original"), ("Bluey!", "synthetic")],
    ]
    for (row, of_row), colour in zip(done.rows, COLOURS, strict=True):
        assert row.image.stem == colour
        for caption in of_row:
            assert caption.score == pytest.approx(cosine(caption.text, colour), abs=1e-6)
    counts = done.counts
    assert (counts.images, counts.original, counts.synthetic) == (3, 6, 6)
    assert (counts.kept_original, counts.kept_synthetic) == (3, 3)
    assert counts.before == pytest.approx(3 + sum(cosine("spam", colour) for colour in COLOURS), abs=1e-5)
    assert counts.after > counts.before


def test_what_cannot_be_filtered(manifest: Path) -> None:
    rows = read_manifest(manifest)
    done = filter_rows(Painter(["", "!", "..."]), Critic(), rows, How(3, 5, 0.9, 1.0, 5, None, 3))
    assert [(row.image.name, len(kept)) for row, kept in done.rows] == [
        *(("red.png", 2), ("green.png", 2), ("blue.png", 2), ("red.png", 0), ("red.png", 1))
    ]
    assert sorted(Path(path).name for path in done.broken) == ["broken.png", "missing.png"]
    unsaid = manifest.with_name("unsaid.jsonl")
    unsaid.write_text(json.dumps({"image": "images/red.png", "captions": ["!.", "\ud800 half", "a\x00b"]}) + "\n")
    done = filter_rows(Painter(["", "!", "..."]), Critic(), read_manifest(unsaid), HOW)
    assert (done.rows, done.wordless, done.counts) == ([], [str(rows[0].image)], Counts())
    for wrong in ({"captions": 0}, {"keep": 0}, {"at_once": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            How(**(vars(HOW) | wrong))

    class Blind(Critic):
        def embed_texts(self, texts: Sequence[str]) -> Floats:
            return np.full((len(texts), 26), np.nan, np.float32)

    with pytest.raises(CheckFailed, match="found NaN"):
        filter_rows(Painter(["a", "b", "c"]), Blind(), rows[:1], HOW)


def test_more_captions_than_fit_at_once_are_drawn_in_rounds() -> None:
    rounds = list(How(8, keep=2, top_p=0.9, temperature=1.0, seed=5, max_new_tokens=None, at_once=3).decodings())
    assert [decoding.num_return_sequences for decoding in rounds] == [3, 3, 2]
    assert rounds[0].seed == 5
    assert len({decoding.seed for decoding in rounds}) == 3, "a round draws other captions than the one before"


def test_the_result_is_a_manifest(manifest: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = filter_manifest(
        job(manifest), Painter(["reed", "bluey", "x"]), Critic(), lambda *told: seen.append(told)
    ).as_json()
    out = manifest.parent / "out" / "filtered.jsonl"
    assert seen[0] == (0, 7)
    assert seen[-1] == (7, 7)
    assert check_manifest(out).ok
    rows = read_manifest(out)
    same = [row.image for row in read_manifest(manifest) if row.image.stem in COLOURS]
    assert [row.image.resolve() for row in rows] == [image.resolve() for image in same]
    assert [row.image_id for row in rows] == [
        *("images/red.png", "images/green.png", "images/blue.png", "images/red.png", "r2")
    ]
    assert rows[0].captions == ("red", "reed")
    assert [score["origin"] for score in rows[0].extra["caption_scores"]] == ["original", "synthetic"]
    assert rows[0].extra["caption_scores"][0]["score"] == 1.0
    assert rows[0].extra["licence"] == "red"
    assert (rows[3].question, rows[3].captions, rows[3].extra) == ("what colour?", (), {})
    assert (rows[4].question, rows[4].captions, rows[4].answers) == ("why?", ("red", "reed"), ("so",))
    assert summary["images"] == 4
    assert summary["captions"] == {"original": 7, "synthetic": 12}
    assert sum(summary["kept"].values()) == 8
    assert summary["mean_similarity"]["after"] > summary["mean_similarity"]["before"]
    assert sorted(Path(path).name for path in summary["broken"]) == ["broken.png", "missing.png"]
    assert [file.name for file in out.parent.iterdir()] == ["filtered.jsonl"]
    with pytest.raises(InputError, match=r"filtered.jsonl is there already"):
        filter_manifest(job(manifest), Painter("abc"), Critic())


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_killed_job_goes_on(manifest: Path, torn: int) -> None:
    filter_manifest(job(manifest, "whole.jsonl"), Painter(["reed", "bluey", "x"]), Critic())
    painter = Painter(["reed", "bluey", "x"])
    painter.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        filter_manifest(job(manifest, "cut.jsonl"), painter, Critic())
    assert painter.described == 3, "two pieces: rows 0 and 1, and row 2 beside the broken image"
    assert not (manifest.parent / "cut.jsonl").exists()
    partial = manifest.parent / ".cut.jsonl.partial"
    with partial.open("ab") as file:
        file.write(b'{"rows": [{"image": "never finis'[:torn])
    painter.dies_at = None
    summary = filter_manifest(job(manifest, "cut.jsonl"), painter, Critic()).as_json()
    assert painter.described == 4, "no image is described twice"
    assert (manifest.parent / "cut.jsonl").read_bytes() == (manifest.parent / "whole.jsonl").read_bytes()
    assert summary["images"] == 4
    assert not partial.exists()


def test_a_job_goes_on_as_it_began(manifest: Path) -> None:
    painter = Painter(["reed", "bluey", "x"])
    painter.dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        filter_manifest(job(manifest), painter, Critic())
    for other in (job(manifest, scorer="another"), job(manifest, how=How(3, 1, 0.9, 1.0, 5, None, 3))):
        with pytest.raises(InputError, match=r"found another (scorer|keep) \(there"):
            filter_manifest(other, painter, Critic())
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(InputError, match="found another manifest"):
        filter_manifest(job(manifest), painter, Critic())


def test_two_jobs_do_not_write_one_result(manifest: Path) -> None:
    class Meddler(Painter):
        def answer(self, requests: Sequence[Request], **how) -> list[Answer]:
            with pytest.raises(InputError, match="another process is filtering"):
                filter_manifest(job(manifest), Painter("abc"), Critic())
            return super().answer(requests, **how)

    filter_manifest(job(manifest), Meddler(["reed", "bluey", "x"]), Critic())


def test_wrong_manifests_stop_the_job_before_it_begins(manifest: Path, tmp_path: Path) -> None:
    painter = Painter("abc")
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"image": "a.png", "question": "?", "answers": []}) + "\n")
    with pytest.raises(DataError, match="expected rows with captions"):
        filter_manifest(job(questions), painter, Critic())
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(manifest.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"wrong.jsonl:8: expected the key 'image'"):
        filter_manifest(job(wrong), painter, Critic())
    with pytest.raises(MissingFile):
        filter_manifest(job(tmp_path / "none.jsonl"), painter, Critic())
    assert painter.described == 0


def test_a_bundle_describes_and_ranks(manifest: Path, tmp_path: Path) -> None:
    """The tiny bundle says "a red" of a red image; the planted wrong captions name another colour and lose."""
    bundle = write_bundle_with_both_heads(tmp_path / "bundle")
    rows = [
        {"image": "images/red.png", "captions": ["photo of blue", "green"]},
        {"image": "images/green.png", "captions": ["a green photo", "blue"]},
    ]
    path = tmp_path / "noisy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = []
    for name, piece in (("one.jsonl", 1), ("two.jsonl", 2)):
        with runtime.load(bundle) as generator, runtime.load_retrieval(bundle) as scorer:
            filter_manifest(Job(path, tmp_path / name, HOW, piece, {}), generator, scorer)
        results.append((tmp_path / name).read_bytes())
    assert results[0] == results[1], "a bundle draws the same for an image whatever is beside it"
    red, green = read_manifest(tmp_path / "one.jsonl")
    assert red.captions[0] == "a red"
    assert red.extra["caption_scores"][0] == {"score": 1.0, "origin": "synthetic"}
    assert red.extra["caption_scores"][1]["score"] < 0.1
    assert green.captions == ("a green photo", "a green")
    assert [score["origin"] for score in green.extra["caption_scores"]] == ["original", "synthetic"]
    assert filter_job.SCORES == "caption_scores"
