"""How large everything is on disk, and what exactly was measured (hashes)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.dataset import Row
from runtime.files import sha256_of
from trainer.blip2 import Blip2
from trainer.checkpoint import WEIGHTS, read_config
from trainer.towers import source_folder


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Digest, precision and bytes: of all files, and of each graph with its weights."""
    manifest = bundle.manifest
    graphs = {name: graph.bytes + (graph.data.bytes if graph.data else 0) for name, graph in manifest.graphs.items()}
    return {
        "digest": manifest.digest,
        "precision": manifest.precision,
        "language_precision": manifest.language_precision,
        "bytes": sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file()),
        "graph_bytes": graphs,
    }


def checkpoint_facts(path: Path, model: Blip2) -> dict[str, Any]:
    """Hashes, bytes and parameters of the trained bridge and of both frozen halves.

    A half that is a hub id has no folder of its own to weigh: its bytes are None, and so is the sum.
    """
    config = read_config(path)
    part_bytes: dict[str, int | None] = {"bridge": (path / WEIGHTS).stat().st_size}
    for half, source in (("vision", config.model.vision), ("language", config.model.language)):
        if source is None:  # a model for retrieval alone
            continue
        folder = Path(source_folder(source, half))
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")] if folder.is_dir() else []
        part_bytes[half] = sum(file.stat().st_size for file in files) if files else None
    known = [size for size in part_bytes.values() if size is not None]
    parts = {"bridge": model.bridge, "vision": model.vision, "language": model.language_model}
    return {
        "sha256": {"bridge": sha256_of(path / WEIGHTS), **config.frozen},
        "precision": "fp32",
        "bytes": sum(known) if len(known) == len(part_bytes) else None,
        "part_bytes": part_bytes,
        "parameters": {name: sum(weights.numel() for weights in part.parameters()) for name, part in parts.items()},
    }


def rows_digest(rows: Sequence[Row], hashes: Mapping[Path, str]) -> str:
    """SHA-256 over what was asked: image contents, questions and references, in order."""
    asked = [[hashes[row.image], row.question, row.captions, row.answers] for row in rows]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()
