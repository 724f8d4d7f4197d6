"""What every import ends in: the pieces of a model, and the checkpoint written from them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from runtime.errors import CheckpointError, InputError
from runtime.files import atomic_folder
from runtime.preprocess import PreprocessSettings
from trainer.bridge import PARTS, Bridge, Part
from trainer.checkpoint import FORMAT, INSIDE, WEIGHTS, CheckpointConfig, half_hashes, resolved, their_name
from trainer.config import ModelConfig, StageName
from trainer.convert.check import expected_tensors, require_match
from trainer.convert.stream import Piece, Pieces, read_weights, write_safetensors, write_weights

METRICS = "metrics.json"
"""The file that only a folder of ours has: an import may replace what holds it."""
IMAGE_TOKEN = "<image>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
HALF_FILES = ("config.json", "generation_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Half:
    """A frozen half as it will lie in the checkpoint: an ordinary Hugging Face folder."""

    pieces: Pieces
    files: dict[str, str]
    """Name → text of its small files."""

    def write(self, folder: Path) -> None:
        """Into a new folder."""
        folder.mkdir()
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        write_weights(folder, self.pieces)


@dataclass(frozen=True)
class Imported:
    """A model read from somewhere, nothing of it in memory yet."""

    stage: StageName
    """How far along our stages it is; training goes on from there."""
    question_conditioned: bool
    model: ModelConfig
    parts: tuple[Part, ...]
    bridge: Pieces
    """By the key names of a checkpoint."""
    vision: Half
    language: Half | None
    tokenizer: Callable[[Path], Any] | None
    """Writes the language model's tokenizer into a folder."""
    text_tokenizer: Callable[[Path], Any] | None
    """Writes the Q-Former's tokenizer into a folder."""
    preprocess: PreprocessSettings
    metrics: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """What a user should know about this import."""
    recipe_yaml: str | None = None
    """Of the checkpoint that this model once was, if it was one."""


def self_contained(has_language: bool, has_text: bool) -> dict[str, str | None]:
    """The sources of a model whose folders lie in the checkpoint."""
    return {
        "vision": f"{INSIDE}vision",
        "language": f"{INSIDE}language" if has_language else None,
        "text_tokenizer": f"{INSIDE}text_tokenizer" if has_text else None,
    }


def first_metrics(stage: StageName, **imported: Any) -> dict[str, Any]:
    """metrics.json of a model that was not trained here: nothing measured, but where it comes from."""
    return {"stage": stage, "held_out": [], "broken_images": {}, "imported": imported}


def require_bridge(imported: Imported, source: str, vision_width: int, language_width: int | None) -> None:
    """CheckpointError unless the bridge's tensors are exactly those that its config asks for."""
    model = imported.model

    def build() -> Bridge:
        return Bridge(
            model.qformer,
            image_width=vision_width,
            language_width=language_width,
            vocabulary=model.qformer.vocabulary or 0,
            parts=imported.parts,
        )

    expected = {their_name(key): tensor for key, tensor in expected_tensors(build).items()}
    require_match(imported.bridge, expected, source)


def write_imported(imported: Imported, out: Path, recipe_yaml: Callable[[ModelConfig], str]) -> Path:
    """The self-contained checkpoint `out`, whole or not at all; an older checkpoint of that name is replaced."""
    with atomic_folder(out, replaces=METRICS) as folder:
        imported.vision.write(folder / "vision")
        if imported.language is not None:
            imported.language.write(folder / "language")
        if imported.tokenizer is not None:
            imported.tokenizer(folder / "tokenizer")
            imported.tokenizer(folder / "language")  # where a Hugging Face folder keeps it, and `model.language` points
        if imported.text_tokenizer is not None:
            imported.text_tokenizer(folder / "text_tokenizer")
        ordered = {key: imported.bridge[key].as_type(torch.float32) for key in sorted(imported.bridge)}
        write_safetensors(folder / WEIGHTS, ordered)
        config = CheckpointConfig(
            format=FORMAT,
            stage=imported.stage,
            question_conditioned=imported.question_conditioned,
            model=imported.model,
            frozen=half_hashes(resolved(imported.model, folder)),
            parts=tuple(part for part in PARTS if part in imported.parts),
        )
        _write_json(folder / METRICS, imported.metrics)
        (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
        (folder / "preprocessor.json").write_text(imported.preprocess.model_dump_json(indent=2) + "\n")
        text = imported.recipe_yaml if imported.recipe_yaml is not None else recipe_yaml(imported.model)
        (folder / "recipe.yaml").write_text(text)
    return out


def half_of(folder: Path, what: str) -> Half:
    """A frozen half given as a folder, taken over as it is; keys are checked when transformers loads it."""
    if not folder.is_dir():
        raise InputError(f"--{what}: expected a Hugging Face folder, found nothing at {folder}")
    files = {name: (folder / name).read_text(encoding="utf-8") for name in HALF_FILES if (folder / name).is_file()}
    return Half(read_weights(folder), files)


def require_tokenizer(folder: Path, what: str) -> Path:
    """`folder`, when it holds a tokenizer; transformers would make an empty one up."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: expected the {what} ({', '.join(TOKENIZER_FILES)}), found none of these files")
    return folder


def fitted(tokenizer: PreTrainedTokenizerBase, rows: int, source: str) -> Callable[[Path], Any]:
    """How to save a tokenizer whose model embeds `rows` tokens.

    A processor adds `<image>` to every tokenizer, also where no row of the embedding belongs to it; such a token is
    left out, so that no text can ever ask for it.
    """
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond not in ([], [IMAGE_TOKEN]):
        raise CheckpointError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, the weights embed {rows} (without {beyond[0]!r}); "
            f"tokenizer and weights are of two models"
        )

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        if beyond:
            _drop_token(folder / "tokenizer.json", IMAGE_TOKEN)

    return save


def merged(base: Pieces, more: Mapping[str, Piece]) -> Pieces:
    """Both; a key that both have is our own mistake."""
    assert not base.keys() & more.keys()
    return {**base, **more}


def _drop_token(path: Path, token: str) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["added_tokens"] = [entry for entry in tree["added_tokens"] if entry["content"] != token]
    _write_json(path, tree)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
