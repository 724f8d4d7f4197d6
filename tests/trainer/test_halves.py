"""A large model passes through memory half by half: one frozen half with weights, the other tells sizes alone."""

from pathlib import Path

import pytest
import torch

from runtime.errors import CheckpointError
from tests.tiny import write_tiny_halves
from trainer.blip2 import new_blip2
from trainer.checkpoint import load_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("halves")


@pytest.fixture(scope="module")
def checkpoint(halves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = new_blip2(write_tiny_halves(halves), question_conditioned=False)
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(model, folder, stage="stage2", metrics={}, recipe_yaml="seed: 1\n")
    return folder


def test_each_half_alone_computes_what_the_whole_does(checkpoint: Path) -> None:
    whole, seeing, speaking = load_checkpoint(checkpoint), *(load_checkpoint(checkpoint, h) for h in HALVES)
    pixels = torch.rand(2, 3, whole.preprocess.height, whole.preprocess.width)
    with torch.no_grad():
        assert torch.equal(
            seeing.query_prefix(seeing.encode_image(pixels)), whole.query_prefix(whole.encode_image(pixels))
        )
        embeds = torch.rand(1, 4, whole.bridge.language_projection.out_features)
        logits = [model.language_model(inputs_embeds=embeds).logits for model in (whole, speaking)]
    assert torch.equal(*logits)


def test_the_other_half_takes_no_memory_and_tells_sizes(checkpoint: Path) -> None:
    seeing, speaking = (load_checkpoint(checkpoint, half) for half in HALVES)
    assert all(p.is_meta for p in [*seeing.language_model.parameters(), *speaking.vision.parameters()])
    assert not any(p.is_meta for p in [*seeing.vision.parameters(), *speaking.language_model.parameters()])
    assert (seeing.style, seeing.end_token_ids, seeing.pad_token_id) == (
        speaking.style,
        speaking.end_token_ids,
        speaking.pad_token_id,
    )
    assert seeing.preprocess == speaking.preprocess


def test_only_the_half_that_is_loaded_is_checked(checkpoint: Path, halves: Path) -> None:
    weights = next((halves / "language").glob("*.safetensors"))
    original = weights.read_bytes()
    weights.write_bytes(original[:-4] + b"\0\0\0\1")
    try:
        load_checkpoint(checkpoint, "vision")
        with pytest.raises(CheckpointError, match=r"frozen language/model.safetensors"):
            load_checkpoint(checkpoint, "language")
    finally:
        weights.write_bytes(original)


HALVES = ("vision", "language")
