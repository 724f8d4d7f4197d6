"""Real images and questions, drawn by seed: what INT8 ranges are measured on and what every graph is judged on.

Random input never occurs here: a quantised graph that is judged, or calibrated, on noise shows nothing about pictures
(reference/export.md §3.4). The two draws share no image.

Shape letters: B batch, N image tokens, E image width, T question tokens
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.feeds import StoredFeeds
from export.graphs import Arrays, Graph
from runtime.answers import Request
from runtime.dataset import Row
from runtime.errors import DataError, ImageError
from runtime.image_encoder import FUSED, pad_questions
from runtime.preprocess import load_image, preprocess
from runtime.progress import Progress
from runtime.text import qformer_text
from trainer.blip2 import Blip2, text_batch
from trainer.sources.convert import rows_of

NAMED = 5
"""Broken images that a message names."""


@dataclass(frozen=True)
class Drawn:
    """Requests on different images: for each image a caption, and a question where the data asks one."""

    calibration: tuple[Request, ...]
    verification: tuple[Request, ...]


def draw(
    model: Blip2,
    manifests: Sequence[Path],
    *,
    calibration_images: int,
    verification_images: int,
    seed: int,
    progress: Progress,
    answers: bool = True,
    again: Sequence[Request] = (),
) -> Drawn:
    """Draw images that can be read from all manifests together; captions and answers do not matter.

    `answers` is False for a bundle that only searches, which needs no question. `again` are the requests of an earlier
    calibration, which then are this one's; verification takes none of their images.

    Raises:
        DataError: no manifest, too few images, or no question although the model reads questions.
    """
    if not manifests:
        raise DataError("export: expected a manifest of real images to calibrate and verify on, found none; name one")
    calibration_images = 0 if again else calibration_images
    names, wanted = ", ".join(map(str, manifests)), calibration_images + verification_images
    taken = {Path(str(request.image)).resolve() for request in again}
    questions = _questions_by_image(row for path in manifests for row in rows_of(path))
    known, rng = [image for image in questions if image.resolve() not in taken], np.random.default_rng(seed)
    images, broken = list[Path](), list[str]()
    for index in rng.permutation(len(known)):
        if len(images) == wanted:
            break
        try:
            load_image(known[index])
            images.append(known[index])
        except ImageError as error:
            broken.append(str(error))
    unread = f" and {len(broken)} that cannot be read: {_some(broken)}" if broken else ""
    if len(images) < wanted:
        raise DataError(
            f"{names}: expected {wanted} images ({calibration_images} to calibrate, {verification_images} to verify), "
            f"found {len(images)}{unread}; give more, or lower export.calibration_images or export.verification_images"
        )
    if broken:
        progress.note(f"{names}: {len(broken)} images cannot be read and were passed over: {_some(broken)}")
    groups = [_requests(model, image, questions[image], rng) for image in images]
    drawn = Drawn(tuple(again) or _flat(groups[:calibration_images]), _flat(groups[calibration_images:]))
    asks = model.question_conditioned and model.config.qformer_reads == "question"  # whole prompts caption too
    for part in (drawn.calibration, drawn.verification):
        if answers and asks and part and not any(request.question for request in part):
            raise DataError(f"{names}: the model reads questions, found none about the images drawn; add a manifest")
    return drawn


def calibration_feeds(
    model: Blip2, graphs: Mapping[str, Graph], requests: Sequence[Request], folder: Path
) -> dict[str, StoredFeeds]:
    """What `vision` and `qformer` meet when these requests are answered, one row a time, by graph; kept in `folder`.

    The Q-Former sees its images as eager PyTorch encodes them, with questions and without.
    """
    feeds = {name: StoredFeeds(folder / name) for name in ("vision", "qformer")}
    embeds_of: dict[object, Arrays] = {}
    for request in requests:
        if request.image not in embeds_of:
            pixels = {"pixels": preprocess(request.image, model.preprocess)[None]}
            feeds["vision"].append(pixels)
            embeds_of = {request.image: graphs["vision"].run_eager(pixels)}  # an image's requests follow each other
        question: Arrays = {}
        if model.question_conditioned:
            ids_BT, mask_BT = pad_questions([question_ids(model, request)])
            question = {"question_ids": ids_BT, "question_mask": mask_BT}
        feeds["qformer"].append({"image_embeds": embeds_of[request.image]["image_embeds"], **question})
    if FUSED in graphs:
        feeds[FUSED] = feeds["vision"]
    return feeds


def question_ids(model: Blip2, request: Request) -> tuple[int, ...] | None:
    """Q-Former ids of a request as the trainer makes them; None where it reads no text for this request."""
    if not model.question_conditioned:
        return None
    text = _condition(model, request)
    return None if text is None else tuple(text_batch(model, [text]).ids[0].tolist())


def _condition(model: Blip2, request: Request) -> str | None:
    config = model.config
    prompt = request.filled_prompt(caption=config.caption_prompt, vqa=config.vqa_prompt)
    return qformer_text(config.qformer_reads, request.question, prompt)


def _questions_by_image(rows: Iterable[Row]) -> dict[Path, list[str]]:
    found: dict[Path, list[str]] = {}
    for row in rows:
        asked = found.setdefault(row.image, [])
        if row.question is not None:
            asked.append(row.question)
    return found


def _requests(model: Blip2, image: Path, asked: Sequence[str], rng: np.random.Generator) -> list[Request]:
    """A caption, and one of the questions; those that the Q-Former would have to cut are left out."""
    fitting = list(asked)
    if model.question_conditioned:  # else nothing is cut, and there may be no tokenizer of the Q-Former
        longest = model.config.qformer.max_text_tokens
        fitting = [
            question
            for question in asked
            if len(model.text_tokenizer(_condition(model, Request(image, question)) or "").input_ids) <= longest
        ]
    return [Request(image), *(Request(image, question) for question in rng.permutation(fitting)[:1].tolist())]


def _some(errors: Sequence[str]) -> str:
    """The first errors, and how many more there are."""
    more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    return "; ".join(errors[:NAMED]) + more


def _flat(groups: Sequence[Sequence[Request]]) -> tuple[Request, ...]:
    return tuple(request for group in groups for request in group)
