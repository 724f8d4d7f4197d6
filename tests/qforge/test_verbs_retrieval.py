"""index, search and the retrieval task of evaluate as their user meets them, on the tiny bundle that searches."""

import json
from pathlib import Path

import pytest
from PIL import Image

from runtime.index import INDEX
from tests.qforge.test_verbs import call
from tests.runtime.conftest import write_tiny_bundle
from tests.runtime.retrieval_bundle import write_retrieval_bundle

COLOURS = {"red": (200, 0, 0), "green": (0, 150, 0), "blue": (0, 0, 90), "rose": (200, 0, 40)}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a bundle, pictures, a manifest of two of them and a list of texts."""
    monkeypatch.chdir(tmp_path)
    write_retrieval_bundle(tmp_path / "bundle")
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, colour in COLOURS.items():
        folder = "photos/more" if name == "rose" else "photos"
        Image.new("RGB", (20, 12), colour).save(tmp_path / folder / f"{name}.png")
    (tmp_path / "photos" / "notes.md").write_text("not a picture, and not taken for one")
    rows = [{"image": f"photos/{name}.png", "captions": [name, f"photo of {name}"]} for name in ("red", "blue")]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("red\n\nblue red\ngreen\n")
    return tmp_path


def found(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_folders_files_and_manifests_are_indexed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "index", "bundle", "photos", "set.jsonl", "photos/red.png", "--out", "idx", "--json")
    assert (code, found(out)["count"], found(out)["kind"], found(out)["broken"]) == (0, 4, "images", {})
    assert found(out)["bytes"] == sum(file.stat().st_size for file in Path("idx").iterdir())
    code, out, _ = call(capsys, "index", "bundle", "photos/red.png", "--out", "idx", "--small")
    assert (code, out.split(" (")[0]) == (0, "Index: idx")
    assert not Path("idx/image_embeds.bin").exists()


def test_search_finds_the_picture(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "index", "bundle", "photos", "--out", "idx")
    code, out, _ = call(capsys, "search", "idx", "a green photo", "blue", "--top", "2", "--json")
    assert code == 0
    first, second = found(out)["results"]
    assert (first["text"], second["text"]) == ("a green photo", "blue")
    assert (first["hits"][0]["image"], second["hits"][0]["image"]) == ("photos/green.png", "photos/blue.png")
    assert set(first["hits"][0]) == {"image", "score", "itc", "match_logit", "match_probability"}
    assert len(first["hits"]) == 2
    code, out, _ = call(capsys, "search", "idx", "red", "--top", "2", "--candidates", "0")
    assert [line.split()[-1] for line in out.splitlines()] == ["photos/red.png", "photos/more/rose.png"]
    assert "match" not in out


def test_images_in_a_cache_are_not_looked_at_again(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By an index made anew, and by searches of a small index, which keeps no embeddings of its own."""
    code, out, _ = call(capsys, "index", "bundle", "photos", "--out", "idx", "--small", "--cache-dir", "seen", "--json")
    disk = found(out)["cache"]["disk"]
    assert (code, disk["hits"], disk["writes"]) == (0, 0, 8), "features and embeddings of four images"
    expected = call(capsys, "search", "idx", "a green photo", "--json")[1]
    assert "cache" not in found(expected)
    code, out, _ = call(capsys, "search", "idx", "a green photo", "--cache-dir", "seen", "--json")
    disk = found(out)["cache"]["disk"]
    assert (code, disk["hits"], disk["misses"], disk["writes"]) == (0, 8, 0, 0)
    assert found(out)["results"] == found(expected)["results"]
    call(capsys, "index", "bundle", "photos", "--out", "again", "--cache-dir", "seen")
    call(capsys, "index", "bundle", "photos", "--out", "fresh")
    for file in ("features.bin", "image_embeds.bin"):
        assert Path("again", file).read_bytes() == Path("fresh", file).read_bytes()


def test_texts_are_found_for_a_picture(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = call(capsys, "index", "bundle", "texts.txt", "set.jsonl", "--texts", "--out", "idx")
    assert code == 0
    code, out, _ = call(capsys, "search", "idx", "--image", "photos/blue.png", "--top", "1", "--json")
    (result,) = found(out)["results"]
    assert (result["image"], result["hits"][0]["text"]) == ("photos/blue.png", "blue")


def test_a_picture_shows_the_hits(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "index", "bundle", "photos", "--out", "idx")
    Path("photos/green.png").unlink()
    code, _, _ = call(capsys, "search", "idx", "red", "green $x$ " * 9, "--top", "3", "--picture", "new/hits.png")
    assert code == 0
    with Image.open("new/hits.png") as sheet:
        pixels = sheet.convert("RGB")
    assert pixels.getpixel((14 + 90, 60 + 90)) == COLOURS["red"]
    call(capsys, "index", "bundle", "texts.txt", "--texts", "--out", "idx")
    code, _, _ = call(capsys, "search", "idx", "--image", "photos/blue.png", "--picture", "texts.png")
    assert code == 0
    code, _, err = call(capsys, "search", "idx", "--image", "photos/blue.png", "--picture", "hits.what")
    assert (code, err) == (2, "--picture hits.what: expected a name that ends in .png or .jpg\n")


def test_broken_images_are_named(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/broken.jpg").write_bytes(b"x")
    code, out, _ = call(capsys, "index", "bundle", "photos", "--out", "idx")
    assert code == 0
    assert "1 images cannot be read and are not in it:" in out
    assert "broken.jpg" in out.splitlines()[-1]
    assert [Path(path).name for path in json.loads(Path("idx", INDEX).read_text())["broken"]] == ["broken.jpg"]


def test_moved_bundle_and_foreign_index(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "index", "bundle", "photos", "--out", "idx")
    Path("bundle").rename("elsewhere")
    code, _, err = call(capsys, "search", "idx", "red")
    assert (code, err) == (2, "idx: its bundle was at bundle, found nothing there; say where it is now: --bundle DIR\n")
    code, out, _ = call(capsys, "search", "idx", "red", "--bundle", "elsewhere", "--top", "1", "--json")
    assert (code, found(out)["results"][0]["hits"][0]["image"]) == (0, "photos/red.png")
    write_retrieval_bundle(world / "other", max_batch=2)
    code, _, err = call(capsys, "search", "idx", "red", "--bundle", "other")
    assert code == 2
    assert err.startswith("idx: expected the bundle that made it, digest ")


def test_wrong_use_is_one_sentence(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(world / "speaks")
    call(capsys, "index", "bundle", "photos", "--out", "idx")
    Path("latin.txt").write_bytes("ein grün\n".encode("latin-1"))
    Path("empty").mkdir()
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    for arguments, sentence in (
        (["search", "idx"], "search: expected either texts or --image"),
        (["search", "idx", "red", "--image", "photos/red.png"], "search: expected either texts or --image"),
        (["search", "idx", "red", "--candidates", "2"], "candidates: expected 0 (no re-ranking) or at least as many"),
        (["search", "idx", " ! "], "text: expected words to search with"),
        (["search", "idx", "--image", "photos/red.png"], "idx: expected an index of texts, found one of images"),
        (["search", "photos", "red"], "photos: expected an index with index.json, found none"),
        (["index", "speaks", "photos", "--out", "no"], "speaks: this bundle answers and cannot search"),
        (["index", "bundle", "nowhere", "--out", "no"], "nowhere: expected an image, a folder or a manifest"),
        (["index", "bundle", "empty", "--out", "no"], "empty: expected images (.bmp"),
        (
            ["index", "bundle", "photos", "--texts", "--out", "no"],
            "photos: expected a manifest (.jsonl) or a text",
        ),
        (["index", "bundle", "texts.txt", "--texts", "--small", "--out", "no"], "--small: an index of texts keeps no"),
        (
            ["index", "bundle", "texts.txt", "--texts", "--cache-dir", "c", "--out", "no"],
            "--cache-dir: an index of texts",
        ),
        (["index", "bundle", "latin.txt", "--texts", "--out", "no"], "latin.txt: expected UTF-8 text"),
        (["index", "bundle", "photos", "--out", "mine"], "mine holds files but no index.json"),
        (["caption", "bundle", "photos/red.png"], "bundle: this bundle searches and cannot answer"),
        (
            ["evaluate", "speaks", "--data", "set.jsonl", "--task", "retrieval"],
            "speaks: this bundle answers",
        ),
    ):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith(sentence), err
        assert len(err.splitlines()) == 1
    assert not Path("no").exists()


def test_evaluate_gives_recall_both_ways(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "bundle", "--data", "set.jsonl", "--task", "retrieval"]
    code, out, _ = call(capsys, *arguments, "--json")
    assert code == 0
    metrics, settings = found(out)["metrics"], found(out)["settings"]
    assert metrics["itc_text_to_image_r1"] == metrics["itm_image_to_text_r1"] == 1.0
    assert len(metrics) == 12
    assert settings == {"task": "retrieval", "images": 2, "texts": 4, "candidates": 128}
    code, out, _ = call(capsys, *arguments, "--candidates", "0")
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == [
        "text to image, contrast alone",
        "image to text, contrast alone",
    ]
