"""The format of a path, told by its content."""

import json
from pathlib import Path
from typing import Any

from runtime.errors import DataError, MissingFile
from trainer.config import Format
from trainer.sources.json_files import read_json
from trainer.sources.tars import shards_of

HEAD_BYTES = 65_536
"""Of a file, to tell what it is: as long as the longest first line of a manifest that is known by it."""


def format_of(path: Path) -> Format:
    """Which reader fits.

    Raises:
        MissingFile: nothing is there.
        DataError: it is none of the known formats.
    """
    if "*" in path.name or "{" in path.name:
        shards_of(path)
        return "webdataset"
    if path.is_dir():
        return _format_of_folder(path)
    if path.suffix == ".jsonl":
        return "manifest"
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: expected a data set, found nothing under that name") from error
    if head[257:262] == b"ustar":
        return "webdataset"
    if head[:4] == b"PAR1" or path.suffix == ".arrow":
        return "huggingface"
    return _format_of_text(path, head)


def _format_of_folder(path: Path) -> Format:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return "huggingface"
    if any(path.glob("*.tar")):
        return "webdataset"
    if any(next(path.rglob(f"*.{suffix}"), None) for suffix in ("parquet", "arrow")):
        return "huggingface"
    raise DataError(
        f"{path}: expected a folder of tar shards or of a Hugging Face data set, found neither; name the file in it"
    )


def _format_of_text(path: Path, head: bytes) -> Format:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first_line, newline, _ = text.partition(b"\n")
    if text[:1] not in (b"{", b"["):
        token = b"#" in first_line.partition(b"\t")[0] and b"\t" in first_line
        return "flickr30k" if token or b"|" in first_line else "manifest"  # whose reader says which line is wrong
    if _is_manifest_line(first_line):
        return "manifest"
    if path.suffix == ".json" or not newline or first_line.strip() in (b"{", b"["):
        return _format_of_tree(read_json(path), path)
    return "manifest"


def _is_manifest_line(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and not {"images", "annotations", "questions"} & record.keys()


def _format_of_tree(tree: Any, path: Path) -> Format:
    if isinstance(tree, list):
        return "records"
    keys = tree.keys() if isinstance(tree, dict) else set()
    if {"images", "annotations"} <= keys:
        return "coco"
    images = tree.get("images") if isinstance(tree, dict) else None
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return "karpathy"
    if {"questions"} <= keys or {"annotations"} <= keys:
        return "vqav2"  # whose reader says which of the two files goes where
    raise DataError(
        f"{path}: expected a manifest (JSON Lines), COCO captions, a Karpathy split, VQAv2 questions or a list of "
        f"records, found JSON with {sorted(keys) or type(tree).__name__}"
    )
