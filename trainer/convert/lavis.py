"""LAVIS .pth files (stage 1, stage 2, caption and retrieval fine-tunes) → the pieces of a checkpoint.

Such a file is a pickle with a "model" dictionary and no config: sizes are read off the shapes, the frozen halves come
as folders. A fine-tune holds its image encoder, which then replaces the weights of the given folder. The key map is
that of transformers' own conversion, plus what that one drops (temperature, generation head).
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Blip2VisionConfig

from runtime.errors import CheckpointError, InputError
from runtime.preprocess import PreprocessSettings
from trainer.bridge import PARTS, Part, part_of
from trainer.config import ModelConfig, QFormerConfig
from trainer.convert.hf import BLIP2_VQA_PROMPTS, NORM, VISION, vision_half
from trainer.convert.images import processor_json, read_image_processor
from trainer.convert.model import (
    Half,
    Imported,
    first_metrics,
    fitted,
    half_of,
    require_bridge,
    require_tokenizer,
    self_contained,
)
from trainer.convert.options import ImportOptions
from trainer.convert.stream import Pieces, load_torch, piece_of
from trainer.towers import DECODER_TOKEN, load_tokenizer

BERT_HEAD_WIDTH = 64
NEWLINE_ENDS = "opt_proj."
"""LAVIS' OPT models end a text with a newline, its T5 models with T5's own end token."""
TOWER = "visual_encoder."

BRIDGE_NAMES = {
    r"query_tokens$": "query_tokens",
    r"ln_vision\.": f"{VISION}post_layernorm.",
    r"Qformer\.bert\.embeddings\.LayerNorm\.": "qformer.layernorm.",
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.": r"embeddings.\1_embeddings.",
    r"Qformer\.bert\.(encoder\.layer\.\d+)\.(attention|crossattention)\.self\.": r"qformer.\1.\2.attention.",
    r"Qformer\.bert\.encoder\.": "qformer.encoder.",
    r"Qformer\.cls\.predictions\.bias$": "itg_head.bias",
    r"Qformer\.cls\.predictions\.transform\.": "itg_head.",
    r"(opt|t5)_proj\.": "language_projection.",
    r"(vision|text)_proj\.": r"\1_projection.",
    r"itm_head\.": "itm_head.",
    r"temp$": "temperature",
}
TOWER_NAMES = {
    r"cls_token$": "embeddings.class_embedding",
    r"pos_embed$": "embeddings.position_embedding",
    r"patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"blocks\.(\d+)\.norm([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
}
TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
"""Stored twice; the second name is read."""
DERIVED = "Qformer.bert.embeddings.position_ids"


def read_lavis(path: Path, options: ImportOptions) -> Imported:
    """A LAVIS checkpoint file.

    Raises:
        CheckpointError: not such a file, unknown or missing keys, or shapes that fit no BLIP-2.
        InputError: a folder is needed and not given, or given and not needed.
    """
    state = _state(path)
    bridge, tower = _split(state, path)
    parts = tuple(part for part in PARTS if any(part_of(key) == part for key in bridge))
    speaks, reads = "language" in parts, "text" in parts
    _require_folders(path, options, speaks, reads)
    assert options.vision is not None
    vision, width, preprocess, side = _vision(options.vision, tower, bridge, options.image_size, path)
    vocabulary = _held(bridge, "embeddings.word_embeddings.weight", 2, path)[0] if reads else None
    qformer = _qformer(bridge, parts, vocabulary, options.heads, path)
    language, tokenizer, language_width, ends = None, None, None, None
    vqa_prompt = BLIP2_VQA_PROMPTS[0]
    if speaks and options.language is not None:
        language = half_of(options.language, "language")
        config = AutoConfig.from_pretrained(options.language)
        language_width = config.hidden_size
        place = require_tokenizer(options.language, "language model's tokenizer")
        loaded = load_tokenizer(str(place), "language")
        tokenizer = fitted(loaded, config.vocab_size, str(place))
        if any(key.startswith(NEWLINE_ENDS) for key in state):
            ends = (int(loaded("\n", add_special_tokens=False).input_ids[-1]),)
        vqa_prompt = BLIP2_VQA_PROMPTS[bool(config.is_encoder_decoder)]
    caption_prompt = "a photo of" if speaks and tower else ""  # the caption fine-tune, which trained its tower, had one
    model = ModelConfig(
        **self_contained(speaks, reads),
        vision_layer=-1 if options.vision_layer is None else options.vision_layer,
        image_size=preprocess.height if preprocess.height != side else None,
        qformer=qformer,
        caption_prompt=caption_prompt if options.caption_prompt is None else options.caption_prompt,
        vqa_prompt=vqa_prompt if options.vqa_prompt is None else options.vqa_prompt,
        end_token_ids=ends,
    )
    imported = Imported(
        stage="stage2" if speaks else "stage1",
        question_conditioned=False,
        model=model,
        parts=parts,
        bridge=bridge,
        vision=vision,
        language=language,
        tokenizer=tokenizer,
        text_tokenizer=_text_tokenizer(options.text_tokenizer, vocabulary) if vocabulary is not None else None,
        preprocess=preprocess,
        metrics=first_metrics(
            "stage2" if speaks else "stage1",
            architecture="LAVIS BLIP-2",
            file=path.name,
            image_encoder="trained, from the file" if tower else "frozen, from its folder",
            image_processor=processor_json(preprocess),
        ),
    )
    require_bridge(imported, str(path), width, language_width)
    return imported


def _state(path: Path) -> dict[str, Tensor]:
    content = load_torch(path)
    state = content.get("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f'{path}: expected a LAVIS checkpoint (a "model" dictionary of tensors), found the keys '
            f"{', '.join(map(repr, list(content)[:5]))}"
        )
    return state


def _split(state: Mapping[str, Tensor], path: Path) -> tuple[Pieces, Pieces]:
    """Bridge and image encoder by our names; every key that has no name is listed."""
    bridge: Pieces = {}
    tower: Pieces = {}
    unknown = []
    for key, tensor in state.items():
        if key == DERIVED:
            continue
        if key in TIED:
            if TIED[key] not in state or not torch.equal(tensor, state[TIED[key]]):
                raise CheckpointError(f"{path}: expected {key} to equal {TIED[key]}, found other numbers")
            continue
        names, prefix, target = (TOWER_NAMES, TOWER, tower) if key.startswith(TOWER) else (BRIDGE_NAMES, "", bridge)
        if key.startswith(TOWER) and key.endswith((".q_bias", ".v_bias")):  # two of theirs are one of ours
            key, tensor = f"{key.rpartition('.')[0]}.qkv.bias", _fused_bias(state, key, path)
        name = _named(key.removeprefix(prefix), names)
        if name is None:
            unknown.append(key)
        else:
            target[name] = piece_of(tensor, path)
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise CheckpointError(f"{path}: {len(unknown)} keys belong to no BLIP-2: {', '.join(unknown[:5])}{more}")
    return bridge, tower


def _held(pieces: Pieces, key: str, axes: int, path: Path) -> tuple[int, ...]:
    """The shape of a tensor that no BLIP-2 is without; CheckpointError when it is missing or of another kind."""
    if key not in pieces or len(pieces[key].shape) != axes:
        found = f"shape {list(pieces[key].shape)}" if key in pieces else "no such key"
        raise CheckpointError(f"{path}: expected a BLIP-2 with {key} of {axes} axes, found {found}")
    return pieces[key].shape


def _named(key: str, names: Mapping[str, str]) -> str | None:
    for pattern, name in names.items():
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", name, key)
    return None


def _fused_bias(state: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    """LAVIS keeps the query's and the value's bias and fixes the key's at zero; transformers has the three as one."""
    stem = key.rpartition(".")[0]
    query, value = state.get(f"{stem}.q_bias"), state.get(f"{stem}.v_bias")
    if query is None or value is None:
        raise CheckpointError(f"{path}: expected {stem}.q_bias and {stem}.v_bias together, found one of them")
    return torch.cat([query, torch.zeros_like(value), value])


def _require_folders(path: Path, options: ImportOptions, speaks: bool, reads: bool) -> None:
    needed = {"vision": True, "language": speaks, "text_tokenizer": reads}
    what = {
        "vision": "the folder of its image encoder (Hugging Face format)",
        "language": "the folder of its language model",
        "text_tokenizer": "the folder of BERT's tokenizer",
    }
    for name, need in needed.items():
        given, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if need and given is None:
            raise InputError(f"{path}: a LAVIS file does not hold {what[name]}; give it: {option} DIR")
        if not need and given is not None:
            raise InputError(f"{path}: {option} was given, but this file has nothing that uses it")


def _vision(
    folder: Path, tower: Pieces, bridge: Pieces, image_size: int | None, path: Path
) -> tuple[Half, int, PreprocessSettings, int]:
    """The tower, its width, how it wants pixels, and the side (pixels) its own positions are for."""
    half = half_of(folder, "vision")
    config = AutoConfig.from_pretrained(folder)
    config = getattr(config, "vision_config", config)
    if not tower:
        return (
            half,
            config.hidden_size,
            read_image_processor(folder, config.image_size, image_size or None),
            config.image_size,
        )
    if not isinstance(config, Blip2VisionConfig):
        raise CheckpointError(
            f"{folder}: expected the config of BLIP-2's own ViT (blip_2_vision_model), whose weights the file holds, "
            f"found {config.model_type}"
        )
    rows = _held(tower, "embeddings.position_embedding", 3, path)[1] - 1
    config.image_size = math.isqrt(rows) * config.patch_size
    preprocess = read_image_processor(folder, config.image_size, image_size or config.image_size)
    norm = {key.removeprefix(VISION): piece for key, piece in bridge.items() if key.startswith(NORM)}
    weights = {f"{VISION}{key}": piece for key, piece in {**tower, **norm}.items()}
    return vision_half(config, weights, preprocess, str(folder)), config.hidden_size, preprocess, config.image_size


def _qformer(
    bridge: Pieces, parts: tuple[Part, ...], vocabulary: int | None, heads: int | None, path: Path
) -> QFormerConfig:
    """Sizes as the shapes have them."""
    _, queries, width = _held(bridge, "query_tokens", 3, path)
    layers = {int(found[1]) for key in bridge if (found := re.match(r"qformer\.encoder\.layer\.(\d+)\.", key))}
    crossing = sorted(
        {
            int(found[1])
            for key in bridge
            if (found := re.match(r"qformer\.encoder\.layer\.(\d+)\.crossattention\.", key))
        }
    )
    if heads is None and width % BERT_HEAD_WIDTH:
        raise InputError(f"{path}: the Q-Former is {width} wide, which says nothing about its heads; give --heads N")
    frequency = crossing[1] - crossing[0] if len(crossing) > 1 else max(len(layers), 1)
    ffn_width = _held(bridge, "qformer.encoder.layer.0.intermediate_query.dense.weight", 2, path)[0]
    sizes: dict[str, Any] = {}
    if "contrast" in parts:
        sizes["contrastive_width"] = _held(bridge, "vision_projection.weight", 2, path)[0]
    if "text" in parts:
        sizes["text_positions"] = _held(bridge, "embeddings.position_embeddings.weight", 2, path)[0]
    return QFormerConfig(
        queries=queries,
        width=width,
        layers=len(layers),
        heads=heads or width // BERT_HEAD_WIDTH,
        ffn_width=ffn_width,
        cross_attention_frequency=frequency,
        vocabulary=vocabulary,
        **sizes,
    )


def _text_tokenizer(folder: Path | None, rows: int) -> Callable[[Path], Any]:
    """BERT's tokenizer; with LAVIS' [DEC] added when the embeddings have a row for it and the folder does not."""
    assert folder is not None
    tokenizer = load_tokenizer(str(require_tokenizer(folder, "Q-Former's tokenizer")), "text")
    if tokenizer.bos_token is None and len(tokenizer) == rows - 1:
        tokenizer.add_special_tokens({"bos_token": DECODER_TOKEN})
    return fitted(tokenizer, rows, str(folder))
