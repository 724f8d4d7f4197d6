"""`qforge to-hf`: a checkpoint becomes a folder that transformers loads, with processor and tokenizer.

The layouts are those of `hf.LAYOUTS`; what they have no place for goes into side files (side.py). Weights are
streamed: the halves keep the type they are stored in, the bridge stays fp32.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2Processor,
    Blip2VisionConfig,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipProcessor,
    InstructBlipVisionConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from runtime.errors import CheckpointError
from runtime.files import atomic_folder
from runtime.preprocess import PreprocessSettings
from trainer.bridge import Part, part_of
from trainer.checkpoint import WEIGHTS, CheckpointConfig, read_config
from trainer.convert.check import expected_tensors
from trainer.convert.hf import LANGUAGE, LAYOUTS, NORM, VISION, renamed
from trainer.convert.images import processor_json
from trainer.convert.model import HALF_FILES, IMAGE_TOKEN, self_contained
from trainer.convert.side import BRIDGE, SIDE, SIDE_FOLDER, SIDE_WEIGHTS, Side
from trainer.convert.side import VISION as SIDE_VISION
from trainer.convert.stream import (
    Piece,
    Pieces,
    piece_of,
    read_safetensors,
    read_weights,
    write_safetensors,
    write_weights,
)
from trainer.language import language_class
from trainer.towers import load_tokenizer, load_vision, source_folder

Kind = Literal["caption", "retrieval", "instruct"]
ARCHITECTURES: dict[Kind, str] = {
    "caption": "Blip2ForConditionalGeneration",
    "retrieval": "Blip2ForImageTextRetrieval",
    "instruct": "InstructBlipForConditionalGeneration",
}
POSITIONS = "embeddings.position_embedding"


def default_kind(config: CheckpointConfig) -> Kind:
    """The layout that says most about a checkpoint."""
    if config.model.language is None:
        return "retrieval"
    return "instruct" if config.question_conditioned else "caption"


@dataclass(frozen=True)
class Written:
    """What became of a checkpoint."""

    kind: Kind
    beside: list[str]
    """Tensors that went into the side file."""
    notes: list[str]


def write_hf(checkpoint: Path, out: Path, kind: Kind | None = None) -> Written:
    """Write the folder `out`, whole or not at all; an older one that this verb wrote is replaced.

    Raises:
        CheckpointError: the layout needs a part that the checkpoint lacks, or its halves have no place in it.
        InputError, MissingFile: as their names say.
    """
    config = read_config(checkpoint)
    kind = kind or default_kind(config)
    layout = LAYOUTS[ARCHITECTURES[kind]]
    _require_parts(checkpoint, config, kind, layout.parts)
    bridge = read_safetensors(checkpoint / WEIGHTS)
    vision_folder = Path(source_folder(config.model.vision, "vision"))
    vision_config = _vision_config(vision_folder, config)
    tower = read_weights(vision_folder)
    preprocess = PreprocessSettings.model_validate_json((checkpoint / "preprocessor.json").read_text())
    if config.model.image_size is not None:
        vision_config["image_size"] = config.model.image_size
    placed = {**tower, **_norm(bridge), **_resized_positions(config)}
    held = {key: piece for key, piece in bridge.items() if _has_place(key, layout.parts)}
    back = {ours: theirs for theirs, ours in layout.renamed.items()}
    weights = {f"{VISION}{key}": piece for key, piece in placed.items()}
    weights |= {renamed(key, back): piece for key, piece in held.items() if not key.startswith(NORM)}
    beside = {f"{BRIDGE}{key}": piece for key, piece in bridge.items() if key not in held}
    beside |= {f"{SIDE_VISION}{key}": piece for key, piece in tower.items() if placed[key] is not piece}
    with atomic_folder(out, replaces=SIDE) as folder:
        speaks = "language" in layout.parts
        language = _Language(config, checkpoint) if speaks else None
        processor, image_token = _processor(kind, checkpoint, config, preprocess)
        rows: dict[str, int] = {}
        if language is not None:
            pieces, rows = language.grown(image_token + 1)
            weights |= {f"{LANGUAGE}{key}": piece for key, piece in pieces.items()}
        whole = _config(kind, config, vision_config, language, image_token, bridge)
        processor.save_pretrained(folder)
        whole.save_pretrained(folder)
        if language is not None:
            GenerationConfig.from_model_config(whole.text_config).save_pretrained(folder)
        write_weights(folder, weights)
        write_safetensors(folder / SIDE_WEIGHTS, beside)
        _write_side(folder, checkpoint, config, kind, preprocess, rows)
    return Written(kind, sorted(beside), _notes(kind, config, vision_config))


class _Language:
    """The frozen language model of a checkpoint: config and pieces."""

    def __init__(self, config: CheckpointConfig, checkpoint: Path) -> None:
        self.folder = Path(source_folder(str(config.model.language), "language"))
        self.config = AutoConfig.from_pretrained(self.folder)
        self.end_token_ids = config.model.end_token_ids

    def grown(self, rows: int) -> tuple[Pieces, dict[str, int]]:
        """Pieces with at least `rows` embedding rows, and the former rows of those that grew.

        A new row repeats row 0: its logit then ties with that token's, which comes first, so greedy text is unchanged.
        """
        pieces = read_weights(self.folder)
        before = self.config.vocab_size
        if rows <= before:
            return pieces, {}
        small = self._shapes()
        self.config.vocab_size = rows
        large = self._shapes()
        growing = {key: small[key][0] for key in pieces if key in small and small[key] != large[key]}
        return {
            key: piece.with_row_again(0, rows) if key in growing else piece for key, piece in pieces.items()
        }, growing

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        made = expected_tensors(lambda: language_class(self.config).from_config(copy.deepcopy(self.config)))
        return {key: tuple(tensor.shape) for key, tensor in made.items()}

    def text_config(self) -> dict[str, Any]:
        """For the whole model's config; transformers' generate takes the end tokens from here."""
        fields = {key: value for key, value in self.config.to_dict().items() if key not in ("dtype", "architectures")}
        if self.end_token_ids is not None:
            ends = list(self.end_token_ids)
            fields["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        return fields


def _require_parts(checkpoint: Path, config: CheckpointConfig, kind: Kind, parts: tuple[Part, ...]) -> None:
    lacking = [part for part in parts if part not in config.parts]
    if "language" in parts and config.model.language is None:
        lacking.append("language")
    if lacking:
        raise CheckpointError(
            f"{checkpoint}: {ARCHITECTURES[kind]} needs the parts {', '.join(parts)}, this checkpoint lacks "
            f"{', '.join(dict.fromkeys(lacking))}; choose another --as"
        )


def _has_place(key: str, parts: tuple[Part, ...]) -> bool:
    part = part_of(key)
    return part is None or part in parts


def _vision_config(folder: Path, config: CheckpointConfig) -> dict[str, Any]:
    """The tower's settings; CheckpointError for a tower that the layout has no place for."""
    theirs = AutoConfig.from_pretrained(folder)
    if not isinstance(theirs, Blip2VisionConfig | InstructBlipVisionConfig) or config.model.vision_layer != -1:
        raise CheckpointError(
            f"{folder}: transformers' BLIP-2 classes hold BLIP-2's own ViT (blip_2_vision_model, last layer) and no "
            f"other image encoder, found {theirs.model_type}, layer {config.model.vision_layer}; this checkpoint "
            f"cannot become such a folder"
        )
    fields: dict[str, Any] = theirs.to_dict()
    return {key: value for key, value in fields.items() if key not in ("model_type", "architectures", "dtype")}


def _norm(bridge: Pieces) -> Pieces:
    """The trained norm, where the ViT's own final norm lies."""
    return {key.removeprefix(VISION): piece for key, piece in bridge.items() if key.startswith(NORM)}


def _resized_positions(config: CheckpointConfig) -> Pieces:
    """The position table at the checkpoint's image size, so that the folder needs no interpolation."""
    model = config.model
    if model.image_size is None:
        return {}
    tower = load_vision(model.vision, model.vision_layer, model.image_size)
    table = dict(tower.model.named_buffers())["embeddings.resized_positions"]
    return {POSITIONS: piece_of(table, Path(model.vision))}


def _processor(
    kind: Kind, checkpoint: Path, config: CheckpointConfig, preprocess: PreprocessSettings
) -> tuple[Any, int]:
    """The processor, which adds `<image>` to its tokenizer, and that token's id."""
    images = BlipImageProcessorPil(
        **{key: value for key, value in processor_json(preprocess).items() if key != "image_processor_type"}
    )
    queries = config.model.qformer.queries
    if kind == "retrieval":  # its texts hold no image tokens
        processor = Blip2Processor(images, load_tokenizer(str(checkpoint / "text_tokenizer"), "text"))
    elif kind == "caption":
        processor = Blip2Processor(images, load_tokenizer(str(checkpoint / "tokenizer"), "language"), queries)
    else:
        processor = InstructBlipProcessor(
            images,
            load_tokenizer(str(checkpoint / "tokenizer"), "language"),
            load_tokenizer(str(checkpoint / "text_tokenizer"), "text"),
            queries,
        )
    return processor, int(processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def _config(
    kind: Kind,
    config: CheckpointConfig,
    vision: Mapping[str, Any],
    language: _Language | None,
    image_token: int,
    bridge: Mapping[str, Piece],
) -> Any:
    """The config of the whole model."""
    ours = config.model.qformer
    words = bridge.get("embeddings.word_embeddings.weight")
    qformer = {
        "hidden_size": ours.width,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.heads,
        "intermediate_size": ours.ffn_width,
        "hidden_act": ours.activation,
        "hidden_dropout_prob": ours.dropout,
        "attention_probs_dropout_prob": ours.dropout,
        "max_position_embeddings": ours.text_positions,
        "layer_norm_eps": ours.layer_norm_eps,
        "cross_attention_frequency": ours.cross_attention_frequency,
    }
    if words is not None:
        qformer["vocab_size"] = words.shape[0]
    fields: dict[str, Any] = {
        "num_query_tokens": ours.queries,
        "vision_config": dict(vision),
        "qformer_config": qformer,
    }
    if language is not None:
        fields |= {"text_config": language.text_config(), "image_token_index": image_token}
    if kind == "instruct":
        whole = InstructBlipConfig(**fields)
    else:
        qformer["use_qformer_text_input"] = kind == "retrieval"
        whole = Blip2Config(**fields, image_text_hidden_size=ours.contrastive_width)
    whole.architectures = [ARCHITECTURES[kind]]
    whole.dtype = torch.float32
    return whole


def _write_side(
    folder: Path,
    checkpoint: Path,
    config: CheckpointConfig,
    kind: Kind,
    preprocess: PreprocessSettings,
    rows: dict[str, int],
) -> None:
    """Everything that the layout has no place for."""
    aside = folder / SIDE_FOLDER
    for name in ("tokenizer", "text_tokenizer"):
        if (checkpoint / name).is_dir():
            shutil.copytree(checkpoint / name, aside / name)
    language = None if config.model.language is None else Path(source_folder(config.model.language, "language"))
    if language is not None and kind == "retrieval":
        shutil.copytree(language, aside / "language")
    has_text = config.model.text_tokenizer is not None
    model = config.model.model_copy(update=self_contained(language is not None, has_text))
    side = Side(
        format=1,
        architecture=ARCHITECTURES[kind],
        stage=config.stage,
        question_conditioned=config.question_conditioned,
        parts=config.parts,
        model=model,
        preprocess=preprocess,
        metrics=json.loads((checkpoint / "metrics.json").read_text()),
        recipe_yaml=(checkpoint / "recipe.yaml").read_text(),
        vision_files=_small_files(Path(source_folder(config.model.vision, "vision"))),
        language_files={} if language is None else _small_files(language),
        rows=rows,
    )
    (folder / SIDE).write_text(side.model_dump_json(indent=2) + "\n")


def _small_files(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text(encoding="utf-8") for name in HALF_FILES if (folder / name).is_file()}


def _notes(kind: Kind, config: CheckpointConfig, vision: Mapping[str, Any]) -> list[str]:
    """What transformers will do otherwise than this checkpoint."""
    notes = []
    if config.model.image_norm_eps != vision["layer_norm_eps"]:
        notes.append(
            f"transformers has one epsilon ({vision['layer_norm_eps']:g}) for all norms of the image encoder, this "
            f"checkpoint has {config.model.image_norm_eps:g} for the last one; outputs differ in about the sixth digit"
        )
    if kind == "instruct" and config.model.qformer_reads == "question":
        notes.append(
            "this Q-Former was trained on the bare question; give transformers' processor the question alone for "
            "qformer_input_ids, it would otherwise give the whole prompt"
        )
    if kind == "caption" and config.question_conditioned:
        notes.append("this Q-Former reads the question, which the caption layout cannot do; answers will differ")
    return notes
