"""The verbs that answer: caption and vqa, from a bundle, without torch."""

from collections.abc import Sequence
from pathlib import Path

import runtime
from qforge.console import Outcome
from qforge.verbs_cache import warned
from runtime.answers import Answer, Request
from runtime.backends import Device
from runtime.query_cache import Statistics


def caption(
    bundle: Path,
    images: Sequence[Path],
    prompt: str | None,
    max_new_tokens: int | None,
    image_size: int | None,
    device: Device,
    cache_dir: Path | None,
) -> Outcome:
    """One line per image."""
    requests = [Request(image, prompt=prompt, image_size=image_size) for image in images]
    answers, cache = _answer(bundle, requests, max_new_tokens, device, cache_dir)
    many = len(answers) > 1
    return _outcome(answers, cache, [f"{answer.image}: {answer.text}" if many else answer.text for answer in answers])


def vqa(
    bundle: Path,
    image: Path,
    questions: Sequence[str],
    prompt: str | None,
    max_new_tokens: int | None,
    image_size: int | None,
    device: Device,
    cache_dir: Path | None,
) -> Outcome:
    """One line per question."""
    requests = [Request(image, question, prompt, image_size) for question in questions]
    answers, cache = _answer(bundle, requests, max_new_tokens, device, cache_dir)
    many = len(answers) > 1
    return _outcome(answers, cache, [f"{answer.question} {answer.text}" if many else answer.text for answer in answers])


def _answer(
    bundle: Path, requests: Sequence[Request], max_new_tokens: int | None, device: Device, cache_dir: Path | None
) -> tuple[list[Answer], Statistics]:
    with runtime.load(
        bundle, device.backend, device.threads, provider=device.provider, cache_dir=cache_dir
    ) as pipeline:
        answers = pipeline.answer(requests, max_new_tokens=max_new_tokens)
        return answers, warned(pipeline.cache.statistics())


def _outcome(answers: Sequence[Answer], cache: Statistics, lines: Sequence[str]) -> Outcome:
    return Outcome({"results": [answer.as_json() for answer in answers], "cache": cache}, "\n".join(lines))
