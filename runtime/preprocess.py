"""Any ordinary image → the pixels that the vision tower reads.

Training-time evaluation, export and serving all use this one file, so a model meets the same pixels everywhere. The
result equals transformers' PIL image processors: a PIL resize of the 8-bit RGB image, /255, minus mean, by std.

    python -c "from runtime.preprocess import load_image; print(load_image('photo.jpg').size)"

Shape letters: B images, C colour channels, H height, W width
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from pydantic import Field, PositiveInt

from runtime.errors import ImageError, InputError
from runtime.packed import piece_of
from runtime.settings import Settings

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decoded: a small file can claim any size (Pillow's own bomb limit)."""

ImageSource: TypeAlias = str | Path | bytes | Image.Image | npt.NDArray[Any]
"""A path, an encoded file's bytes, a PIL image, or a uint8 array (H, W) or (H, W, 1 | 3 | 4)."""

Resample = Literal["bicubic", "bilinear", "lanczos", "nearest"]
Positive = Annotated[float, Field(gt=0)]


class PreprocessSettings(Settings):
    """How an RGB image becomes the pixels of one vision tower."""

    height: PositiveInt
    """Height (pixels) that the vision tower reads."""
    width: PositiveInt
    """Width (pixels) that the vision tower reads."""
    resample: Resample
    """PIL filter of the resize; the aspect ratio is not kept, as in BLIP-2."""
    mean: tuple[float, float, float]
    """Subtracted from each channel after division by 255."""
    std: tuple[Positive, Positive, Positive]
    """Divides each channel after the mean is subtracted."""

    def at(self, side: int | None) -> "PreprocessSettings":
        """The same for a square of another side (pixels); None: as it is."""
        return self if side is None else self.model_copy(update={"height": side, "width": side})


def sources_of(images: ImageSource | Sequence[ImageSource]) -> Sequence[ImageSource]:
    """One image or several, as several."""
    if isinstance(images, str | Path | bytes | Image.Image | np.ndarray):
        return [images]
    return images


def preprocess(source: ImageSource, settings: PreprocessSettings) -> npt.NDArray[np.float32]:
    """Read one image and return pixels_CHW; ImageError when it cannot be read."""
    resample = Image.Resampling[settings.resample.upper()]
    return to_pixels(load_image(source).resize((settings.width, settings.height), resample), settings)


def to_pixels(resized: Image.Image, settings: PreprocessSettings) -> npt.NDArray[np.float32]:
    """pixels_CHW of an RGB image that already has the size the tower reads."""
    unit_HWC = np.asarray(resized, dtype=np.float32) / np.float32(255)
    pixels_HWC = (unit_HWC - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))


def preprocess_batch(sources: Sequence[ImageSource], settings: PreprocessSettings) -> npt.NDArray[np.float32]:
    """Read several images and return pixels_BCHW; an object or path that repeats is read once."""
    if not sources:
        raise InputError("expected at least one image, found an empty list")
    pixels_of: dict[object, npt.NDArray[np.float32]] = {}
    keys = [str(source) if isinstance(source, str | Path) else id(source) for source in sources]
    for key, source in zip(keys, sources, strict=True):
        if key not in pixels_of:
            pixels_of[key] = preprocess(source, settings)
    return np.stack([pixels_of[key] for key in keys])


def load_image(source: ImageSource) -> Image.Image:
    """Read an image as 8-bit RGB, upright, on white.

    EXIF orientation is applied; transparency of any kind is composited on white; 16-bit grey is scaled (1/257), not
    clipped; palette, grey, CMYK and float images are converted; an animation gives its first frame.

    Raises:
        ImageError: missing, a folder, not an image, truncated, empty, or more than 178,956,970 pixels.
    """
    name = _name_of(source)
    image = _open(source, name)
    try:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(f"expected at most {MAX_PIXELS:,} pixels, found {width}x{height}; scale it down first")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except MemoryError:  # the image may be whole
        raise
    except Exception as error:  # decoders raise whatever they meet in a damaged file
        raise ImageError(f"{name}: the image is truncated or damaged; replace the file") from error
    finally:
        if image is not source:
            image.close()


def _name_of(source: ImageSource) -> str:
    if isinstance(source, str | Path):
        return str(source)
    return {bytes: "image bytes", np.ndarray: "image array"}.get(type(source), "image")


def _open(source: ImageSource, name: str) -> Image.Image:
    """Open lazily: the header is read, no pixel is decoded yet."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    try:
        if not isinstance(source, bytes) and (piece := piece_of(source)) is not None:
            source = piece.read()
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: expected an image file, found nothing under that name") from error
    except IsADirectoryError as error:
        raise ImageError(f"{name}: expected an image file, found a folder") from error
    except PermissionError as error:
        raise ImageError(f"{name}: this user may not read the file") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: expected at most {MAX_PIXELS:,} pixels, found more; scale it down first") from error
    except Exception as error:  # format detection raises whatever it meets in a damaged header
        raise ImageError(f"{name}: expected an image (JPEG, PNG, WebP, GIF, TIFF, BMP …), found other data") from error


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or 0 in array.shape:
        raise ImageError(
            f"image array: expected uint8 (height, width) or (height, width, 1 | 3 | 4), "
            f"found {array.dtype} {array.shape}; scale values to 0..255 and put the channels last"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits → grey with 8, scaled: Pillow's own conversion clips everything above 255 to white.

    Integers hold 16 bits in every file Pillow opens this way (PNG, TIFF, PGM). Floats say their range by their
    values: up to 1, up to 255 or up to 65535.
    """
    values_HW = np.asarray(image)
    low, high = float(values_HW.min()), float(values_HW.max())
    if not (low >= 0 and high <= 65535):  # also true for NaN
        raise ImageError(f"expected grey values from 0 to 65535, found {low:g} to {high:g}; scale them first")
    full_scale = 65535.0
    if image.mode == "F":
        full_scale = next(limit for limit in (1.0, 255.0, 65535.0) if high <= limit)
    grey = Image.fromarray(np.rint(values_HW * (255.0 / full_scale)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a 16-bit PNG names one grey value as see-through
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey
