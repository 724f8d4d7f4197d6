"""Crops keep the share that was asked for, a mirror mirrors, each RandAugment operation does what its name says."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from runtime.preprocess import PreprocessSettings
from trainer.augment import ASPECT, GREY, OPERATIONS, augmented, crop_box
from trainer.config import AugmentConfig

SETTINGS = PreprocessSettings(height=32, width=32, resample="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(50, 200, (size[1], size[0], 3), np.uint8))


def test_crops_keep_their_share_and_shape() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box((640, 480), (0.5, 1.0), rng) for _ in range(2000)])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    shares, aspects = widths * heights / (640 * 480), widths / heights
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 640).all() and (boxes[:, 3] <= 480).all()
    assert shares.min() > 0.49 and shares.max() <= 1 and shares.std() > 0.1
    assert aspects.min() > ASPECT[0] - 0.01 and aspects.max() < ASPECT[1] + 0.01
    assert np.unique(boxes[:, 0]).size > 100, "places are drawn too"


def test_a_picture_too_narrow_for_any_crop_gives_its_middle() -> None:
    assert crop_box((1000, 10), (1.0, 1.0), np.random.default_rng(0)) == (493, 0, 506, 10)


def test_nothing_is_changed_unless_asked_for() -> None:
    plain = noise().resize((32, 32), Image.Resampling.BICUBIC)
    unchanged = augmented(noise(), SETTINGS, AugmentConfig(), np.random.default_rng(0))
    assert unchanged.tobytes() == plain.tobytes()
    assert not AugmentConfig().active and AugmentConfig(flip=True).active and AugmentConfig(operations=1).active


def test_every_other_picture_is_mirrored() -> None:
    plain = noise().resize((32, 32), Image.Resampling.BICUBIC)
    made = [augmented(noise(), SETTINGS, AugmentConfig(flip=True), np.random.default_rng(i)) for i in range(200)]
    mirrored = [image.tobytes() == ImageOps.mirror(plain).tobytes() for image in made]
    assert 70 < sum(mirrored) < 130
    assert all(m or image.tobytes() == plain.tobytes() for m, image in zip(mirrored, made, strict=True))


def test_the_generator_alone_decides() -> None:
    config = AugmentConfig(crop_scale=(0.5, 1.0), flip=True, operations=2)
    first, again, other = (
        augmented(noise(), SETTINGS, config, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
def test_operations_keep_the_size_and_change_what_they_should(number: int) -> None:
    image = noise((32, 32))
    weak, strong = OPERATIONS[number](image, 0.1, 1.0), OPERATIONS[number](image, 1.0, 1.0)
    assert weak.size == strong.size == image.size and strong.mode == "RGB"
    assert (strong.tobytes() == image.tobytes()) == (number == 0)
    if number >= 5:  # they move pixels, and fill with grey from where the sign says
        moved = [np.asarray(OPERATIONS[number](image, 1.0, sign)) for sign in (1.0, -1.0)]
        assert not np.array_equal(*moved)
        assert all((pixels == GREY).all(axis=-1).sum() > 32 for pixels in moved)


def test_a_shift_moves_by_pixels() -> None:
    image = noise((32, 32))
    shifted = np.asarray(OPERATIONS[7](image, 1.0, 1.0))
    assert np.array_equal(shifted[:, :22], np.asarray(image)[:, 10:])


def test_a_scale_the_wrong_way_round_is_refused() -> None:
    with pytest.raises(ValueError, match="goes from more to less"):
        AugmentConfig(crop_scale=(1.0, 0.5))
