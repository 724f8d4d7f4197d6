"""Random changes to training images: resized crop, mirror, RandAugment, on PIL images.

Crop and mirror are BLIP-2's (section 4.1; scale 0.5 to 1 as in LAVIS' blip_image_train). RandAugment (arXiv
1909.13719) draws from LAVIS' list, whose operations are applied every other time, to the picture that was resized.
All randomness comes from the generator that is given.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from runtime.preprocess import PreprocessSettings
from trainer.config import AugmentConfig

ASPECT = (3 / 4, 4 / 3)
"""Width by height of a crop, from and to, drawn evenly in its logarithm."""
ATTEMPTS = 10
"""Draws of a crop that may miss the image before the largest one in its middle is taken."""
GREY = (128, 128, 128)
"""Fills what a sheared, shifted or turned picture leaves empty."""
LARGEST_SHEAR, LARGEST_SHIFT, LARGEST_TURN = 0.3, 10.0, 30.0
"""At full magnitude: pixels per pixel, pixels, degrees."""

Operation = Callable[[Image.Image, float, float], Image.Image]
"""(picture, strength 0 to 1, sign) → picture."""


def augmented(
    image: Image.Image, settings: PreprocessSettings, config: AugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """An RGB image of the size the tower reads, changed as `rng` says."""
    if config.crop_scale is not None:
        image = image.crop(crop_box(image.size, config.crop_scale, rng))
    image = image.resize((settings.width, settings.height), Image.Resampling[settings.resample.upper()])
    if config.flip and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    for _ in range(config.operations):
        operation = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
        sign = float(rng.choice((-1.0, 1.0)))
        if rng.random() < 0.5:
            image = operation(image, config.magnitude / 10, sign)
    return image


def crop_box(size: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop that keeps a share of the area drawn from `scale`."""
    width, height = size
    for _ in range(ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _factor(strength: float) -> float:
    """Of an enhancement: 0.1 to 1.9, where 1 changes nothing."""
    return 0.1 + 1.8 * strength


OPERATIONS: tuple[Operation, ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageEnhance.Brightness(image).enhance(_factor(strength)),
    lambda image, strength, sign: ImageEnhance.Sharpness(image).enhance(_factor(strength)),
    lambda image, strength, sign: _affine(image, 1, sign * strength * LARGEST_SHEAR, 0, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, sign * strength * LARGEST_SHEAR, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, sign * strength * LARGEST_SHIFT, 0, 1, 0),
    lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, sign * strength * LARGEST_SHIFT),
    lambda image, strength, sign: image.rotate(
        sign * strength * LARGEST_TURN, Image.Resampling.BILINEAR, fillcolor=GREY
    ),
)
"""LAVIS' list: identity, auto-contrast, equalise, brightness, sharpness, shear, shift (both ways), turn."""
