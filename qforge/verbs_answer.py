"""The verbs that answer: caption and vqa, from a bundle, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import runtime
from qforge.console import Outcome, emit
from qforge.verbs_cache import warned
from runtime.answers import Answer, Request
from runtime.backends import Device
from runtime.decoding import Decoding
from runtime.pipeline import Pipeline


@dataclass(frozen=True)
class How:
    """What both verbs are told of the texts they make."""

    prompt: str | None
    max_new_tokens: int | None
    image_size: int | None
    decoding: Decoding
    stream: bool
    cache_dir: Path | None


def caption(bundle: Path, images: Sequence[Path], how: How, device: Device) -> Outcome:
    """One line per text: an image has one, unless the decoding returns several."""
    requests = [Request(image, prompt=how.prompt, image_size=how.image_size) for image in images]
    return _answer(bundle, requests, [f"{request.image_name}: " for request in requests], how, device)


def vqa(bundle: Path, image: Path, questions: Sequence[str], how: How, device: Device) -> Outcome:
    """One line per text: a question has one, unless the decoding returns several."""
    requests = [Request(image, question, how.prompt, how.image_size) for question in questions]
    return _answer(bundle, requests, [f"{question} " for question in questions], how, device)


def _answer(bundle: Path, requests: Sequence[Request], labels: Sequence[str], how: How, device: Device) -> Outcome:
    """`labels` stand before the texts where there are several requests."""
    labels = labels if len(requests) > 1 else [""]
    with runtime.load(
        bundle, device.backend, device.threads, provider=device.provider, cache_dir=how.cache_dir
    ) as pipeline:
        if how.stream:
            answers, lines = _streamed(pipeline, requests, labels, how), [""]  # its line end ends the last text
        else:
            answers = pipeline.answer(requests, max_new_tokens=how.max_new_tokens, decoding=how.decoding)
            lines = [label + text for label, answer in zip(labels, answers, strict=True) for text in answer.texts]
        cache = warned(pipeline.cache.statistics())
    return Outcome({"results": [answer.as_json() for answer in answers], "cache": cache}, "\n".join(lines))


def _streamed(pipeline: Pipeline, requests: Sequence[Request], labels: Sequence[str], how: How) -> list[Answer]:
    """One request after the other, each printed as it is said."""
    answers = list[Answer]()
    for number, (request, label) in enumerate(zip(requests, labels, strict=True)):
        asked = {"image": request.image_name, "question": request.question}
        before = ("\n" if number else "") + label
        for piece in pipeline.stream(request, max_new_tokens=how.max_new_tokens, decoding=how.decoding):
            emit(asked | piece.as_json(), before + piece.text)
            before = ""
            if piece.answer is not None:
                answers.append(piece.answer)
    return answers
