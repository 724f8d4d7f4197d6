"""One bundle, several image sizes: each equal to eager PyTorch, picked by the request, refused when not exported."""

from pathlib import Path

import numpy as np
import pytest

import runtime
from export.facts import limits
from qforge.cli import app
from runtime.answers import Request
from runtime.backends import CPU
from runtime.bundle import Bundle
from runtime.dataset import read_manifest
from runtime.errors import InputError
from runtime.evaluate import evaluate
from runtime.pipeline import Pipeline
from runtime.reference import REFERENCE, read_reference
from runtime.replay import replay
from tests.export.conftest import WIDE
from trainer.any_size import read_any_size
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint
from trainer.generate import EagerPipeline


@pytest.fixture(scope="module")
def bundle(bundle_wide: Bundle) -> Bundle:
    return bundle_wide


@pytest.fixture(scope="module")
def sized(checkpoint: Path) -> Blip2:
    model = load_checkpoint(checkpoint)
    read_any_size(model.vision, WIDE.image_sizes)
    return model


@pytest.fixture(scope="module")
def images(world: Path) -> list[Path]:
    return sorted((world / "images").rglob("*.png"))[:3]


def test_the_graphs_are_open_in_height_width_and_patches(bundle: Bundle, bundle_fp32: Bundle) -> None:
    graphs, plain = bundle.manifest.graphs, bundle_fp32.manifest.graphs
    assert graphs["vision"].inputs["pixels"].shape == ("batch", 3, "height", "width")
    assert graphs["vision"].outputs["image_embeds"].shape == ("batch", "patches", 32)
    assert graphs["qformer"].inputs["image_embeds"].shape == ("batch", "patches", 32)
    assert plain["vision"].inputs["pixels"].shape == ("batch", 3, 16, 16)
    assert bundle.manifest.limits.image_sizes == (24, 20)
    assert graphs["vision"].bytes < 1.2 * plain["vision"].bytes, "one set of weights for all sizes"


def test_every_size_was_verified_and_replays(bundle: Bundle) -> None:
    cases = {case.case: case for case in read_reference(bundle.path / REFERENCE).cases if case.graph == "vision"}
    assert {name: case.inputs["pixels"].shape[2:] for name, case in cases.items()} == {
        "16px": (16, 16),
        "24px": (24, 24),
        "20px": (20, 20),
    }
    assert all(check.ok for check in replay(bundle))
    assert "24 x 24 with `--image-size 24`" in (bundle.path / "README.md").read_text()


@pytest.mark.parametrize("side", [16, 20, 24])
def test_a_size_equals_eager(side: int, bundle: Bundle, sized: Blip2) -> None:
    pixels_BCHW = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    with CPU.open(bundle, "vision") as engine:
        found = engine.run({"pixels": pixels_BCHW})["image_embeds"]
    import torch

    with torch.no_grad():
        expected = sized.encode_image(torch.from_numpy(pixels_BCHW)).numpy()
    assert found.shape == (2, (side // 4) ** 2 + 1, 32)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_request_picks_the_size(bundle: Bundle, sized: Blip2, images: list[Path]) -> None:
    """Mixed in one call and out of order; the cache keeps the sizes apart."""
    sides = [None, 24, 16, 20, 24, None]
    requests = [Request(images[row % 3], "what colour is it?", image_size=side) for row, side in enumerate(sides)]
    eager = EagerPipeline(sized)
    expected = [eager.answer([request])[0].token_ids for request in requests]
    with Pipeline(bundle, cache_bytes=1 << 20) as pipeline:
        for _ in range(2):
            assert [answer.token_ids for answer in pipeline.answer(requests)] == expected
        vectors = [
            pipeline._encoder.encode(preprocessed, [None], runtime.pipeline.Stopwatch())
            for preprocessed in (
                runtime.pipeline.preprocess_batch([images[0]], bundle.manifest.preprocess.at(side)) for side in (16, 24)
            )
        ]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_sizes_that_were_not_exported_are_refused(
    bundle: Bundle, bundle_fp32: Bundle, sized: Blip2, model: Blip2, images: list[Path]
) -> None:
    with Pipeline(bundle, cache_bytes=0) as pipeline, pytest.raises(InputError, match=r"expected 16 or 24 or 20 .* 28"):
        pipeline.answer([Request(images[0], image_size=28)])
    with Pipeline(bundle_fp32, cache_bytes=0) as plain, pytest.raises(InputError, match=r"expected 16 .* found 24"):
        plain.answer([Request(images[0], image_size=24)])
    with pytest.raises(InputError, match="expected one of 16 for the whole batch of eager PyTorch, found 24"):
        EagerPipeline(model).answer([Request(images[0], image_size=24)])
    with pytest.raises(InputError, match="found 20, 24"):
        EagerPipeline(sized).answer([Request(images[0], image_size=side) for side in (20, 24)])


def test_evaluation_asks_for_one_size(bundle: Bundle, world: Path) -> None:
    rows = read_manifest(world / "vqa_train.jsonl")[:4]
    with Pipeline(bundle, cache_bytes=0) as pipeline:
        found = evaluate(pipeline, rows, task="vqa", batch_size=4, image_size=24)
    assert found.settings == {"task": "vqa", "batch_size": 4, "image_size": 24}


def test_the_command_line(bundle: Bundle, images: list[Path], world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        with pytest.raises(SystemExit):
            app(list(words), prog_name="qforge")
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert said("caption", str(bundle.path), str(images[0]), "--image-size", "24").strip()
    assert "expected 16 or 24 or 20" in said("caption", str(bundle.path), str(images[0]), "--image-size", "8")
    asked = ("evaluate", str(bundle.path), "--data", str(world / "captions_train.jsonl"), "--task", "retrieval")
    assert "--image-size: retrieval reads images at the trained size" in said(*asked, "--image-size", "24")


def test_a_bundle_that_only_searches_has_one_size(model: Blip2) -> None:
    with pytest.raises(InputError, match=r"export\.image_sizes: expected none for a bundle that only searches"):
        limits(model, WIDE, "retrieval")
