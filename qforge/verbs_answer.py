"""The verbs that answer: caption and vqa, from a bundle, without torch."""

from collections.abc import Sequence
from pathlib import Path

import runtime
from qforge.console import Outcome
from runtime.answers import Answer, Request
from runtime.backends import Device


def caption(
    bundle: Path,
    images: Sequence[Path],
    prompt: str | None,
    max_new_tokens: int | None,
    image_size: int | None,
    device: Device,
) -> Outcome:
    """One line per image."""
    requests = [Request(image, prompt=prompt, image_size=image_size) for image in images]
    answers = _answer(bundle, requests, max_new_tokens, device)
    many = len(answers) > 1
    return _outcome(answers, [f"{answer.image}: {answer.text}" if many else answer.text for answer in answers])


def vqa(
    bundle: Path,
    image: Path,
    questions: Sequence[str],
    prompt: str | None,
    max_new_tokens: int | None,
    image_size: int | None,
    device: Device,
) -> Outcome:
    """One line per question."""
    requests = [Request(image, question, prompt, image_size) for question in questions]
    answers = _answer(bundle, requests, max_new_tokens, device)
    many = len(answers) > 1
    return _outcome(answers, [f"{answer.question} {answer.text}" if many else answer.text for answer in answers])


def _answer(bundle: Path, requests: Sequence[Request], max_new_tokens: int | None, device: Device) -> list[Answer]:
    with runtime.load(bundle, device.backend, device.threads, provider=device.provider) as pipeline:
        return pipeline.answer(requests, max_new_tokens=max_new_tokens)


def _outcome(answers: Sequence[Answer], lines: Sequence[str]) -> Outcome:
    return Outcome({"results": [answer.as_json() for answer in answers]}, "\n".join(lines))
