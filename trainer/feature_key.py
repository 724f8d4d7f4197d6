"""What makes features the same features: the frozen tower with its pixels, and the image."""

import hashlib
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from runtime.errors import ImageError, InputError
from runtime.packed import piece_of
from trainer.feature_shards import DIGEST_BYTES
from trainer.towers import VisionTower

UNTOLD = ("transformers_version", "architectures", "dtype", "torch_dtype")
"""Keys of a tower's configuration that do not change what it computes, beside those with a leading underscore."""


def tower_facts(vision: VisionTower) -> dict[str, Any]:
    """Everything beside the image that decides features, JSON-able.

    The weights count by content (position tables that were interpolated included), so a folder may move and a hub id
    is as good as a folder; that reads them once: about a second per GB.

    Raises:
        InputError: the tower is trained, so its features change with every step; or it is sharded, so that it computes
            on all processes at once, of which each has other images absent.
    """
    if any(isinstance(part, FSDPModule) for part in vision.modules()):
        raise InputError(
            "data.features.folder: an image encoder that is shared out among processes cannot compute what one of them "
            "finds absent; take vision out of the stage's shard, or set data.features.folder to null"
        )
    if any(parameter.requires_grad for parameter in vision.parameters()):
        raise InputError(
            "data.features.folder: features of an image encoder that is trained change with every step and cannot be "
            "kept; keep the encoder frozen, or set data.features.folder to null"
        )
    config = {
        name: value
        for name, value in vision.model.config.to_dict().items()
        if name not in UNTOLD and not name.startswith("_")
    }
    return {
        "model": type(vision.model).__name__,
        "config": config,
        "weights_sha256": weights_sha256(vision),
        "layer": vision.layer,
        "preprocess": vision.preprocess.model_dump(mode="json"),
    }


def weights_sha256(vision: VisionTower) -> str:
    """Hex SHA-256 over name, type, shape and bytes of every weight and buffer, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(chain(vision.named_parameters(), vision.named_buffers()), key=itemgetter(0)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def encoded(path: Path) -> bytes:
    """The bytes of an image file, or of an image packed in one, read once so that hashing and decoding see the same.

    Raises:
        ImageError: they cannot be read.
    """
    piece = piece_of(path)
    try:
        return path.read_bytes() if piece is None else piece.read()
    except (OSError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError(f"{path}: expected an image file, found: {reason}") from error


def image_digest(content: bytes) -> bytes:
    """First half of the SHA-256 of an encoded image."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]
