"""Checkpoints: the trained part in safetensors, the frozen halves by reference and hash.

A trained vision tower is an ordinary Hugging Face folder inside, so whoever reads a tower reads it like any other.

    CKPT/config.json         format, model, stage, whether the question conditions the Q-Former, halves and hashes
    CKPT/model.safetensors   the bridge, transformers' Blip2 key names plus `temperature` and `itg_head`
    CKPT/tokenizer/          of the language model;  CKPT/text_tokenizer/  of the Q-Former
    CKPT/preprocessor.json   how images become pixels
    CKPT/recipe.yaml         the resolved recipe;  CKPT/metrics.json  held-out metrics of the stage
    CKPT/vision/, language/  the halves themselves, in a self-contained checkpoint (its config says "./vision"); the
                         vision tower also in every checkpoint whose stage trained it

Loading is strict: every key, every shape, every hash. No pickle is read.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runtime.errors import CheckpointError, MissingFile
from runtime.files import sha256_of
from runtime.settings import Settings, first_problem
from trainer.blip2 import Blip2, new_blip2
from trainer.bridge import PARTS, Part, part_of
from trainer.config import ModelConfig
from trainer.towers import PREPROCESSOR, source_folder

FORMAT = 1
RENAMED = {"post_layernorm.": "vision_model.post_layernorm."}
"""Our name → transformers' name, where they differ."""
WEIGHTS = "model.safetensors"
INSIDE = "./"
"""How a source begins that is a folder of the checkpoint itself."""
SOURCES = ("vision", "language", "text_tokenizer")
"""Settings of the model section that name a folder."""


class CheckpointConfig(Settings):
    """Contents of config.json."""

    format: Literal[1]
    stage: str
    question_conditioned: bool
    model: ModelConfig
    frozen: dict[str, str]
    """SHA-256 of every weight file of the frozen halves, by "half/file"."""
    trained: dict[str, str] = Field(default_factory=dict)
    """The same of a half that this stage trained and that lies in the checkpoint."""
    parts: tuple[Part, ...] = PARTS
    """What the bridge has beyond its core; a published checkpoint may lack some."""


def resolved(config: ModelConfig, folder: Path) -> ModelConfig:
    """Sources inside the checkpoint `folder` as absolute paths, so that the model can be used from anywhere."""
    found = {name: getattr(config, name) for name in SOURCES}
    inside = {name: source for name, source in found.items() if source is not None and source.startswith(INSIDE)}
    return config.model_copy(update={name: str((folder / source).resolve()) for name, source in inside.items()})


def half_hashes(config: ModelConfig) -> dict[str, str]:
    """SHA-256 of the weight files of both halves. A hub id is loaded through its cache and recorded without hash."""
    hashes = {}
    for half, source in (("vision", config.vision), ("language", config.language)):
        if source is None:
            continue
        folder = Path(source_folder(source, half))
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []:
            hashes[f"{half}/{path.name}"] = sha256_of(path)
    return hashes


def _write_tower(model: Blip2, folder: Path) -> None:
    """A trained vision tower, with how it wants its pixels; weights that no gradient reached are those it came with."""
    model.vision.model.save_pretrained(folder)
    stated = Path(source_folder(model.config.vision, "vision")) / PREPROCESSOR
    (folder / PREPROCESSOR).write_text(stated.read_text(encoding="utf-8"), encoding="utf-8")


def bridge_tensors(model: Blip2) -> dict[str, Tensor]:
    """The trained part under transformers' key names, on the CPU."""
    return {their_name(key): tensor.detach().cpu().contiguous() for key, tensor in model.bridge.state_dict().items()}


def their_name(key: str) -> str:
    """The key of a checkpoint for a key of the bridge."""
    for ours, theirs in RENAMED.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def write_checkpoint(model: Blip2, folder: Path, *, stage: str, metrics: dict[str, Any], recipe_yaml: str) -> None:
    """Fill an empty folder (of `runtime.files.atomic_folder`) with the checkpoint."""
    settings = model.config
    if model.vision.trained:
        settings = settings.model_copy(update={"vision": f"{INSIDE}vision"})
        _write_tower(model, folder / "vision")
    hashes = half_hashes(resolved(settings, folder))
    trained = {name: digest for name, digest in hashes.items() if model.vision.trained and name.startswith("vision/")}
    config = CheckpointConfig(
        format=FORMAT,
        stage=stage,
        question_conditioned=model.question_conditioned,
        model=settings,
        frozen={name: digest for name, digest in hashes.items() if name not in trained},
        trained=trained,
        parts=tuple(part for part in PARTS if part in model.bridge.parts),
    )
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
    save_file(bridge_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    for name, tokenizer in (("tokenizer", model.tokenizer), ("text_tokenizer", model.text_tokenizer)):
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / name)
    (folder / "preprocessor.json").write_text(model.preprocess.model_dump_json(indent=2) + "\n")
    (folder / "recipe.yaml").write_text(recipe_yaml)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def read_config(folder: Path) -> CheckpointConfig:
    """config.json, checked; sources inside the checkpoint are absolute paths in it.

    Raises:
        MissingFile: no such folder or file. CheckpointError: not a checkpoint of a format this version reads.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFile(f"{folder} is no checkpoint: expected config.json in it. `qforge train` writes checkpoints")
    try:
        tree = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found a damaged file ({error})") from error
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(
            f"{path}: expected checkpoint format {FORMAT}, found {found!r}; upgrade qforge or train again"
        )
    try:
        config = CheckpointConfig.model_validate(tree)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error
    return config.model_copy(update={"model": resolved(config.model, folder)})


def with_trained_halves(model: ModelConfig, folder: Path) -> ModelConfig:
    """The model section with the halves that lie in the checkpoint `folder` because it trained them."""
    began = read_config(folder)
    trained = {name.partition("/")[0] for name in began.trained}
    return model.model_copy(update={name: getattr(began.model, name) for name in trained})


def load_checkpoint(folder: Path | str, mapped_beside: Path | None = None) -> Blip2:
    """The model of a checkpoint, in eval mode; see the module's text for what is checked.

    `mapped_beside`: as in `new_blip2`.
    """
    folder = Path(folder)
    config = read_config(folder)
    require_halves(folder, config, config.model)
    model = new_blip2(config.model, config.question_conditioned, config.parts, mapped_beside)
    load_bridge(model, folder)
    return model.eval()


def require_halves(folder: Path, config: CheckpointConfig, model: ModelConfig) -> None:
    """CheckpointError unless the halves that `model` names are those the checkpoint was trained with.

    A half that either side does not have is not compared.
    """
    found = half_hashes(model)
    for name, expected in {**config.frozen, **config.trained}.items():
        if getattr(model, name.partition("/")[0]) is not None and found.get(name) != expected:
            kind = "trained" if name in config.trained else "frozen"
            raise CheckpointError(
                f"{folder}: its {kind} {name} had SHA-256 {expected[:12]}…, found {str(found.get(name))[:12]}…; "
                f"the bridge fits only the halves it was trained with"
            )


def load_bridge(model: Blip2, folder: Path, fresh: Collection[Part] = ()) -> None:
    """Copy a checkpoint's trained part into `model`, strictly; `fresh` parts are not there and stay as made."""
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing; the checkpoint is incomplete, train again") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy it again from its source") from error
    own = {their_name(key): tensor for key, tensor in model.bridge.state_dict().items()}
    own = {key: tensor for key, tensor in own.items() if part_of(key) not in fresh}
    if missing := sorted(own.keys() - tensors.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise CheckpointError(f"{path} has {len(unknown)} tensors this model does not know, the first is {unknown[0]}")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise CheckpointError(f"{path}: {key} expected shape {list(own[key].shape)}, found {list(tensor.shape)}")
        own[key].copy_(tensor)
