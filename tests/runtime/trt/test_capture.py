"""A graph is used only after it was proved; what proves wrong leaves plain runs, a warning and right answers."""

from pathlib import Path

import numpy as np
import pytest

from runtime.bundle import Bundle, read_bundle
from tests.runtime.trt.fakes import FakeCuda, FakeOpener


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    bundle = read_bundle(tiny_bundle)
    specs = bundle.manifest.graphs["vision"].inputs
    specs["pixels"] = specs["pixels"].model_copy(update={"shape": ("batch", *specs["pixels"].shape[1:])})
    return bundle


def answers_are_right(bundle: Bundle, opener: FakeOpener) -> None:
    """Six runs of different pixels, each with its own answer."""
    with opener.open(bundle, "vision") as engine:
        for seed in range(6):
            pixels = np.random.default_rng(seed).random((1, 3, 8, 8), np.float32)
            (found,) = engine.run({"pixels": pixels}).values()
            np.testing.assert_allclose(found[:, 0], pixels.mean(axis=(2, 3)), rtol=1e-6)
        opener.counts = engine.counts  # type: ignore[attr-defined]
    assert opener.cuda.graphs == {}


def test_an_empty_capture_is_found(bundle: Bundle) -> None:
    opener = FakeOpener(FakeCuda(empty_graphs=True))
    with pytest.warns(UserWarning, match="'vision' runs without a CUDA graph: the capture is empty") as said:
        answers_are_right(bundle, opener)
    assert len(said) == 1
    counts = opener.counts  # type: ignore[attr-defined]
    assert (counts.captures, counts.replays, counts.unfit) == (0, 0, 1)
    assert "launch" not in opener.cuda.log


def test_an_empty_capture_is_found_where_the_answer_is_no_number(bundle: Bundle) -> None:
    opener = FakeOpener(FakeCuda(empty_graphs=True))
    with opener.open(bundle, "vision") as engine, pytest.warns(UserWarning, match="the capture is empty"):
        for _ in range(3):
            engine.run({"pixels": np.full((1, 3, 8, 8), np.nan, np.float32)})
        (found,) = engine.run({"pixels": np.ones((1, 3, 8, 8), np.float32)}).values()
    assert found.tolist() == [[[1.0, 1.0, 1.0]]]


def test_a_replay_that_differs_is_found(bundle: Bundle) -> None:
    opener = FakeOpener()

    def alter() -> None:
        context = opener.plans["vision"].contexts[-1]
        context.bytes_at(context.addresses["image_embeds"], 4).view(np.float32)[:] += 0.01

    opener.cuda.alters_replay = alter
    with pytest.warns(UserWarning, match="its replay gives another 'image_embeds'"):
        answers_are_right(bundle, opener)
    assert opener.cuda.log.count("launch") == 1


def test_a_replay_that_does_nothing_is_found_by_the_spoilt_output(bundle: Bundle) -> None:
    opener = FakeOpener()
    opener.cuda.launch = lambda ready, stream: None  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="its replay gives another 'image_embeds'"):
        answers_are_right(bundle, opener)


def test_what_cannot_be_captured_is_not(bundle: Bundle) -> None:
    opener = FakeOpener(settings={"can_capture": False})
    with pytest.warns(UserWarning, match="TensorRT says that it cannot be captured"):
        answers_are_right(bundle, opener)
    assert "instantiate" not in opener.cuda.log


def test_an_engine_has_a_bounded_number_of_graphs(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.trt.capture.MOST", 2)
    opener = FakeOpener()
    with opener.open(bundle, "vision") as engine:
        for _ in range(3):
            for batch in (3, 2, 1):
                engine.run({"pixels": np.ones((batch, 3, 8, 8), np.float32)})
        assert len(opener.cuda.graphs) == 2
        assert (engine.counts.captures, engine.counts.replays, engine.counts.unfit) == (2, 2, 0)


def test_an_idle_graph_gives_its_place_up(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.backends.trt.capture.MOST", 1)
    monkeypatch.setattr("runtime.backends.trt.capture.IDLE", 4)
    opener = FakeOpener()
    with opener.open(bundle, "vision") as engine:

        def captures_after(*batches: int) -> int:
            for batch in batches:
                engine.run({"pixels": np.ones((batch, 3, 8, 8), np.float32)})
            return engine.counts.captures

        assert captures_after(3, 3) == 1
        assert captures_after(1, 1, 1, 1) == 1  # the other one was used four runs ago
        assert captures_after(1) == 2
        assert len(opener.cuda.graphs) == 1
        assert captures_after(1, 1) == 2 and engine.counts.replays == 2
