"""Do the weights fit the config that came with them? Every key, every shape; what does not fit is listed and refused.

What is expected comes from the real model classes, built without memory (PyTorch's meta device).
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from runtime.errors import CheckpointError
from trainer.convert.stream import DTYPES, Pieces

SHOWN = 5
"""Keys that a message names; the rest is counted."""


def expected_tensors(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """The state dict of a model that is built without taking memory."""
    with torch.device("meta"):
        return build().state_dict()


def require_match(
    found: Pieces, expected: Mapping[str, Tensor], source: str, tied: Mapping[str, str] | None = None
) -> None:
    """CheckpointError unless keys and shapes agree.

    Args:
        found: What the file holds.
        expected: What the config asks for.
        source: File or folder, with the prefix of its keys, for messages.
        tied: Key → the key that holds the same weights; one of such a group is enough in a file.
    """
    root = {**{value: value for value in (tied or {}).values()}, **(tied or {})}
    held = {root[key] for key in found if key in root}
    missing = [key for key in expected if key not in found and root.get(key) not in held]
    unknown = [key for key in found if key not in expected]
    if missing or unknown:
        _require_same_depth(found, expected, source)
        raise CheckpointError(
            f"{source}: the weights do not fit the config: {_listed('missing', missing)}, {_listed('unknown', unknown)}"
        )
    wrong = [key for key in found if found[key].shape != tuple(expected[key].shape)]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{found[first].file}: {first} expected shape {list(expected[first].shape)} by config.json, found "
            f"{list(found[first].shape)} ({len(wrong)} tensors do not fit); config and weights are of two models"
        )
    for key, piece in found.items():
        if expected[key].is_floating_point() != DTYPES[piece.dtype].is_floating_point:
            raise CheckpointError(
                f"{piece.file}: {key} expected plain numbers like {expected[key].dtype}, found {piece.dtype}; "
                f"quantised weights cannot be imported, take the original ones"
            )


def _require_same_depth(found: Pieces, expected: Mapping[str, Tensor], source: str) -> None:
    """A wrong number of layers would list hundreds of keys; say the two numbers instead."""
    said, held = _depths(list(expected)), _depths(list(found))
    for stem in said:
        if stem in held and said[stem] != held[stem]:
            raise CheckpointError(
                f"{source}: config.json says {said[stem]} layers in {stem.rstrip('.')}, the weights hold {held[stem]}; "
                f"config and weights are of two models"
            )


def _depths(keys: Sequence[str]) -> dict[str, int]:
    """Stem of every numbered list of modules → its length."""
    depths: dict[str, int] = {}
    for key in keys:
        numbered = re.match(r"(.*?\.)(\d+)\.", key)
        if numbered is not None:
            depths[numbered[1]] = max(depths.get(numbered[1], 0), int(numbered[2]) + 1)
    return depths


def _listed(kind: str, keys: Sequence[str]) -> str:
    if not keys:
        return f"0 {kind}"
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {kind} ({', '.join(sorted(keys)[:SHOWN])}{more})"
