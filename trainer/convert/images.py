"""Image processors of Hugging Face folders ↔ our preprocessing settings; what we cannot do alike is refused."""

import json
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError, InputError, MissingFile
from runtime.preprocess import PreprocessSettings
from trainer.towers import RESAMPLE

RESCALE = 1 / 255


def image_processor(folder: Path) -> tuple[dict[str, Any], Path]:
    """The stored settings of a folder's image processor, and the file that holds them."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: expected JSON, found a damaged file ({error})") from error
        stored = tree.get("image_processor") if name == "processor_config.json" else tree
        if isinstance(stored, dict):
            return stored, path
    raise MissingFile(
        f"{folder}: expected preprocessor_config.json (or processor_config.json with an image_processor), found "
        f"neither; it says how images become pixels"
    )


def read_image_processor(folder: Path, side: int, image_size: int | None) -> PreprocessSettings:
    """How this folder's model wants its pixels.

    Args:
        folder: Where the processor is stored.
        side: Pixels that the vision tower was made for.
        image_size: Side asked for by the user; None: the tower's.

    Raises:
        MissingFile, CheckpointError: no settings, or settings that our preprocessing cannot follow to the pixel.
        InputError: tower and processor disagree about the size, and the user has not said which.
    """
    stored, path = image_processor(folder)
    for switch, wanted in (("do_resize", True), ("do_rescale", True), ("do_center_crop", False), ("do_pad", False)):
        if stored.get(switch, wanted) not in (wanted, None):
            raise CheckpointError(
                f"{path}: expected {switch} {wanted}, found {stored[switch]}; images are resized to a square, scaled "
                f"by 1/255 and normalised here, nothing else"
            )
    factor = stored.get("rescale_factor", RESCALE)
    if abs(factor - RESCALE) > 1e-9:
        raise CheckpointError(f"{path}: expected rescale_factor 1/255, found {factor}")
    if stored.get("resample", 3) not in RESAMPLE:
        raise CheckpointError(
            f"{path}: expected resample {', '.join(map(str, RESAMPLE))} (PIL), found {stored['resample']}"
        )
    processed = _square(stored.get("size", side), path)
    if image_size is None and processed != side:
        raise InputError(
            f"{path}: expected images of {side} pixels, which the vision tower was made for, found {processed}; say "
            f"which is meant: --image-size {side} or --image-size {processed}"
        )
    side = side if image_size is None else image_size
    normalises = stored.get("do_normalize", True)
    if normalises and not ("image_mean" in stored and "image_std" in stored):
        raise CheckpointError(f"{path}: expected image_mean and image_std, found neither; the pixels would be guessed")
    return PreprocessSettings(
        height=side,
        width=side,
        resample=RESAMPLE[stored.get("resample", 3)],
        mean=tuple(stored["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=tuple(stored["image_std"]) if normalises else (1.0, 1.0, 1.0),
    )


def processor_json(settings: PreprocessSettings) -> dict[str, Any]:
    """The same settings as transformers stores them."""
    numbers = {name: number for number, name in RESAMPLE.items()}
    return {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": settings.height, "width": settings.width},
        "resample": numbers[settings.resample],
        "do_rescale": True,
        "rescale_factor": RESCALE,
        "do_normalize": True,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
    }


def _square(size: Any, path: Path) -> int:
    """Side (pixels) of a stored size; CheckpointError for one that keeps the aspect ratio or is no square."""
    if isinstance(size, int):
        return size
    sides = {size[name] for name in ("height", "width") if name in size} if isinstance(size, dict) else set()
    if len(sides) != 1 or set(size) - {"height", "width"}:
        raise CheckpointError(f"{path}: expected a square size (height and width), found {size}")
    side: int = sides.pop()
    return side
