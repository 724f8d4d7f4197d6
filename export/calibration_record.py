"""`calibration.json`: which images activation ranges were measured on, and the ranges; enough to do it again.

qforge export runs/demo/checkpoint --out bundle --precision int8 --calibration calibration.json

takes the very same images with the same questions and texts, or says which of them changed.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, ValidationError

from runtime.answers import Request
from runtime.errors import DataError, InputError, MissingFile
from runtime.files import sha256_of, write_text_atomic
from runtime.precision import RangeMethod
from runtime.settings import Settings, first_problem

MeasuredOn = Literal["traced graphs", "written graphs"]
RECORD = "calibration.json"
"""File of the bundle."""
NAMED = 5
"""Images that an error names."""


class CalibratedImage(Settings):
    """One image and what it was shown with."""

    image: str
    """Path from the record's folder, `/` between its parts."""
    sha256: str
    """Hex digest of the file."""
    asked: tuple[str | None, ...]
    """Questions in order; null for a caption."""
    texts: tuple[str, ...]
    """Texts it was searched with; none in a bundle that only answers."""


class Calibration(Settings):
    """Everything in `calibration.json`."""

    format: Literal[1] = 1
    """Version of this layout."""
    qforge: str
    """Version that measured."""
    checkpoint: str
    """SHA-256 of the checkpoint, as in the bundle's manifest."""
    data: tuple[str, ...]
    """Manifests that the images were drawn from; paths from the record's folder."""
    count: PositiveInt
    """Images."""
    seed: NonNegativeInt
    """Of the draw."""
    method: RangeMethod
    """How a range follows from the values."""
    images: tuple[CalibratedImage, ...]
    """In the order they were drawn."""
    data_sha256: str
    """One hash over all images, questions and texts, in order."""
    measured_on: MeasuredOn
    """traced: before any rounding; written: what the quantised graphs of the bundle state."""
    ranges: dict[str, dict[str, tuple[float, float]]]
    """Graph → tensor → (low, high)."""


def recorded(
    requests: Sequence[Request],
    texts: Mapping[Path, Sequence[str]],
    *,
    manifests: Sequence[Path],
    folder: Path,
    checkpoint: str,
    qforge: str,
    seed: int,
    method: RangeMethod,
    measured_on: MeasuredOn,
    ranges: dict[str, dict[str, tuple[float, float]]],
) -> Calibration:
    """The record of a calibration that will lie in `folder`; every image is hashed."""
    asked: dict[Path, list[str | None]] = {}
    for request in requests:
        asked.setdefault(Path(str(request.image)), []).append(request.question)
    images = tuple(
        CalibratedImage(
            image=_from(folder, image), sha256=sha256_of(image), asked=tuple(of), texts=tuple(texts.get(image, ()))
        )
        for image, of in asked.items()
    )
    return Calibration(
        qforge=qforge,
        checkpoint=checkpoint,
        data=tuple(_from(folder, path) for path in manifests),
        count=len(images),
        seed=seed,
        method=method,
        images=images,
        data_sha256=_hash(images),
        measured_on=measured_on,
        ranges=ranges,
    )


def write_calibration(file: Path, calibration: Calibration) -> None:
    """Write it whole or not at all."""
    write_text_atomic(file, calibration.model_dump_json(indent=1) + "\n")


def is_calibration(file: Path) -> bool:
    """Whether a file given as calibration data is a record and no manifest of images; MissingFile when absent."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise MissingFile(f"{file}: expected a manifest (JSON Lines) or a {RECORD}, found nothing there") from error
    except (ValueError, IsADirectoryError):
        return False  # more than one line, or no JSON: the manifest's reader says what is wrong with it
    return isinstance(found, dict) and "data_sha256" in found


def read_calibration(file: Path) -> Calibration:
    """Read a record; DataError when a field is wrong, or the images were edited by hand."""
    try:
        found = Calibration.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise DataError(f"{file}: {first_problem(error)}; calibrate again: qforge calibrate") from error
    if found.data_sha256 != _hash(found.images) or found.count != len(found.images):
        raise DataError(f"{file}: the list of images was changed by hand; calibrate again: qforge calibrate")
    return found


def same_requests(file: Path, calibration: Calibration, checkpoint: str) -> tuple[list[Request], dict[Path, list[str]]]:
    """The requests of a record that was read from `file`, and the texts of each image.

    Raises:
        InputError: it was measured on another checkpoint.
        DataError: an image is missing or changed; names it.
    """
    if calibration.checkpoint != checkpoint:
        raise InputError(
            f"{file}: expected ranges of this checkpoint (SHA-256 {checkpoint[:12]}…), found those of another "
            f"({calibration.checkpoint[:12]}…); calibrate again: qforge calibrate"
        )
    wrong, requests, texts = list[str](), list[Request](), dict[Path, list[str]]()
    for entry in calibration.images:
        image = (file.resolve().parent / entry.image).resolve()
        if not image.is_file():
            wrong.append(f"{image} (missing)")
        elif sha256_of(image) != entry.sha256:
            wrong.append(f"{image} (changed)")
        requests += [Request(image, question) for question in entry.asked]
        texts[image] = list(entry.texts)
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise DataError(
            f"{file}: {len(wrong)} of its {calibration.count} images are not as they were: "
            f"{', '.join(wrong[:NAMED])}{more}; bring them back, or calibrate again: qforge calibrate"
        )
    return requests, texts


def manifests_of(file: Path, calibration: Calibration) -> list[Path]:
    """Where the record's data lies."""
    return [(file.resolve().parent / path).resolve() for path in calibration.data]


def _from(folder: Path, path: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _hash(images: Sequence[CalibratedImage]) -> str:
    """Content only: the same images elsewhere have the same hash."""
    facts = [[image.sha256, list(image.asked), list(image.texts)] for image in images]
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()
