"""What transformers' layouts cannot hold, beside them: `qforge.json`, `qforge.safetensors` and the folder `qforge/`.

`qforge to-hf` writes them, `qforge import` reads them back, so that there and back loses nothing. transformers does
not look at them.

    qforge.json           what the checkpoint said: stage, model, metrics, recipe, configs of its halves
    qforge.safetensors    bridge/KEY: parts without a place (temperature, heads …);  vision/KEY: as the tower had them
    qforge/               the tokenizers as they were;  language/, of a model whose layout has no language model
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from runtime.errors import CheckpointError, InputError
from runtime.preprocess import PreprocessSettings
from runtime.settings import Settings
from trainer.bridge import Part
from trainer.config import ModelConfig, StageName
from trainer.convert.hf import read_hf, read_hf_config
from trainer.convert.model import Half, Imported, half_of, require_bridge
from trainer.convert.options import ImportOptions
from trainer.convert.stream import read_safetensors

SIDE = "qforge.json"
SIDE_WEIGHTS = "qforge.safetensors"
SIDE_FOLDER = "qforge"
BRIDGE, VISION = "bridge/", "vision/"


class Side(Settings):
    """Contents of qforge.json."""

    format: Literal[1]
    architecture: str
    """The layout of the folder it lies in."""
    stage: StageName
    question_conditioned: bool
    parts: tuple[Part, ...]
    model: ModelConfig
    """With sources inside the checkpoint."""
    preprocess: PreprocessSettings
    metrics: dict[str, Any]
    recipe_yaml: str
    vision_files: dict[str, str]
    language_files: dict[str, str]
    """Small files of the halves, by name."""
    rows: dict[str, int]
    """Key of the language model → its rows before `<image>` got one."""


def read_side(folder: Path, options: ImportOptions) -> Imported:
    """The checkpoint that `qforge to-hf` wrote into `folder`, as it was.

    Raises:
        InputError: options other than `--text-from`; the folder knows the rest.
        CheckpointError: the side files are damaged, or are of another model than the folder.
    """
    if replace(options, text_from=None) != ImportOptions():
        raise InputError(f"{folder} was written by `qforge to-hf` and knows its own settings; only --text-from fits")
    path = folder / SIDE
    try:
        side = Side.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}: expected what `qforge to-hf` wrote, found another file ({error})") from error
    _, architecture = read_hf_config(folder)
    if architecture != side.architecture:
        raise CheckpointError(f"{path}: expected it beside a {side.architecture}, found {architecture}")
    base = read_hf(folder, ImportOptions())
    extra = read_safetensors(folder / SIDE_WEIGHTS)
    own = {prefix: _below(extra, prefix) for prefix in (BRIDGE, VISION)}
    language = base.language
    if language is not None:
        kept = {
            key: piece.first_rows(side.rows.get(key, piece.shape[0])) if piece.shape else piece
            for key, piece in language.pieces.items()
        }
        language = Half(kept, side.language_files)
    elif side.model.language is not None:
        language = half_of(folder / SIDE_FOLDER / "language", "language")
    imported = replace(
        base,
        stage=side.stage,
        question_conditioned=side.question_conditioned,
        model=side.model,
        parts=side.parts,
        bridge={**base.bridge, **own[BRIDGE]},
        vision=Half({**base.vision.pieces, **own[VISION]}, side.vision_files),
        language=language,
        tokenizer=_copied(folder, "tokenizer"),
        text_tokenizer=_copied(folder, "text_tokenizer"),
        preprocess=side.preprocess,
        metrics=side.metrics,
        recipe_yaml=side.recipe_yaml,
    )
    norm = base.bridge["vision_model.post_layernorm.weight"]
    projection = imported.bridge.get("language_projection.weight")
    require_bridge(imported, str(folder), norm.shape[0], None if projection is None else projection.shape[0])
    return imported


def _below(pieces: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): piece for key, piece in pieces.items() if key.startswith(prefix)}


def _copied(folder: Path, name: str) -> Callable[[Path], Any] | None:
    kept = folder / SIDE_FOLDER / name
    return partial(shutil.copytree, kept, dirs_exist_ok=True) if kept.is_dir() else None
