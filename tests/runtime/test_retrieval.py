"""A bundle that searches, on a real engine: scores as told by hand, ranking, recall, index on disk."""

import json
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.bundle import read_bundle
from runtime.dataset import Row
from runtime.errors import CheckFailed, DataError, ImageError, InputError, MissingFile, OutOfSpace
from runtime.index import EMBEDS, FEATURES, INDEX, ITEMS, Index, write_image_index, write_text_index
from runtime.progress import Progress
from runtime.recall import captioned, evaluate_retrieval
from runtime.replay import replay
from runtime.retrieval import ImageEmbeddings, Retrieval
from runtime.search import best_rows, itc_scores, search_images
from tests.runtime.retrieval_bundle import LOGIT, write_retrieval_bundle

QUIET = Progress(quiet=True)
PICTURES = {
    "red": (200, 0, 0),
    "green": (0, 150, 0),
    "blue": (0, 0, 90),
    "violet": (120, 0, 120),
    "rose": (200, 0, 40),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval_bundle(tmp_path_factory.mktemp("retrieval") / "bundle")


@pytest.fixture(scope="module")
def retrieval(bundle: Path):
    with runtime.load_retrieval(bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in PICTURES.items():
        Image.new("RGB", (20, 12), colour).save(folder / f"{name}.png")
    return [folder / f"{name}.png" for name in PICTURES]


def names(hits) -> list[str]:
    return [Path(found).stem for found, _ in hits]


def test_scores_are_those_told_by_hand(retrieval: Retrieval, pictures: list[Path]) -> None:
    found = retrieval.embed_images(pictures)
    assert (found.features_BQF.shape, found.image_embeds_BNE.shape) == ((5, 1, 3), (5, 1, 3))
    itc = itc_scores(found.features_BQF, retrieval.embed_texts(["A red photo!", "red blue", "green"]))
    np.testing.assert_allclose(itc[:4], [[1, 0.5**0.5, 0], [0, 0, 1], [0, 0.5**0.5, 0], [0.5**0.5, 1, 0]], atol=1e-6)
    logits = retrieval.match(found.image_embeds_BNE[:4], ["red", "red", "blue", "opposite red"])
    np.testing.assert_allclose(logits[:, 1], [LOGIT, 0, LOGIT, -LOGIT * 0.5**0.5], atol=1e-5)


def test_a_bundle_that_searches_replays_and_does_not_answer(bundle: Path) -> None:
    checks = replay(read_bundle(bundle))
    assert [(check.graph, check.output, check.ok) for check in checks] == [
        ("vision/colours", "image_embeds", True),
        ("retrieval", "itc", True),
        ("retrieval", "match_logits", True),
    ]
    with pytest.raises(InputError, match="this bundle searches and cannot answer: it was exported without a language"):
        runtime.load(bundle)


def test_a_bundle_that_answers_does_not_search(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"answers and cannot search: expected the graphs itc_image, itc_text, itm"):
        runtime.load_retrieval(tiny_bundle)


def test_bad_input_is_one_sentence(retrieval: Retrieval, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected words to search with, found ' \.#'"):
        retrieval.embed_texts(["red", " .#"])
    with pytest.raises(InputError, match="expected at least one text"):
        retrieval.embed_texts([])
    with pytest.raises(InputError, match="expected at least one image"):
        retrieval.embed_images([])
    with pytest.raises(ImageError, match=r"none\.png"):
        retrieval.embed_images([tmp_path / "none.png"])
    with pytest.raises(InputError, match="expected one text per image, found 1 and 2"):
        retrieval.match(np.zeros((1, 1, 3), np.float32), ["red", "blue"])


def test_the_best_come_first_and_equal_ones_in_order() -> None:
    assert best_rows(np.array([0.1, 0.7, 0.3, 0.7, 0.7], np.float32), 2).tolist() == [1, 3]
    assert best_rows(np.array([0.1, 0.7, 0.3], np.float32), 9).tolist() == [1, 2, 0]
    with pytest.raises(CheckFailed, match="found NaN"):
        best_rows(np.array([0.1, np.nan], np.float32), 1)


def test_scores_read_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(50, 4, 8)).astype(np.float16), rng.normal(size=(3, 8)).astype(np.float32)
    expected = np.einsum("iqf,sf->iqs", images.astype(np.float32), texts).max(1)
    for piece in (1, 700, 1 << 20):
        monkeypatch.setattr("runtime.search.PIECE_BYTES", piece)
        np.testing.assert_allclose(itc_scores(images, texts), expected, atol=1e-5)


@pytest.mark.parametrize(("top", "candidates"), [(0, 128), (5, 3), (1, -1)])
def test_counts_that_cannot_be(top: int, candidates: int, retrieval: Retrieval) -> None:
    with pytest.raises(InputError, match=r"top: expected|candidates: expected"):
        search_images(retrieval, np.zeros((1, 1, 3)), lambda row: np.zeros(3), ["red"], top=top, candidates=candidates)


def test_index_and_search(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    facts = write_image_index(
        retrieval, pictures, tmp_path / "index", dtype="float16", keep_embeds=True, progress=QUIET
    )
    assert (facts.kind, facts.count, facts.features, facts.image_embeds) == ("images", 5, (1, 3), (1, 3))
    index = Index(tmp_path / "index")
    assert index.bundle_path().resolve() == retrieval.bundle.path.resolve()
    by_itc, again = index.find_images(retrieval, ["red", "blue red"], top=3, candidates=0)
    assert (names(by_itc), names(again)) == (["red", "rose", "violet"], ["violet", "rose", "red"])
    assert by_itc[0][1].match_logit is None
    (hits,) = index.find_images(retrieval, ["red"], top=2, candidates=5)
    assert names(hits) == ["red", "rose"]
    best = hits[0][1]
    assert best.score == pytest.approx(LOGIT + 1, abs=1e-3)
    assert best.match_probability == pytest.approx(1 / (1 + np.exp(-LOGIT)), abs=1e-6)
    assert hits[0][0] == str(pictures[0])


def test_matching_overrules_contrast_among_the_candidates_alone(
    retrieval: Retrieval, pictures: list[Path], tmp_path: Path
) -> None:
    """ITC does not understand "opposite"; ITM does, and turns the order round of those it is shown."""
    write_image_index(retrieval, pictures, tmp_path / "index", dtype="float32", keep_embeds=True, progress=QUIET)
    index = Index(tmp_path / "index")
    (all_seen,) = index.find_images(retrieval, ["opposite red"], top=5, candidates=128)
    assert names(all_seen)[-2:] == ["rose", "red"]
    assert set(names(all_seen)[:2]) == {"green", "blue"}
    (three_seen,) = index.find_images(retrieval, ["opposite red"], top=3, candidates=3)
    assert names(three_seen) == ["violet", "rose", "red"]


def test_without_embeddings_the_images_are_read_again(
    retrieval: Retrieval, pictures: list[Path], tmp_path: Path
) -> None:
    own = [Path(shutil.copy(picture, tmp_path)) for picture in pictures]
    expected = []
    for keep in (True, False):
        write_image_index(retrieval, own, tmp_path / "index", dtype="float32", keep_embeds=keep, progress=QUIET)
        assert (tmp_path / "index" / EMBEDS).exists() == keep
        expected.append(Index(tmp_path / "index").find_images(retrieval, ["blue red"], top=5, candidates=128))
    assert expected[0] == expected[1]
    own[0].unlink()
    with pytest.raises(ImageError, match=r"red\.png"):
        Index(tmp_path / "index").find_images(retrieval, ["blue"], top=5, candidates=128)


def test_texts_are_found_by_image(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    texts = ["a photo of red", "opposite blue", "blue", "red", "blue ", "red blue", "green"]
    facts = write_text_index(retrieval, texts, tmp_path / "texts", dtype="float16", progress=QUIET)
    assert (facts.kind, facts.count, facts.image_embeds) == ("texts", 6, None)
    index = Index(tmp_path / "texts")
    by_itc, _ = index.find_texts(retrieval, [pictures[2], pictures[0]], top=2, candidates=0)
    assert [text for text, _ in by_itc] == ["opposite blue", "blue"]
    matched, other = index.find_texts(retrieval, [pictures[2], pictures[3]], top=6, candidates=6)
    assert [text for text, _ in matched][0::5] == ["blue", "opposite blue"]
    assert other[0][0] == "red blue"
    with pytest.raises(InputError, match="expected an index of images, found one of texts"):
        index.find_images(retrieval, ["red"], top=1, candidates=0)


def test_broken_images_are_named_and_left_out(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    mixed = [pictures[0], broken, *pictures[1:], tmp_path / "gone.png"]
    facts = write_image_index(retrieval, mixed, tmp_path / "index", dtype="float32", keep_embeds=True, progress=QUIET)
    assert facts.count == 5
    assert {Path(path).name for path in facts.broken} == {"broken.jpg", "gone.png"}
    (hits,) = Index(tmp_path / "index").find_images(retrieval, ["green"], top=1, candidates=0)
    assert names(hits) == ["green"]
    with pytest.raises(DataError, match=r"none of the 1 images can be read; the first: .*broken\.jpg"):
        write_image_index(retrieval, [broken], tmp_path / "no", dtype="float32", keep_embeds=True, progress=QUIET)
    assert not (tmp_path / "no").exists()
    with pytest.raises(DataError, match="expected at least one image"):
        write_image_index(retrieval, [], tmp_path / "no", dtype="float32", keep_embeds=True, progress=QUIET)


def test_another_bundles_index_is_refused(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    write_image_index(retrieval, pictures, tmp_path / "index", dtype="float32", keep_embeds=True, progress=QUIET)
    other = write_retrieval_bundle(tmp_path / "other", max_batch=2)
    with (
        runtime.load_retrieval(other) as foreign,
        pytest.raises(InputError, match="expected the bundle that made it"),
    ):
        Index(tmp_path / "index").find_images(foreign, ["red"], top=1, candidates=0)


def test_a_damaged_index_is_refused(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    def written() -> Path:
        path = tmp_path / "index"
        write_image_index(retrieval, pictures, path, dtype="float32", keep_embeds=True, progress=QUIET)
        return path

    with pytest.raises(MissingFile, match=r"expected an index with index\.json"):
        Index(tmp_path)
    for name, damage in (
        (FEATURES, lambda data: data[:-4] + b"\0\0\0\1"),
        (ITEMS, lambda data: data.replace(b"red", b"rod")),
        (EMBEDS, lambda data: data[:-8]),
        (INDEX, lambda data: data.replace(b'"format": 1', b'"format": 9')),
        (INDEX, lambda data: data[:40]),
        (INDEX, lambda data: data.replace(b'"count"', b'"number"')),
    ):
        file = written() / name
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(DataError, match=f"{name}: expected .*; index again"):
            Index(tmp_path / "index")
    (written() / FEATURES).unlink()
    with pytest.raises(MissingFile, match=FEATURES):
        Index(tmp_path / "index")


def test_a_failed_run_keeps_the_old_index(
    retrieval: Retrieval, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "index"
    before = write_image_index(retrieval, pictures[:2], path, dtype="float32", keep_embeds=True, progress=QUIET)
    calls = []

    def interrupted(self, images):
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ImageEmbeddings(np.ones((len(images), 1, 3), np.float32), np.ones((len(images), 1, 3), np.float32))

    monkeypatch.setattr(Retrieval, "embed_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image_index(retrieval, pictures, path, dtype="float32", keep_embeds=True, progress=QUIET)
    assert Index(path).facts == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"expected an empty folder or one with index\.json"):
        write_image_index(retrieval, pictures, tmp_path / "mine", dtype="float32", keep_embeds=True, progress=QUIET)


def test_a_full_disk_is_told_and_leaves_nothing(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the system refuses the same write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
    try:
        with pytest.raises(OutOfSpace, match="no space left while writing"):
            write_image_index(retrieval, pictures, tmp_path / "no", dtype="float32", keep_embeds=True, progress=QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_values_beyond_half_precision_are_refused(
    retrieval: Retrieval, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = ImageEmbeddings(np.ones((3, 1, 3), np.float32), np.full((3, 1, 3), 1e6, np.float32))
    monkeypatch.setattr(Retrieval, "embed_images", lambda self, images: large)
    with pytest.raises(InputError, match="too large for float16; try --dtype float32"):
        write_image_index(retrieval, pictures, tmp_path / "no", dtype="float16", keep_embeds=True, progress=QUIET)


class ByHand:
    """Three images, four texts; what it scores is in two tables."""

    max_batch = 2
    itc = np.array([[0.9, 0.1, 0.8, 0.0], [0.5, 0.6, 0.1, 0.2], [0.4, 0.2, 0.7, 0.3]], np.float32)
    itm = np.array([[5, 0, 0, 0], [0, 0, 0, 9], [0, 0, 4, 0]], np.float32)
    texts = ("one", "two", "three", "four")

    def __init__(self) -> None:
        self.pairs = list[tuple[int, str]]()

    def embed_images(self, images: Sequence[Image.Image]) -> ImageEmbeddings:
        numbers = [image.getpixel((0, 0))[0] for image in images]
        return ImageEmbeddings(self.itc[numbers][:, None], np.array(numbers, np.float32)[:, None, None])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.eye(4, dtype=np.float32)[[self.texts.index(text) for text in texts]]

    def match(self, image_embeds_BNE: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        assert len(texts) <= self.max_batch
        pairs = [(int(image[0, 0]), text) for image, text in zip(image_embeds_BNE, texts, strict=True)]
        self.pairs += pairs
        return np.array([[0.0, self.itm[image, self.texts.index(text)]] for image, text in pairs], np.float32)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """Image 0 has captions one and two, image 1 two (again, in capitals) and four, image 2 three."""
    captions = {0: ("one", "two"), 1: ("Two.", "four"), 2: ("three",)}
    found = []
    for number, texts in captions.items():
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (2, 2), (number, 0, 0)).save(path)
        found += [Row(path, str(number), (text,), None, (), {}) for text in texts]
    return found


def test_recall_of_a_case_made_by_hand(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """ITC: texts one and three find image 0 first, two and four find image 1 and 2; three is 2's, four is 1's.

    Images 0, 1, 2 find texts one, two, three: all right. ITM: +5 for (0, one), +9 for (1, four), +4 for (2, three).
    """
    monkeypatch.setattr("runtime.recall.AT", (1, 2))
    by_hand = ByHand()
    found = evaluate_retrieval(by_hand, rows, candidates=3, progress=QUIET)
    assert found.metrics == {
        "itc_text_to_image_r1": 0.5,
        "itc_text_to_image_r2": 1.0,
        "itc_image_to_text_r1": 1.0,
        "itc_image_to_text_r2": 1.0,
        "itm_text_to_image_r1": 1.0,
        "itm_text_to_image_r2": 1.0,
        "itm_image_to_text_r1": 1.0,
        "itm_image_to_text_r2": 1.0,
    }
    assert len(by_hand.pairs) == len(set(by_hand.pairs)) == 12, "a pair is matched once, whichever ranking wants it"
    assert found.as_json()["n"] == 7
    assert found.hits["itc_image_to_text_r1"] == (True, True, True), "query by query, for whoever compares in pairs"
    assert sum(found.hits["itc_text_to_image_r1"]) == 2
    assert {name: sum(hits) / len(hits) for name, hits in found.hits.items()} == found.metrics
    alone = evaluate_retrieval(ByHand(), rows, candidates=0, progress=QUIET)
    assert set(alone.metrics) == {name for name in found.metrics if name.startswith("itc")}


def test_rows_become_images_and_captions(rows: list[Row]) -> None:
    data = captioned(rows)
    assert [path.stem for path in data.images] == ["0", "1", "2"]
    assert data.texts == ["one", "two", "four", "three"]
    assert data.right_IS.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]
    with pytest.raises(DataError, match="expected rows with captions, found none among 1"):
        captioned([Row(Path("x.png"), "x", (), "what?", (), {})])


def test_evaluation_refuses_what_it_cannot_score(rows: list[Row], retrieval: Retrieval) -> None:
    with pytest.raises(InputError, match="at least 10, found 5"):
        evaluate_retrieval(retrieval, rows, candidates=5, progress=QUIET)
    rows[0].image.write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"0\.png"):
        evaluate_retrieval(retrieval, rows, candidates=0, progress=QUIET)


def test_the_index_says_what_it_is(retrieval: Retrieval, pictures: list[Path], tmp_path: Path) -> None:
    """No absolute path: index and bundle may move together."""
    write_image_index(retrieval, pictures, tmp_path / "index", dtype="float16", keep_embeds=True, progress=QUIET)
    record = json.loads((tmp_path / "index" / INDEX).read_text())
    assert record["bundle_digest"] == retrieval.bundle.manifest.digest
    lines = [json.loads(line)["image"] for line in (tmp_path / "index" / ITEMS).read_text().splitlines()]
    assert not any(Path(line).is_absolute() for line in [*lines, record["bundle"]])
