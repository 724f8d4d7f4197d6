"""Eager PyTorch takes the settings and the history of a bundle, and says the same; what it cannot is refused."""

from pathlib import Path

import pytest

from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import Bundle
from runtime.decoding import Decoding
from runtime.errors import InputError
from runtime.pipeline import Pipeline
from trainer.blip2 import Blip2
from trainer.generate import EagerPipeline

pytestmark = pytest.mark.filterwarnings("ignore:Passing `(repetition_penalty|no_repeat_ngram_size)`")
SETTINGS = {
    "greedy": Decoding(),
    "beams": Decoding(num_beams=3, early_stopping=True, length_penalty=0.5, num_return_sequences=2),
    "rules": Decoding(no_repeat_ngram_size=2, min_new_tokens=4),
    "beams and rules": Decoding(num_beams=3, early_stopping="never", no_repeat_ngram_size=2),
}
TURNS = (("What shape is it?", "a large circle"), ("is it red?", "no"))


@pytest.fixture(scope="module")
def asked(world: Path) -> list[Request]:
    """Captions, questions of unequal length, and questions behind others."""
    images = sorted((world / "images").glob("train-*.png"))[:8]
    return [
        *(Request(image) for image in images[:3]),
        *(
            Request(image, question)
            for image, question in zip(images, ("how many?", "what colour is it?"), strict=False)
        ),
        *(Request(image, "what colour is it?", turns=TURNS[: 1 + number % 2]) for number, image in enumerate(images)),
    ]


@pytest.mark.parametrize("decoding", SETTINGS.values(), ids=SETTINGS)
def test_the_bundle_says_what_eager_pytorch_says(
    decoding: Decoding, model: Blip2, bundle_fp32: Bundle, asked: list[Request]
) -> None:
    expected = EagerPipeline(model).answer(asked, decoding=decoding)
    with Pipeline(bundle_fp32, device=Device(threads=1), cache_bytes=1 << 20) as pipeline:
        found = pipeline.answer(asked, decoding=decoding)
    assert [(a.token_ids, a.texts) for a in found] == [(a.token_ids, a.texts) for a in expected]
    assert len({answer.token_ids for answer in expected}) >= 3, "one text for all would prove nothing"
    assert all(len(answer.texts) == decoding.num_return_sequences for answer in expected)


def test_stop_strings_and_penalties_one_by_one(model: Blip2, bundle_fp32: Bundle, asked: list[Request]) -> None:
    eager = EagerPipeline(model)
    stop = next(answer.text for answer in eager.answer(asked[:1]))[2:4]
    for decoding in (Decoding(repetition_penalty=1.4), Decoding(stop_strings=(stop,))):
        with Pipeline(bundle_fp32, device=Device(threads=1), cache_bytes=1 << 20) as pipeline:
            found = pipeline.answer(asked, decoding=decoding)
        expected = [eager.answer([request], decoding=decoding)[0] for request in asked]
        assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
        assert found[0].token_ids != eager.answer(asked[:1])[0].token_ids


def test_the_history_changes_the_answer(model: Blip2, asked: list[Request]) -> None:
    """Otherwise the equality above would hold without it."""
    last = asked[-8:]
    alone = [Request(request.image, request.question) for request in last]
    eager = EagerPipeline(model)
    assert [a.token_ids for a in eager.answer(last)] != [a.token_ids for a in eager.answer(alone)]


def test_what_eager_pytorch_does_otherwise_is_refused(model: Blip2, asked: list[Request]) -> None:
    with pytest.raises(InputError, match="do_sample: eager PyTorch draws"):
        EagerPipeline(model).answer(asked, decoding=Decoding(do_sample=True))
    with pytest.raises(InputError, match="repetition_penalty: in eager PyTorch"):
        EagerPipeline(model).answer(asked, decoding=Decoding(repetition_penalty=1.2))
