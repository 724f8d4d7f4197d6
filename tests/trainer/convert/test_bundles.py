"""From a published folder to a bundle by two commands: the bundle says what transformers' own model says.

qforge import FOLDER --out CKPT;  qforge export CKPT --out BUNDLE --precision fp32 --calibration FILE
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from runtime import load, load_retrieval
from runtime.answers import Request
from tests.published import RETRIEVAL
from tests.trainer.convert.conftest import Case, qforge

SPEAKING = ("opt-middle", "llama", "t5", "instruct-llama", "instruct-t5")
"""Tied and untied heads, one file and several, tiny and middle size."""
NEW_TOKENS = 10
SCORE_TOLERANCE = 1e-5
QUESTIONS = ["what colour is the circle?", "how many", "is there a red square left of the large blue triangle?"]
CAPTIONS = ["a red circle", "a small green square above a large blue triangle", "two shapes"]


@pytest.fixture(scope="session")
def exported(
    case: Callable[[str], Case], pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The fp32 bundle of a family, made when it is first asked for."""
    root = tmp_path_factory.mktemp("exported")
    rows = []
    for n, picture in enumerate(pictures):
        picture.save(root / f"{n}.png")
        row = {"image": f"{n}.png", "image_id": str(n)}
        rows += [row | {"captions": [CAPTIONS[n % 3]]}, row | {"question": QUESTIONS[n % 3], "answers": ["red"]}]
    manifest = root / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(name: str) -> Path:
        out = root / f"{name}-bundle"
        if not out.is_dir():
            arguments = ("--precision", "fp32", "--calibration", manifest, "--set", "export.verification_images=20")
            assert qforge("export", case(name).checkpoint, "--out", out, *arguments) == 0
        return out

    return made


@torch.no_grad()
def their_tokens(case: Case, processor: Any, picture: Image.Image, prompt: str) -> tuple[int, ...]:
    """Greedy ids of transformers' own `generate` for one request, end token excluded."""
    inputs = processor(images=picture, text=prompt, return_tensors="pt")
    ids = case.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
    text_config = case.theirs.config.text_config
    said = ids[1:] if text_config.is_encoder_decoder else ids[inputs["input_ids"].shape[1] :]
    end = text_config.eos_token_id
    return tuple(said[: said.index(end)] if end in said else said)


@pytest.mark.parametrize("name", SPEAKING)
def test_a_bundle_says_what_transformers_says(
    name: str, case: Callable[[str], Case], exported: Callable[[str], Path], pictures: list[Image.Image]
) -> None:
    model, processor = case(name), AutoProcessor.from_pretrained(case(name).source)
    config = model.ours.config
    requests = [
        Request(picture) if n % 4 == 3 else Request(picture, QUESTIONS[n % 3]) for n, picture in enumerate(pictures)
    ]
    prompts = [request.filled_prompt(caption=config.caption_prompt, vqa=config.vqa_prompt) for request in requests]
    with load(exported(name)) as pipeline:
        together = [answer.token_ids for answer in pipeline.answer(requests, max_new_tokens=NEW_TOKENS)]
        alone = [pipeline.answer([request], max_new_tokens=NEW_TOKENS)[0].token_ids for request in requests]
    expected = [their_tokens(model, processor, r.image, p) for r, p in zip(requests, prompts, strict=True)]
    assert together == expected
    assert alone == expected
    assert len(set(expected)) > 5, "the images and prompts change nothing"


@pytest.mark.parametrize("name", RETRIEVAL[:1])
@torch.no_grad()
def test_a_bundle_scores_as_transformers_scores(
    name: str, case: Callable[[str], Case], exported: Callable[[str], Path], pictures: list[Image.Image]
) -> None:
    model, processor = case(name), AutoProcessor.from_pretrained(case(name).source)
    with load_retrieval(exported(name)) as retrieval:
        images, features = retrieval.embed_images(pictures), retrieval.embed_texts(CAPTIONS)
        for caption, feature in zip(CAPTIONS, features, strict=True):
            inputs = processor(images=pictures, text=[caption] * len(pictures), return_tensors="pt")
            matched = model.theirs(**inputs, use_image_text_matching_head=True).logits_per_image.numpy()
            found = retrieval.match(images.image_embeds_BNE, [caption] * len(pictures))
            assert np.abs(found - matched).max() < SCORE_TOLERANCE
            cosines = model.theirs(**inputs).logits_per_image[:, 0].numpy()
            assert np.abs((images.features_BQF @ feature).max(axis=1) - cosines).max() < SCORE_TOLERANCE


def test_a_bundle_without_a_language_model_says_so(
    exported: Callable[[str], Path], pictures: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures[0].save(tmp_path / "one.png")
    assert qforge("caption", exported(RETRIEVAL[0]), tmp_path / "one.png") == 2
    assert "cannot answer" in capsys.readouterr().err
