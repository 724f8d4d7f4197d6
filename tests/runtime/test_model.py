"""`qforge.load`: one object for bundles that answer, search, or both."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qforge
from runtime.backends.ort import OrtEngine
from runtime.bundle import read_bundle
from runtime.errors import BundleError, ImageError, InputError, MissingFile
from runtime.index import Index, write_image_index, write_text_index
from runtime.progress import Progress
from runtime.retrieval import Retrieval
from tests.runtime.both_heads import write_bundle_with_both_heads
from tests.runtime.retrieval_bundle import write_retrieval_bundle

QUIET = Progress(quiet=True)
COLOURS = {"red": (250, 90, 10), "green": (20, 200, 90), "blue": (40, 10, 220)}


def picture(name: str) -> np.ndarray:
    return np.full((5, 7, 3), COLOURS[name], np.uint8)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle_with_both_heads(tmp_path_factory.mktemp("both") / "bundle")


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval_bundle(tmp_path_factory.mktemp("searching") / "bundle")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The first input of every graph that runs: pixels are vision."""
    seen: list[str] = []
    run = OrtEngine.run

    def counted(engine: OrtEngine, feeds, into=None):
        seen.append(next(iter(feeds)))
        return run(engine, feeds, into)

    monkeypatch.setattr(OrtEngine, "run", counted)
    return seen


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for name in COLOURS:
        Image.fromarray(picture(name)).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in COLOURS]


def write_indexes(bundle: Path, photos: list[Path], folder: Path) -> tuple[Path, Path]:
    with Retrieval(read_bundle(bundle)) as retrieval:
        write_image_index(retrieval, photos, folder / "images", dtype="float32", keep_embeds=True, progress=QUIET)
        write_text_index(retrieval, ["red", "green", "blue"], folder / "texts", dtype="float32", progress=QUIET)
    return folder / "images", folder / "texts"


def test_one_object_captions_answers_embeds_and_searches(both: Path, photos: list[Path], tmp_path: Path) -> None:
    images, texts = write_indexes(both, photos, tmp_path)
    with qforge.load(both) as model:
        assert (model.answers, model.searches) == (True, True)
        forms = [photos[0], str(photos[0]), photos[0].read_bytes(), Image.open(photos[0]), picture("red")]
        assert [answer.text for answer in model.caption(forms)] == 5 * ["a red"]
        assert model.vqa(photos[0], "opposite colour").text == "a blue"
        assert model.vqa(photos[0], "colour", max_new_tokens=1).text == "a"
        assert model.answer([qforge.Request(photos[2], "colour")])[0].text == "a blue"
        *_, last = model.stream(qforge.Request(photos[1]))
        assert last.answer is not None and last.answer.text == "a green"
        assert next(Path(found).stem for found, _ in model.search(images, "green", top=2)) == "green"
        assert model.search(Index(texts), image=photos[2], top=1)[0][0] == "blue"
        features_BQF = model.embed(photos)
        assert features_BQF.shape == (3, 1, 3) and features_BQF.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(features_BQF, axis=-1), 1.0, rtol=1e-6)
        prefix_BQD = model.embed(photos[0], kind="prefix")
        assert prefix_BQD.shape[:2] == (1, 2)
        assert np.array_equal(model.embed(photos[0], kind="prefix", question="opposite"), -prefix_BQD)
        assert repr(model) == f"<qforge.Model {both}: answers and searches, fp32, ort on cpu, open>"
    assert repr(model).endswith("closed>")
    for call in (lambda: model.caption(photos[0]), lambda: model.embed(photos[0]), lambda: model.search(texts, "red")):
        with pytest.raises(InputError, match="was closed; load it again"):
            call()


def test_answering_and_searching_look_at_an_image_once(both: Path, runs: list[str]) -> None:
    with qforge.load(both) as model:
        assert model.vqa(picture("red"), "colour").text == "a red"
        vision = model._pipeline._encoder._vision
        features = model.embed(picture("red"))
        assert runs.count("pixels") == 1, "the question's vision features serve the search"
        assert model._retrieval._graphs._vision._engine is vision, "one vision tower in memory"
        before = len(runs)
        assert np.array_equal(model.embed(picture("red")), features)
        assert len(runs) == before, "features are remembered"
        model.embed(picture("blue"))
        assert model.vqa(picture("blue"), "colour").text == "a blue"
        assert runs.count("pixels") == 2, "and the other way round"


def test_without_memory_a_search_still_looks_once(both: Path, runs: list[str]) -> None:
    with qforge.load(both, cache_bytes=0) as model:
        model._searching("search").embed_images([picture("red"), picture("red")])
        assert runs.count("pixels") == 1
        with Retrieval(read_bundle(both)) as plain:
            cached = model._searching("search").embed_images([picture("red")])
            assert np.array_equal(plain.embed_images([picture("red")]).features_BQF, cached.features_BQF)


def test_a_bundle_that_cannot_says_what_would(tiny_bundle: Path, searching: Path, photos: list[Path]) -> None:
    with qforge.load(tiny_bundle) as model:
        assert (model.answers, model.searches) == (True, False)
        assert model.embed(photos).shape[:2] == (3, 2), "the prefix, where there are no features"
        for call in (lambda: model.search("index", "red"), lambda: model.embed(photos, kind="features")):
            with pytest.raises(InputError, match=r"answers and cannot search; .* --heads both"):
                call()
    with qforge.load(searching) as model:
        assert (model.answers, model.searches) == (False, True)
        assert model.embed(photos[0]).shape == (1, 1, 3)
        for call in (
            lambda: model.caption(photos),
            lambda: model.vqa(photos[0], "colour"),
            lambda: model.chat(photos[0]),
            lambda: model.stream(qforge.Request(photos[0])),
            lambda: model.answer([qforge.Request(photos[0])]),
            lambda: model.embed(photos, kind="prefix"),
        ):
            with pytest.raises(InputError, match=r"searches and cannot answer; .* --heads both"):
                call()


def test_wrong_use_is_one_sentence(both: Path, photos: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="backend: expected one of ort"):
        qforge.load(both, backend="tpu")
    with qforge.load(both) as model:
        with pytest.raises(InputError, match="expected 'features' or 'prefix'"):
            model.embed(photos, kind="queries")
        with pytest.raises(InputError, match="features are of images alone"):
            model.embed(photos, question="colour")
        with pytest.raises(InputError, match="found neither"):
            model.search(tmp_path)
        with pytest.raises(MissingFile, match="expected an index"):
            model.search(tmp_path, "red")
        for empty in (lambda: model.caption([]), lambda: model.embed([]), lambda: model.embed([], kind="prefix")):
            with pytest.raises(InputError, match="at least one"):
                empty()
        with pytest.raises(ImageError):
            model.embed(b"no image")
        assert model.caption(photos[0])[0].text == "a red"


def test_what_opens_late_is_checked_again(both: Path, photos: list[Path], tmp_path: Path) -> None:
    """The half that searches opens at its first use; a file that changed meanwhile costs that call alone."""
    shutil.copytree(both, tmp_path / "bundle")
    graph = tmp_path / "bundle/onnx/itm.onnx"
    whole = graph.read_bytes()
    with qforge.load(tmp_path / "bundle") as model:
        graph.write_bytes(whole[:-1] + b"?")
        with pytest.raises(BundleError, match=r"itm\.onnx: the file was changed"):
            model.embed(photos[0])
        assert model.caption(photos[0])[0].text == "a red"
        graph.write_bytes(whole)
        assert model.embed(photos[0]).shape == (1, 1, 3)


def test_threads_share_a_model(both: Path, photos: list[Path], tmp_path: Path) -> None:
    images, _ = write_indexes(both, photos, tmp_path)
    wrong: list[object] = []
    with qforge.load(both, threads=1, cache_bytes=2000) as model:
        index = Index(images)

        def work(offset: int) -> None:
            for step in range(6):
                name = list(COLOURS)[(offset + step) % 3]
                said = model.vqa(picture(name), "colour").text
                found = Path(model.search(index, name, top=1)[0][0]).stem
                talk = model.chat(picture(name), [("photo", "a photo"), "colour"]).text
                if (said, found, talk) != (f"a {name}", name, f"a {name}"):
                    wrong.append((name, said, found, talk))

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
