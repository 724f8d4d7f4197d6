"""The verbs that answer: caption and vqa, from a bundle, without torch.

What is wrong with one image or question costs the others nothing: it is told on stderr and under `refused`, and the
exit code is 2. Where nothing can be answered there is one error.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import runtime
from qforge.console import Outcome, emit
from qforge.verbs_cache import warned
from runtime.answers import Answer, Request
from runtime.backends import Device
from runtime.decoding import Decoding
from runtime.errors import InputError
from runtime.pipeline import Pipeline

REFUSALS = (InputError, MemoryError)
"""What one request can be refused for; an image that cannot be read is an InputError too."""


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
            found, lines = _streamed(pipeline, requests, labels, how), [""]  # its line end ends the last text
        else:
            found = _answered(pipeline, requests, how)
            pairs = [(label, one) for label, one in zip(labels, found, strict=True) if isinstance(one, Answer)]
            lines = [label + text for label, answer in pairs for text in answer.texts]
        cache = warned(pipeline.cache.statistics())
    answers = [one for one in found if isinstance(one, Answer)]
    errors = [(request, one) for request, one in zip(requests, found, strict=True) if not isinstance(one, Answer)]
    if not answers:
        raise errors[0][1]
    if errors and how.stream:
        emit(None, "\n")  # the last text has no line end yet
    for _, error in errors:
        print(error, file=sys.stderr)
    data = {
        "results": [answer.as_json() for answer in answers],
        "refused": [_names(request) | {"error": str(error)} for request, error in errors],
        "cache": cache,
    }
    return Outcome(data, "\n".join(lines), 2 if errors else 0)


def _answered(pipeline: Pipeline, requests: Sequence[Request], how: How) -> list[Answer | Exception]:
    """All in batches; each for itself when one of them cannot be answered, so that it alone is refused."""
    try:
        return list(pipeline.answer(requests, max_new_tokens=how.max_new_tokens, decoding=how.decoding))
    except REFUSALS as error:
        if len(requests) == 1:
            return [error]
    return [one for request in requests for one in _answered(pipeline, [request], how)]


def _streamed(
    pipeline: Pipeline, requests: Sequence[Request], labels: Sequence[str], how: How
) -> list[Answer | Exception]:
    """One request after the other, each printed as it is said."""
    found = list[Answer | Exception]()
    for request, label in zip(requests, labels, strict=True):
        before = ("\n" if any(isinstance(one, Answer) for one in found) else "") + label
        try:
            for piece in pipeline.stream(request, max_new_tokens=how.max_new_tokens, decoding=how.decoding):
                emit(_names(request) | piece.as_json(), before + piece.text)
                before = ""
                if piece.answer is not None:
                    found.append(piece.answer)
        except REFUSALS as error:
            found.append(error)
    return found


def _names(request: Request) -> dict[str, str | None]:
    return {"image": request.image_name, "question": request.question}
