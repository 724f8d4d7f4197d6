"""The graph for captions: equal to the two it stands for, exported, quantised, probed and used."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.calibration import calibration_feeds
from export.graphs import fused_graph
from export.retrieval_graphs import graph_set
from runtime.answers import Request
from runtime.backends import CPU
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.pipeline import Pipeline
from runtime.replay import replay
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def bundle(bundle_wide: Bundle) -> Bundle:
    return bundle_wide


@pytest.fixture(scope="module")
def images(world: Path) -> list[Path]:
    return sorted((world / "images").rglob("*.png"))[:4]


def test_it_is_the_two_graphs_in_one(bundle: Bundle) -> None:
    pixels = {"pixels": np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)}
    with (
        CPU.open(bundle, "fused") as fused,
        CPU.open(bundle, "vision") as vision,
        CPU.open(bundle, "qformer") as qformer,
    ):
        found, embeds = fused.run(pixels), vision.run(pixels)
        nothing = np.zeros((3, 1), np.int64)
        plain = qformer.run({**embeds, "question_ids": nothing, "question_mask": nothing})
    assert list(found) == ["prefix", "image_embeds"]
    np.testing.assert_allclose(found["prefix"], plain["prefix"], atol=2e-5)
    np.testing.assert_allclose(found["image_embeds"], embeds["image_embeds"], atol=2e-5)


def test_it_is_verified_and_probed(bundle: Bundle) -> None:
    checks = [check for check in replay(bundle) if check.graph == "fused/16px"]
    assert {check.output for check in checks} == {"prefix", "image_embeds"} and all(check.ok for check in checks)
    assert "| fused | 16px | fp32 |" in (bundle.path / "README.md").read_text()


def test_answers_are_the_same(bundle: Bundle, bundle_fp32: Bundle, images: list[Path]) -> None:
    requests = [Request(image) for image in images] + [Request(image, "what colour is it?") for image in images]
    with Pipeline(bundle, cache_bytes=0) as fused, Pipeline(bundle_fp32, cache_bytes=0) as plain:
        assert [a.token_ids for a in fused.answer(requests)] == [a.token_ids for a in plain.answer(requests)]


def test_it_is_calibrated_on_what_vision_sees(model: Blip2, images: list[Path], tmp_path: Path) -> None:
    graphs = graph_set(model, "generate", fused=True).answering
    feeds = calibration_feeds(model, graphs, [Request(image) for image in images], tmp_path)
    assert len(feeds["fused"]) == 4 and feeds["fused"] == feeds["vision"]


def test_who_cannot_have_it(model: Blip2, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"export\.fused: expected a bundle that captions"):
        graph_set(model, "retrieval", fused=True)
    prompted = load_checkpoint(checkpoint)
    prompted.config = prompted.config.model_copy(update={"qformer_reads": "prompt"})
    with pytest.raises(InputError, match="this one reads the whole prompt"):
        graph_set(prompted, "generate", fused=True)


def test_a_model_without_questions_gives_the_prefix_alone(checkpoint: Path) -> None:
    plain = load_checkpoint(checkpoint)
    plain.question_conditioned = False
    graph = fused_graph(plain)
    outputs = graph.run_eager({"pixels": np.zeros((2, 3, 16, 16), np.float32)})
    assert list(outputs) == ["prefix"]
    with torch.no_grad():
        expected = plain.query_prefix(plain.encode_image(torch.zeros(2, 3, 16, 16)))
    np.testing.assert_allclose(outputs["prefix"], expected.numpy(), atol=1e-6)
