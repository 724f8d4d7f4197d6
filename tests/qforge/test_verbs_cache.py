"""The verbs around a cache on the disk, on the tiny bundle of the runtime's tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qforge.cli import app
from runtime import disk_cache
from tests.runtime.conftest import write_tiny_bundle
from tests.runtime.retrieval_bundle import write_retrieval_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("cache-verbs") / "bundle")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in {"a.png": (255, 90, 9), "b.png": (9, 255, 9), "c.jpg": (9, 9, 255)}.items():
        Image.new("RGB", (9, 9), colour).save(folder / name)
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = app([str(argument) for argument in arguments], prog_name="qforge", standalone_mode=False)
    out, err = capsys.readouterr()
    return code, out, err


def found(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def test_what_only_searches_is_warmed_too(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index then costs no vision."""
    searches, seen = write_retrieval_bundle(tmp_path / "searches"), tmp_path / "seen"
    warmed = found(capsys, "cache", "warm", searches, photos, "--cache-dir", seen)
    assert (warmed["images"], warmed["new"], warmed["cache"]["disk"]["writes"]) == (3, 3, 6)
    assert found(capsys, "cache", "warm", searches, photos, "--cache-dir", seen)["new"] == 0
    made = found(capsys, "index", searches, photos, "--out", tmp_path / "index", "--cache-dir", seen)
    assert (made["cache"]["disk"]["hits"], made["cache"]["disk"]["misses"]) == (6, 0)
    code, _, err = call(capsys, "cache", "warm", searches, photos, "--cache-dir", seen, "--image-size", "16")
    assert (code, err) == (2, f"image_size: {searches} searches at the size it was trained at; leave it out\n")


def test_warm_info_clear(bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = tmp_path / "seen"
    manifest = tmp_path / "more.jsonl"
    manifest.write_text(json.dumps({"image": "photos/a.png", "captions": ["red"]}) + "\n")
    (photos / "broken.png").write_bytes(b"?")
    warmed = found(capsys, "cache", "warm", bundle, manifest, photos, "--cache-dir", seen, "--max-mib", "3")
    assert (warmed["images"], warmed["new"], list(warmed["broken"])) == (3, 3, [str(photos / "broken.png")])
    assert warmed["cache"]["disk"]["max_bytes"] == 3 * 2**20
    code, out, _ = call(capsys, "cache", "warm", bundle, photos, "--cache-dir", seen)
    assert code == 0 and "(3 images, 0 of them new; 0.0 of 3.0 MiB used)" in out and "cannot be read" in out

    info = found(capsys, "cache", "info", "--cache-dir", seen)
    assert (info["entries"], info["max_bytes"]) == (6, 3 * 2**20)
    assert info["bytes"] == warmed["cache"]["disk"]["bytes"] == sum(one["bytes"] for one in info["bundles"].values())
    (group,) = info["bundles"]
    assert json.loads((bundle / "manifest.json").read_text())["digest"].startswith(group)
    assert f"bundle {group}…: 6 entries" in call(capsys, "cache", "info", "--cache-dir", seen)[1]

    other = write_tiny_bundle(tmp_path / "other", max_batch=1)
    found(capsys, "cache", "warm", other, photos / "a.png", "--cache-dir", seen)
    assert found(capsys, "cache", "clear", "--cache-dir", seen, "--bundle", other)["entries"] == 2
    assert found(capsys, "cache", "info", "--cache-dir", seen)["entries"] == 6
    assert call(capsys, "cache", "clear", "--cache-dir", seen)[1].startswith("Removed 6 entries (0.0 MiB)")
    assert found(capsys, "cache", "info", "--cache-dir", seen)["bundles"] == {}


def test_answers_and_scores_use_it(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, image = tmp_path / "seen", photos / "a.png"
    found(capsys, "cache", "warm", bundle, photos, "--cache-dir", seen)
    captions = found(capsys, "caption", bundle, image, "--cache-dir", seen)
    assert captions["results"][0]["text"] == "a red"
    assert (captions["cache"]["disk"]["hits"], captions["cache"]["disk"]["misses"]) == (1, 0)
    answers = found(capsys, "vqa", bundle, image, "colour", "opposite", "--cache-dir", seen)
    assert [one["text"] for one in answers["results"]] == ["a red", "a blue"]
    assert (answers["cache"]["disk"]["hits"], answers["cache"]["disk"]["misses"]) == (1, 2), "features; two questions"
    assert set(found(capsys, "vqa", bundle, image, "colour")["cache"]) == {"memory"}
    rows = tmp_path / "vqa.jsonl"
    rows.write_text(json.dumps({"image": str(image), "question": "colour", "answers": ["a red"]}) + "\n")
    scored = found(capsys, "evaluate", bundle, "--data", rows, "--task", "vqa", "--cache-dir", seen)
    assert scored["cache"]["disk"]["misses"] == 0 and scored["n"] == 1
    assert "cache" not in found(capsys, "evaluate", bundle, "--data", rows, "--task", "vqa")


def test_a_cache_too_small_for_its_images_says_so(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_cache.DiskCache(tmp_path / "seen", "0" * 64, disk_cache.Device(), max_bytes=1000)
    code, out, _ = call(capsys, "cache", "warm", bundle, photos, "--cache-dir", tmp_path / "seen")
    assert code == 0 and "entries had to go" in out and "--max-mib" in out


def test_a_disk_that_refuses_is_a_warning(
    bundle: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(work: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache, "_write", refuse)
    code, out, err = call(capsys, "caption", bundle, photos / "a.png", "--cache-dir", tmp_path / "seen")
    assert (code, out) == (0, "a red\n")
    assert err.count("warning: the cache does not keep everything") == 1 and str(tmp_path / "seen") in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["cache", "info", "--cache-dir", "NOWHERE"], "expected a query cache"),
        (["cache", "clear", "--cache-dir", "PHOTOS"], "expected a query cache"),
        (["cache", "warm", "BUNDLE", "PHOTOS", "--cache-dir", "PHOTOS"], "expected an empty folder or a query cache"),
        (["cache", "warm", "BUNDLE", "NOWHERE", "--cache-dir", "NEW"], "found nothing under that name"),
        (["cache", "warm", "BUNDLE", "PHOTOS", "--cache-dir", "NEW", "--max-mib", "0"], "--max-mib: expected at least"),
        (["caption", "BUNDLE", "PHOTOS/a.png", "--cache-dir", "PHOTOS"], "found other files"),
        (
            ["evaluate", "BUNDLE", "--data", "NOWHERE", "--task", "retrieval", "--cache-dir", "NEW"],
            "--cache-dir: retrieval",
        ),
    ],
)
def test_wrong_use_is_one_sentence(
    bundle: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    places = {"BUNDLE": bundle, "PHOTOS": photos, "NOWHERE": tmp_path / "nowhere", "NEW": tmp_path / "new"}
    for word, path in places.items():
        arguments = [argument.replace(word, str(path)) for argument in arguments]
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert sentence in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in photos.iterdir()) == ["a.png", "b.png", "c.jpg"]


def test_a_checkpoint_keeps_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    rows = tmp_path / "vqa.jsonl"
    rows.write_text(json.dumps({"image": "a.png", "question": "colour", "answers": ["a red"]}) + "\n")
    code, _, err = call(capsys, "evaluate", tmp_path, "--data", rows, "--task", "vqa", "--cache-dir", tmp_path / "seen")
    assert code == 2 and "--cache-dir is for bundles" in err
