"""What the command line calls images: files, folders of them, and manifests."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from runtime.dataset import read_manifest
from runtime.errors import DataError, MissingFile

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""What is taken from a folder; a file that is named is always tried."""
MANIFEST_SUFFIX = ".jsonl"


def images_of(sources: Sequence[Path]) -> Iterable[Path]:
    """Files that are named, images below folders (sorted), images of manifests."""
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise DataError(f"{source}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}) in it, found none")
            yield from inside
        elif not source.exists():
            raise MissingFile(f"{source}: expected an image, a folder or a manifest, found nothing under that name")
        elif source.suffix == MANIFEST_SUFFIX:
            yield from (row.image for row in read_manifest(source))
        else:
            yield source
