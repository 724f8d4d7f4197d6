"""Fills a disk cache with images that are known beforehand, so that the first question about one is answered fast.

Only what looks at images is opened: no language model is loaded. A bundle that only searches keeps what it searches
with.

    warm_up(read_bundle("runs/demo/bundle-int8"), [Path("photo.jpg")], cache, device=CPU, progress=Progress())
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.backends import Device, Engine
from runtime.bundle import Bundle
from runtime.disk_cache import DiskCache
from runtime.errors import DataError, ImageError, InputError
from runtime.image_encoder import open_encoder
from runtime.pipeline import QFORMER_TOKENIZER
from runtime.preprocess import preprocess
from runtime.progress import Progress
from runtime.retrieval import Retrieval
from runtime.text import qformer_text
from runtime.tokenizer import TextTokenizer, cut


@dataclass(frozen=True)
class Warmed:
    """What a warm-up did."""

    images: int
    """Different files that were handed to the cache."""
    new: int
    """Of these, those that it did not hold before."""
    broken: dict[str, str]
    """Image file → why it cannot be read."""


def warm_up(
    bundle: Bundle,
    images: Sequence[Path],
    cache: DiskCache,
    *,
    device: Device,
    image_size: int | None = None,
    progress: Progress,
) -> Warmed:
    """Remember the vision features and the caption prefix of every image; unreadable ones are noted.

    A caption then costs only decoding. A question costs the Q-Former too where it reads the question. Of a bundle that
    only searches, features and embeddings are remembered.

    Raises:
        DataError: no image, or none that can be read.
        InputError: an `image_size` that the bundle does not have, or any with a bundle that only searches.
    """
    images = list(dict.fromkeys(path.resolve() for path in images))
    if not images:
        raise DataError("cache warm: expected at least one image, found none")
    manifest = bundle.manifest
    if manifest.model.style == "none" and image_size is not None:
        raise InputError(f"image_size: {bundle.path} searches at the size it was trained at; leave it out")
    settings = manifest.preprocess.at(manifest.side(image_size))
    new, broken = 0, dict[str, str]()
    with ExitStack() as opened:
        remember = _open(bundle, cache, device, opened)
        starts = range(0, len(images), manifest.limits.max_batch)
        with progress.bar("images", len(starts), items_per_step=manifest.limits.max_batch) as bar:
            for start in starts:
                readable = list[npt.NDArray[np.float32]]()
                for path in images[start : start + manifest.limits.max_batch]:
                    try:
                        readable.append(preprocess(path, settings))
                    except ImageError as error:
                        broken[str(path)] = str(error)
                if readable:
                    new += remember(np.stack(readable))
                bar.advance()
    if len(broken) == len(images):
        raise DataError(f"none of the {len(images)} images can be read; the first: {next(iter(broken.values()))}")
    return Warmed(len(images) - len(broken), new, broken)


def _open(
    bundle: Bundle, cache: DiskCache, device: Device, opened: ExitStack
) -> Callable[[npt.NDArray[np.float32]], int]:
    """What puts a batch [B, C, H, W] into the cache, and says how many of its images were new."""
    if bundle.manifest.model.style == "none":
        return opened.enter_context(Retrieval(bundle, device=device, cache=cache)).remember

    def engine(name: str) -> Engine:
        return opened.enter_context(device.open(bundle, name))

    encoder, caption_ids = open_encoder(bundle.manifest, engine, cache), _caption_ids(bundle)
    return lambda pixels_BCHW: encoder.remember(pixels_BCHW, caption_ids)


def _caption_ids(bundle: Bundle) -> list[int] | None:
    """What the Q-Former reads for a caption with the bundle's own prompt; None for nothing."""
    manifest = bundle.manifest
    if not manifest.model.question_conditioned:
        return None
    text = qformer_text(manifest.model.qformer_reads, None, manifest.prompts.caption)
    if text is None:
        return None
    return cut(TextTokenizer(bundle.file(QFORMER_TOKENIZER)).encode(text), manifest.limits.max_question_tokens)
