"""An index: the features of many images (or texts) on disk, made once by a bundle and searched by that bundle alone.

    INDEX/index.json          kind, bundle and its digest, shapes, hashes, images that could not be read
    INDEX/items.jsonl         one image path (relative to INDEX) or one text a line, in the order of the features
    INDEX/features.bin        ITC features, [n, Q, F] of images or [n, F] of texts, memory-mapped
    INDEX/image_embeds.bin    ITM embeddings [n, N, E] of images, memory-mapped; absent when made without them

The embeddings are kept unless told otherwise: re-ranking looks at 128 images, and to pass 128 images through a vision
tower again costs a large one minutes on a CPU, while a read costs milliseconds. They are the bulk of the index (ViT-g:
0.7 MB an image in half precision, features 16 kB); without them the images are read again for each search.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import PositiveInt, ValidationError

from runtime.bundle import Bundle
from runtime.errors import DataError, ImageError, InputError, MissingFile
from runtime.files import atomic_folder, sha256_of, write_json_atomic
from runtime.preprocess import ImageSource, load_image
from runtime.progress import Progress
from runtime.retrieval import Floats, Retrieval, Retriever
from runtime.search import Hit, ImageOf, search_images, search_texts
from runtime.settings import Settings

FORMAT = 1
INDEX = "index.json"
ITEMS, FEATURES, EMBEDS = "items.jsonl", "features.bin", "image_embeds.bin"

Kind = Literal["images", "texts"]
Dtype = Literal["float16", "float32"]


class IndexFacts(Settings):
    """Contents of index.json."""

    format: Literal[1]
    kind: Kind
    bundle: str
    """Folder of the bundle, relative to the index."""
    bundle_digest: str
    """Of its manifest; features of one bundle mean nothing to another."""
    count: PositiveInt
    """Images or texts."""
    dtype: Dtype
    """Of both feature files."""
    features: tuple[PositiveInt, ...]
    """Shape of one row of features.bin."""
    image_embeds: tuple[PositiveInt, ...] | None
    """Shape of one row of image_embeds.bin; null without that file."""
    sha256: dict[str, str]
    """File → hex digest; image_embeds.bin is too large to be read through at every start, its size is checked."""
    broken: dict[str, str]
    """Images that could not be read and are not in the index → why."""


class RowWriter:
    """Appends rows of one shape to a raw file."""

    def __init__(self, path: Path, dtype: Dtype) -> None:
        self._path, self._dtype, self._digest = path, np.dtype(dtype), hashlib.sha256()
        self.rows = 0
        self.shape: tuple[int, ...] = ()

    def append(self, rows: Floats) -> None:
        """Add rows; InputError when a value does not fit the type."""
        with np.errstate(over="ignore"):  # told below, as an error
            stored = rows.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise InputError(
                f"index: a feature is not a number or too large for {self._dtype}; try --dtype float32, and check the "
                f"bundle: qforge verify"
            )
        data = np.ascontiguousarray(stored).tobytes()
        with self._path.open("ab") as file:
            file.write(data)
        self._digest.update(data)
        self.rows, self.shape = self.rows + len(rows), rows.shape[1:]

    def sha256(self) -> str:
        """Of all rows so far."""
        return self._digest.hexdigest()


def mapped(file: Path, dtype: Dtype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A raw file as a read-only array that stays on disk; DataError when its size is not that of the shape."""
    expected = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.is_file() else 0
    if found != expected:
        raise DataError(f"{file}: expected {expected:,} bytes, found {found:,}; index again")
    return np.memmap(file, dtype, "r", shape=shape)


@dataclass(frozen=True)
class Embedded:
    """What `embed_to` wrote."""

    images: list[Path]
    """Those in the files, in order."""
    broken: dict[str, str]
    """Those that cannot be read → why."""
    features: RowWriter
    embeds: RowWriter | None


def embed_to(
    folder: Path, retriever: Retriever, images: Sequence[Path], dtype: Dtype, *, keep_embeds: bool, progress: Progress
) -> Embedded:
    """Stream images batch by batch into features.bin and, if kept, image_embeds.bin; unreadable ones are noted.

    Raises:
        DataError: none of the images can be read.
    """
    features = RowWriter(folder / FEATURES, dtype)
    embeds = RowWriter(folder / EMBEDS, dtype) if keep_embeds else None
    known, broken = list[Path](), dict[str, str]()
    starts = range(0, len(images), retriever.max_batch)
    with progress.bar("images", len(starts), items_per_step=retriever.max_batch) as bar:
        for start in starts:
            readable = list[Image.Image]()
            for path in images[start : start + retriever.max_batch]:
                try:
                    readable.append(load_image(path))
                    known.append(path)
                except ImageError as error:
                    broken[str(path)] = str(error)
            if readable:
                found = retriever.embed_images(readable)
                features.append(found.features_BQF)
                if embeds is not None:
                    embeds.append(found.image_embeds_BNE)
            bar.advance()
    if not known:
        raise DataError(f"none of the {len(images)} images can be read; the first: {next(iter(broken.values()))}")
    return Embedded(known, broken, features, embeds)


def write_image_index(
    retrieval: Retrieval, images: Sequence[Path], out: Path, *, dtype: Dtype, keep_embeds: bool, progress: Progress
) -> IndexFacts:
    """Index images at `out` (replaced when it is an index); those that cannot be read are listed in `broken`.

    Raises:
        DataError: no image, or none that can be read. InputError, OutOfSpace: as `atomic_folder`.
    """
    images = list(dict.fromkeys(path.resolve() for path in images))
    if not images:
        raise DataError("index: expected at least one image, found none")
    with atomic_folder(out, replaces=INDEX) as folder:
        made = embed_to(folder, retrieval, images, dtype, keep_embeds=keep_embeds, progress=progress)
        items = [{"image": os.path.relpath(path, out.resolve())} for path in made.images]
        return _finish(folder, out, retrieval.bundle, "images", dtype, items, made.features, made.embeds, made.broken)


def write_text_index(
    retrieval: Retrieval, texts: Sequence[str], out: Path, *, dtype: Dtype, progress: Progress
) -> IndexFacts:
    """Index texts at `out` (replaced when it is an index); equal ones once.

    Raises:
        DataError: no text. InputError: one without words. OutOfSpace: as `atomic_folder`.
    """
    texts = list(dict.fromkeys(text.strip() for text in texts))
    if not texts:
        raise DataError("index: expected at least one text, found none")
    with atomic_folder(out, replaces=INDEX) as folder:
        features = RowWriter(folder / FEATURES, dtype)
        starts = range(0, len(texts), retrieval.max_batch)
        with progress.bar("texts", len(starts), items_per_step=retrieval.max_batch) as bar:
            for start in starts:
                features.append(retrieval.embed_texts(texts[start : start + retrieval.max_batch]))
                bar.advance()
        items = [{"text": text} for text in texts]
        return _finish(folder, out, retrieval.bundle, "texts", dtype, items, features, None, {})


def _finish(
    folder: Path,
    out: Path,
    bundle: Bundle,
    kind: Kind,
    dtype: Dtype,
    items: Sequence[dict[str, str]],
    features: RowWriter,
    embeds: RowWriter | None,
    broken: dict[str, str],
) -> IndexFacts:
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / ITEMS).write_text(lines, encoding="utf-8")
    facts = IndexFacts(
        format=FORMAT,
        kind=kind,
        bundle=os.path.relpath(bundle.path.resolve(), out.resolve()),
        bundle_digest=bundle.manifest.digest,
        count=len(items),
        dtype=dtype,
        features=features.shape,
        image_embeds=None if embeds is None else embeds.shape,
        sha256={FEATURES: features.sha256(), ITEMS: sha256_of(folder / ITEMS)},
        broken=broken,
    )
    write_json_atomic(folder / INDEX, facts.model_dump(mode="json"))
    return facts


class Index:
    """An index that was read and checked; its features stay on disk."""

    def __init__(self, path: Path) -> None:
        """Open the folder.

        Raises:
            MissingFile: no index there.
            DataError: damaged, cut short, or of another format.
        """
        self.path = path
        self.facts = facts = read_facts(path)
        for name, expected in facts.sha256.items():
            if (found := sha256_of(path / name)) != expected:
                raise DataError(f"{path / name}: expected SHA-256 {expected}, found {found}; index again")
        keys = {"images": "image", "texts": "text"}
        lines = (path / ITEMS).read_text(encoding="utf-8").splitlines()
        self.items: list[str] = [json.loads(line)[keys[facts.kind]] for line in lines]
        """Image paths, or texts, in the order of the rows."""
        if facts.kind == "images":
            self.items = [os.path.normpath(path / item) for item in self.items]
        self.features = mapped(path / FEATURES, facts.dtype, (facts.count, *facts.features))
        embeds = facts.image_embeds
        self._embeds = None if embeds is None else mapped(path / EMBEDS, facts.dtype, (facts.count, *embeds))

    def bundle_path(self) -> Path:
        """Folder of the bundle that made it."""
        return Path(os.path.normpath(self.path / self.facts.bundle))

    def find_images(
        self, retrieval: Retrieval, texts: Sequence[str], *, top: int, candidates: int
    ) -> list[list[tuple[str, Hit]]]:
        """For every text the best `top` (image path, hit), best first; see `runtime.search`.

        Raises:
            InputError: another bundle's index, an index of texts, or counts and texts that cannot be used.
            ImageError: an image must be read again (no embeddings were kept) and cannot be.
        """
        self._require(retrieval, "images", "search it with --image")
        image_of = self._image_of(retrieval)
        found = search_images(retrieval, self.features, image_of, texts, top=top, candidates=candidates)
        return [[(self.items[hit.row], hit) for hit in hits] for hits in found]

    def find_texts(
        self, retrieval: Retrieval, images: Sequence[ImageSource], *, top: int, candidates: int
    ) -> list[list[tuple[str, Hit]]]:
        """For every image the best `top` (text, hit), best first; raises as `find_images`."""
        self._require(retrieval, "texts", "search it with a text")
        query = retrieval.embed_images(images)
        found = search_texts(
            retrieval,
            self.features,
            self.items,
            query.features_BQF,
            lambda image: query.image_embeds_BNE[image],
            top=top,
            candidates=candidates,
        )
        return [[(self.items[hit.row], hit) for hit in hits] for hits in found]

    def _require(self, retrieval: Retrieval, kind: Kind, instead: str) -> None:
        if self.facts.kind != kind:
            raise InputError(f"{self.path}: expected an index of {kind}, found one of {self.facts.kind}; {instead}")
        digest = retrieval.bundle.manifest.digest
        if digest != self.facts.bundle_digest:
            raise InputError(
                f"{self.path}: expected the bundle that made it, digest {self.facts.bundle_digest[:12]}…, found "
                f"{retrieval.bundle.path}, digest {digest[:12]}…; index again with this bundle: qforge index"
            )

    def _image_of(self, retrieval: Retrieval) -> ImageOf:
        embeds = self._embeds
        if embeds is None:
            return lambda row: retrieval.embed_images([self.items[row]]).image_embeds_BNE[0]
        return lambda row: np.asarray(embeds[row], np.float32)


def read_facts(path: Path) -> IndexFacts:
    """index.json, checked; raises as `Index`."""
    file = path / INDEX
    if not file.is_file():
        raise MissingFile(f"{path}: expected an index with {INDEX}, found none; make one: qforge index BUNDLE IMAGES")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.get("format") != FORMAT:
            raise DataError(f"{file}: expected format {FORMAT}, found {tree.get('format')!r}; index again")
        return IndexFacts.model_validate(tree)
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        raise DataError(f"{file}: expected the description of an index, found other data; index again") from error
