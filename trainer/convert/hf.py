"""Hugging Face folders of BLIP-2 and InstructBLIP → the pieces of a checkpoint.

The layouts differ in what they hold and in a few names; all of that is one table. Numbers are taken over as they are:
epsilons, activation, size and normalisation of images, end tokens.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
)

from runtime.errors import CheckpointError, InputError, MissingFile
from runtime.preprocess import PreprocessSettings
from trainer.bridge import Part
from trainer.config import ModelConfig, QFormerConfig, StageName
from trainer.convert.check import expected_tensors, require_match
from trainer.convert.images import processor_json, read_image_processor
from trainer.convert.model import (
    Half,
    Imported,
    first_metrics,
    fitted,
    require_bridge,
    require_tokenizer,
    self_contained,
)
from trainer.convert.options import ImportOptions
from trainer.convert.stream import Pieces, read_weights
from trainer.language import language_class
from trainer.towers import load_tokenizer

VISION, LANGUAGE, NORM = "vision_model.", "language_model.", "vision_model.post_layernorm."


@dataclass(frozen=True)
class Layout:
    """What a folder of one architecture holds, and what its users do with it."""

    stage: StageName
    """The stage of ours that it has behind it."""
    parts: tuple[Part, ...]
    renamed: Mapping[str, str]
    """Their key → ours, where they differ, by the beginning of the key."""
    text_folder: str | None
    """Where the Q-Former's tokenizer lies; None: there is none."""
    question_conditioned: bool
    max_text_tokens: int
    """Longest text of its Q-Former (LAVIS' value)."""
    caption_prompt: str
    vqa_prompt: tuple[str, str]
    """For a decoder-only and for an encoder-decoder language model (BLIP-2 paper, appendix; LAVIS)."""


BLIP2_VQA_PROMPTS = ("Question: {} Answer:", "Question: {} Short answer:")
LAYOUTS = {
    "Blip2ForConditionalGeneration": Layout(
        stage="stage2",
        parts=("language",),
        renamed={},
        text_folder=None,
        question_conditioned=False,
        max_text_tokens=32,
        caption_prompt="",
        vqa_prompt=BLIP2_VQA_PROMPTS,
    ),
    "Blip2ForImageTextRetrieval": Layout(
        stage="stage1",
        parts=("text", "contrast", "matching"),
        renamed={},
        text_folder=".",
        question_conditioned=False,
        max_text_tokens=35,
        caption_prompt="",
        vqa_prompt=BLIP2_VQA_PROMPTS,
    ),
    "InstructBlipForConditionalGeneration": Layout(
        stage="vqa",
        parts=("text", "language"),
        renamed={
            "qformer.embeddings.layernorm.": "qformer.layernorm.",
            "qformer.embeddings.word_embeddings.": "embeddings.word_embeddings.",
            "qformer.embeddings.position_embeddings.": "embeddings.position_embeddings.",
        },
        text_folder="qformer_tokenizer",
        question_conditioned=True,
        max_text_tokens=128,
        caption_prompt="A short image caption.",
        vqa_prompt=("{}", "{}"),
    ),
}
DERIVED = (".position_ids", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of keys that older files store although they follow from the config; they are not read."""

NOT_GREEDY = {
    "num_beams": 1,
    "do_sample": False,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
}
"""Settings of decoding beside their neutral values."""


def read_hf(folder: Path, options: ImportOptions) -> Imported:
    """A folder that `save_pretrained` wrote, or the hub has.

    Raises:
        CheckpointError: an architecture we do not know, or weights that do not fit the config.
        MissingFile, InputError: a file is not there, or options that make no sense here.
    """
    config, architecture = read_hf_config(folder)
    layout = LAYOUTS[architecture]
    options.refuse_folders(f"{folder} holds its own image encoder, language model and tokenizers")
    weights = {key: piece for key, piece in read_weights(folder).items() if not key.endswith(DERIVED)}
    speaks = "language" in layout.parts
    preprocess = read_image_processor(folder, _side(config), options.image_size)
    vision = vision_half(config.vision_config, weights, preprocess, str(folder))
    language = language_half(config.text_config, weights, str(folder)) if speaks else None
    prefixes = (VISION, LANGUAGE) if speaks else (VISION,)
    bridge = {
        renamed(key, layout.renamed): piece
        for key, piece in weights.items()
        if key.startswith(NORM) or not key.startswith(prefixes)
    }
    tokenizer = text_tokenizer = None
    if speaks:
        loaded = load_tokenizer(str(require_tokenizer(folder, "language model's tokenizer")), "language")
        tokenizer = fitted(loaded, config.text_config.vocab_size, str(folder))
    if layout.text_folder is not None:
        place = require_tokenizer(folder / layout.text_folder, "Q-Former's tokenizer")
        text_tokenizer = fitted(load_tokenizer(str(place), "text"), config.qformer_config.vocab_size, str(place))
    seq2seq = speaks and bool(config.text_config.is_encoder_decoder)
    model = ModelConfig(
        **self_contained(speaks, text_tokenizer is not None),
        image_size=preprocess.height if preprocess.height != _side(config) else None,
        image_norm_eps=config.vision_config.layer_norm_eps,
        qformer=qformer_config(config, layout, architecture),
        qformer_reads="prompt" if layout.question_conditioned else "question",
        caption_prompt=layout.caption_prompt if options.caption_prompt is None else options.caption_prompt,
        vqa_prompt=layout.vqa_prompt[seq2seq] if options.vqa_prompt is None else options.vqa_prompt,
        end_token_ids=end_tokens(config, folder) if speaks else None,
    )
    imported = Imported(
        stage=layout.stage,
        question_conditioned=layout.question_conditioned,
        model=model,
        parts=layout.parts,
        bridge=bridge,
        vision=vision,
        language=language,
        tokenizer=tokenizer,
        text_tokenizer=text_tokenizer,
        preprocess=preprocess,
        metrics=first_metrics(
            layout.stage,
            architecture=architecture,
            written_by_transformers=getattr(config, "transformers_version", None),
            read_by_transformers=transformers.__version__,
            image_token_id=config.image_token_index,
            image_processor=processor_json(preprocess),
            generation_config=_generation_config(folder),
        ),
        notes=_notes(folder) if speaks else [],
    )
    language_width = config.text_config.hidden_size if speaks else None
    require_bridge(imported, str(folder), config.vision_config.hidden_size, language_width)
    return imported


def read_hf_config(folder: Path) -> tuple[Any, str]:
    """The parsed config.json of a folder, and its architecture, which is one of LAYOUTS."""
    path = folder / "config.json"
    if not path.is_file():
        raise MissingFile(f"{folder}: expected a Hugging Face folder with config.json, found no such file in it")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found a damaged file ({error})") from error
    named = tree.get("architectures") or [f"none (model_type {tree.get('model_type')!r})"]
    if named[0] not in LAYOUTS:
        raise CheckpointError(f"{path}: expected the architecture {' or '.join(LAYOUTS)}, found {named[0]}")
    if tree.get("quantization_config"):
        raise CheckpointError(
            f"{path}: expected original weights, found quantised ones; take the folder they come from"
        )
    try:
        return AutoConfig.from_pretrained(folder), named[0]
    except Exception as error:  # each field has a check of its own, with an error class of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: transformers {transformers.__version__} cannot read it: {reason}") from error


def qformer_config(config: Any, layout: Layout, architecture: str) -> QFormerConfig:
    """Sizes and numerics of their Q-Former."""
    theirs = config.qformer_config
    if "text" in layout.parts and not getattr(theirs, "use_qformer_text_input", True):
        raise CheckpointError(
            f"config.json: {architecture} needs use_qformer_text_input true in qformer_config, found false"
        )
    return QFormerConfig(
        queries=config.num_query_tokens,
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        ffn_width=theirs.intermediate_size,
        cross_attention_frequency=theirs.cross_attention_frequency,
        dropout=theirs.hidden_dropout_prob,
        contrastive_width=getattr(config, "image_text_hidden_size", QFormerConfig().contrastive_width),
        max_text_tokens=min(layout.max_text_tokens, theirs.max_position_embeddings),
        text_positions=theirs.max_position_embeddings,
        vocabulary=theirs.vocab_size if "text" in layout.parts else None,
        layer_norm_eps=theirs.layer_norm_eps,
        activation=theirs.hidden_act,
    )


def vision_half(theirs: Any, weights: Pieces, preprocess: PreprocessSettings, source: str) -> Half:
    """Their ViT as a folder of its own; InstructBLIP's is BLIP-2's under another name."""
    fields = {key: value for key, value in theirs.to_dict().items() if key not in ("model_type", "architectures")}
    config = Blip2VisionConfig(**fields)
    config.architectures = [Blip2VisionModel.__name__]
    pieces = {key.removeprefix(VISION): piece for key, piece in weights.items() if key.startswith(VISION)}
    require_match(pieces, expected_tensors(lambda: Blip2VisionModel(config)), f"{source} (keys {VISION}*)")
    own = preprocess.model_copy(update={"height": config.image_size, "width": config.image_size})
    files = {
        "config.json": config.to_json_string(),
        "preprocessor_config.json": json.dumps(processor_json(own), indent=2) + "\n",
    }
    return Half(pieces, files)


def language_half(theirs: Any, weights: Pieces, source: str) -> Half:
    """Their language model as a folder of its own, in the type it is stored in."""
    made: list[Any] = []

    def build() -> Any:
        made.append(language_class(theirs).from_config(theirs))
        return made[0]

    expected = expected_tensors(build)
    ignored = [re.compile(pattern) for pattern in made[0]._keys_to_ignore_on_load_unexpected or ()]  # of old versions
    pieces = {
        key.removeprefix(LANGUAGE): piece
        for key, piece in weights.items()
        if key.startswith(LANGUAGE) and not any(pattern.search(key) for pattern in ignored)
    }
    require_match(pieces, expected, f"{source} (keys {LANGUAGE}*)", made[0].all_tied_weights_keys)
    theirs.architectures = [type(made[0]).__name__]
    files = {
        "config.json": theirs.to_json_string(),
        "generation_config.json": GenerationConfig.from_model_config(theirs).to_json_string(),
    }
    return Half(pieces, files)


def end_tokens(config: Any, folder: Path) -> tuple[int, ...] | None:
    """What ends a text: transformers takes it from the language model's own config (BLIP-2's OPT: newline)."""
    said = config.text_config.eos_token_id
    if said is None:
        said = _generation_config(folder).get("eos_token_id")
    if said is None:
        return None
    return tuple(said) if isinstance(said, list) else (int(said),)


def _generation_config(folder: Path) -> dict[str, Any]:
    """The folder's own defaults of decoding; empty when it states none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, found a damaged file ({error})") from error
    return tree if isinstance(tree, dict) else {}


def _notes(folder: Path) -> list[str]:
    """Defaults of decoding that the folder asks for and greedy decoding does not follow."""
    stored = _generation_config(folder)
    asked = {name: stored[name] for name, plain in NOT_GREEDY.items() if stored.get(name, plain) not in (plain, None)}
    if not asked:
        return []
    listed = ", ".join(f"{name} {value}" for name, value in asked.items())
    return [
        f"generation_config.json asks for {listed}; text is decoded greedily here, as transformers does when told so"
    ]


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key with its beginning replaced where `names` says so."""
    for theirs, ours in names.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    if not isinstance(size, int):
        raise InputError(f"config.json: expected one number for vision_config.image_size (a square), found {size}")
    return size
