"""One vision tower for several image sizes: its positions interpolated to whatever grid of patches it is given.

Every tower has this rule for itself, as code that decides on sizes while it runs; a traced graph cannot hold that. This
is the same rule (bicubic, as BLIP-2 was evaluated at 364 and 490 pixels) without decisions.

Shape letters: B images, C H W pixels, N image tokens, G patches along a side, K leading tokens (class), E image width
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import InputError
from trainer.towers import VisionTower

FLAG = "interpolate_pos_encoding"
AGREES = 1e-5
"""Largest difference from the tower's own rule, in units of its positions: both interpolate in fp32."""


@torch.no_grad()
def read_any_size(tower: VisionTower, sides: Sequence[int]) -> None:
    """Let the tower read images of these sides (pixels) beside its own, in place.

    Raises:
        InputError: the tower cannot interpolate its positions, by another rule than this, or a side is no multiple of
            its patch size.
    """
    model = tower.model
    embeddings: Any = next((part for part in model.modules() if hasattr(part, FLAG)), None)
    patch, kind = model.config.patch_size, type(model).__name__
    if embeddings is None or not isinstance(patch, int):
        raise InputError(f"export.image_sizes: {kind} cannot interpolate its positions; leave export.image_sizes empty")
    for side in sides:
        if side % patch or side == tower.preprocess.height:
            raise InputError(
                f"export.image_sizes: expected sizes other than the trained {tower.preprocess.height}, multiples "
                f"of the patch size {patch} of {kind}, found {side}"
            )
    vars(embeddings).pop(FLAG, None)  # a table for one size that was put in its place
    own_rule = getattr(embeddings, FLAG)
    native_side = int(model.config.image_size)
    native_1NE = _positions(embeddings, native_side)
    leading = native_1NE.shape[1] - (native_side // patch) ** 2
    rule = _rule(native_1NE.clone(), leading, patch)
    setattr(embeddings, FLAG, rule)
    for side in {*sides, tower.preprocess.height}:
        found_1NE = _positions(embeddings, side)
        setattr(embeddings, FLAG, own_rule)
        expected_1NE = _positions(embeddings, side)
        setattr(embeddings, FLAG, rule)
        if float((found_1NE - expected_1NE).abs().max()) > AGREES * float(expected_1NE.abs().max()):
            raise InputError(
                f"export.image_sizes: {kind} interpolates its positions to {side} pixels by another rule than bicubic; "
                f"leave export.image_sizes empty"
            )
    tower.other_sides = tuple(sides)
    tower.always_interpolate()


def _rule(native_1NE: Tensor, leading: int, patch: int) -> Any:
    """(patches [B, N, E], H, W) → positions [1, N, E]."""
    grid = math.isqrt(native_1NE.shape[1] - leading)
    width = native_1NE.shape[2]
    table_1EGG = native_1NE[:, leading:].reshape(1, grid, grid, width).permute(0, 3, 1, 2)

    def interpolated(patches_BNE: Tensor, height: Any, width_px: Any) -> Tensor:
        size = (height // patch, width_px // patch)
        resized_1EGG = F.interpolate(table_1EGG, size=size, mode="bicubic", align_corners=False)
        return torch.cat([native_1NE[:, :leading], resized_1EGG.flatten(2).transpose(1, 2)], dim=1)

    return interpolated


def _positions(embeddings: Any, side: int) -> Tensor:
    """What the rule in place now gives for a square image: [1, N, E]."""
    tables: list[Tensor] = []
    rule = getattr(embeddings, FLAG)

    def watched(*arguments: Any) -> Tensor:
        tables.append(rule(*arguments))
        return tables[-1]

    setattr(embeddings, FLAG, watched)
    options = {FLAG: True} if FLAG in inspect.signature(embeddings.forward).parameters else {}
    try:
        embeddings(torch.zeros(1, 3, side, side), **options)
    finally:
        setattr(embeddings, FLAG, rule)
    return tables[-1]
