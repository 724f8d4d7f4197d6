"""A device is asked what eager gave before it answers: once where it is right, every time where it is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import Device
from runtime.backends.ort import OrtEngine
from runtime.bundle import Bundle, read_bundle
from runtime.errors import CheckFailed
from runtime.first_use import Place, check_first_use
from runtime.reference import REFERENCE, read_reference, write_reference
from runtime.user_cache import user_cache

HERE = Place("a" * 64, "a device", "a library 1.0")


class Counting(OrtEngine):
    """How often it ran, and with how many rows."""

    rows: list[int]

    def run(self, feeds: Any) -> Any:
        self.rows = [*getattr(self, "rows", []), len(feeds["pixels"])]
        return super().run(feeds)


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return read_bundle(tiny_bundle)


def test_it_runs_once_for_a_place(bundle: Bundle, tmp_path: Path) -> None:
    with Counting(bundle.graph("vision"), threads=1) as engine:
        assert check_first_use(engine, bundle, "vision", HERE, tmp_path)
        assert engine.rows == [3, 1]  # four recorded rows, three at once at most
        assert not check_first_use(engine, bundle, "vision", HERE, tmp_path)
        assert engine.rows == [3, 1]
        others = [Place("b" * 64, HERE.device, HERE.library), Place(HERE.model, "another", HERE.library)]
        for place in (*others, Place(HERE.model, HERE.device, "a library 1.1")):
            assert check_first_use(engine, bundle, "vision", place, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_note_that_says_something_else_does_not_count(bundle: Bundle, tmp_path: Path) -> None:
    note = tmp_path / f"{HERE.key}.json"
    with OrtEngine(bundle.graph("vision"), threads=1) as engine:
        check_first_use(engine, bundle, "vision", HERE, tmp_path)
        said = json.loads(note.read_text())
        assert said["checks"][0]["graph"] == "vision/colours" and said["place"]["device"] == "a device"
        for spoilt in ("{", "[]", json.dumps(said | {"bundle": "another"}), json.dumps(said | {"place": {}})):
            note.write_text(spoilt)
            assert check_first_use(engine, bundle, "vision", HERE, tmp_path)
        assert not check_first_use(engine, bundle, "vision", HERE, tmp_path)


def test_a_graph_that_recorded_nothing_is_not_remembered(bundle: Bundle, tmp_path: Path) -> None:
    with OrtEngine(bundle.graph("embed"), threads=1) as engine:
        assert not check_first_use(engine, bundle, "embed", HERE, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wrong(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> Bundle:
    """A bundle whose vision graph does not give what was recorded."""
    path = make_tiny_bundle(tmp_path / "wrong")
    reference = read_reference(path / REFERENCE)
    reference.cases[0].outputs["image_embeds"] += 0.5
    write_reference(path / REFERENCE, reference.cases, reference.chain)
    return read_bundle(path, check_hashes=False)


def test_a_wrong_device_answers_nothing_and_is_asked_again(wrong: Bundle, tmp_path: Path) -> None:
    with OrtEngine(wrong.graph("vision"), threads=1) as engine:
        for _ in range(2):
            with pytest.raises(CheckFailed, match=r"vision/colours on a device by a library 1\.0: .* off by 3\.33e"):
                check_first_use(engine, wrong, "vision", HERE, tmp_path / "notes")
    assert not (tmp_path / "notes").exists()


def test_providers_are_asked_and_the_cpu_is_not(wrong: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runtime.backends import ort

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Device(threads=1).open(wrong, "vision").close()
    closed = list[str]()

    class OnCpu(OrtEngine):
        """As if the provider were here."""

        def __init__(self, model: Path, provider: str, *rest: Any, **more: Any) -> None:
            super().__init__(model, "cpu", *rest, **more)

        def close(self) -> None:
            closed.append("closed")
            super().close()

    monkeypatch.setattr(ort, "OrtEngine", OnCpu)
    with pytest.raises(CheckFailed, match="provider cuda by onnxruntime 1"):
        Device(provider="cuda", threads=1).open(wrong, "vision")
    assert closed == ["closed"]
    Device(provider="cuda", threads=1, checked=False).open(wrong, "vision").close()


def test_the_cache_folder_is_the_standards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache("checked") == tmp_path / "qforge" / "checked"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert user_cache("checked") == tmp_path / "home" / ".cache" / "qforge" / "checked"


def test_rows_are_put_together_again(bundle: Bundle) -> None:
    from runtime.first_use import compare

    cases = read_reference(bundle.file(REFERENCE)).cases
    with OrtEngine(bundle.graph("vision"), threads=1) as engine:
        (whole,), (parts,) = compare(engine, cases, 4), compare(engine, cases, 1)
    assert whole.max_error == parts.max_error <= 1e-6
    assert np.isfinite(whole.max_error)
