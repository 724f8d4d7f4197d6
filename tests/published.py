"""Tiny published models: random weights in transformers' own classes, saved as their users would save them.

One row of FAMILIES is one kind of published model; tests that are written over the table cover a new row at once.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from trainer.demo_world.language import QuestionWriter, caption
from trainer.demo_world.scene import WIDE, random_scenes
from trainer.demo_world.vocabulary import train_language_tokenizer, train_text_tokenizer

SIDE, PATCH, QUERIES = 16, 4, 4
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QFORMER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 2,
    "pad_token_id": 1,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",  # LAVIS' override of Flan-T5's gelu_new
    "decoder_start_token_id": 1,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
NEWLINE = "\u010a"
"""How byte-level BPE writes a newline."""


@dataclass(frozen=True)
class Family:
    """One kind of published model."""

    kind: str
    """caption, retrieval or instruct: the class and processor that hold it."""
    text_config: dict[str, Any] = field(default_factory=dict)
    begins: str = "</s> $A"
    """What the language model's tokenizer puts around a text."""
    save: dict[str, Any] = field(default_factory=dict)
    """Options of save_pretrained."""
    image_token_has_row: bool = True
    vision: dict[str, Any] = field(default_factory=dict)
    """What differs from `VISION`."""
    qformer: dict[str, Any] = field(default_factory=dict)
    """What differs from `QFORMER`."""
    spread: float = 0.15
    """Standard deviation of the weights; wider models need less for outputs of the same size."""


MIDDLE: dict[str, Any] = {
    "vision": {"hidden_size": 128, "intermediate_size": 256, "image_size": 64, "patch_size": 8},
    "qformer": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4},
    "spread": 0.08,
}
"""Of middle size: 65 image tokens, cross-attention in two of four layers."""
FAMILIES = {
    "opt": Family("caption", OPT | {"ends_with_newline": True}),
    "opt-untied-sharded": Family("caption", OPT | {"tie_word_embeddings": False}, save={"max_shard_size": "40KB"}),
    "opt-no-image-token": Family("caption", OPT, image_token_has_row=False),
    "llama": Family("caption", LLAMA, "<s> $A"),
    "t5": Family("caption", T5, "$A </s>"),
    "retrieval": Family("retrieval"),
    "retrieval-sharded": Family("retrieval", save={"max_shard_size": "30KB"}),
    "instruct-llama": Family("instruct", LLAMA, "<s> $A"),
    "instruct-t5": Family("instruct", T5, "$A </s>"),
    "opt-middle": Family(
        "caption",
        OPT | {"hidden_size": 192, "word_embed_proj_dim": 192, "ffn_dim": 384},
        save={"max_shard_size": "1MB"},
        **MIDDLE,
    ),
    "instruct-t5-middle": Family(
        "instruct",
        T5 | {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_decoder_layers": 2},
        "$A </s>",
        **MIDDLE,
    ),
}
WITH_LANGUAGE = [name for name, family in FAMILIES.items() if family.kind != "retrieval"]
RETRIEVAL = [name for name, family in FAMILIES.items() if family.kind == "retrieval"]


def tokenizers(begins: str) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """A byte-level BPE that puts `begins` around a text, and a BERT-like WordPiece, both of the demo world's words."""
    writer = QuestionWriter(0, WIDE)
    texts = [
        text
        for scene in random_scenes(30, "train", 0, WIDE)
        for text in (caption(scene), *(f"Question: {q.text} Answer: {q.answer}" for q in writer.ask(scene, 4)))
    ]
    language, text = train_language_tokenizer(texts, "decoder-only"), train_text_tokenizer(texts)
    specials = [(token, language.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    language.backend_tokenizer.post_processor = processors.TemplateProcessing(single=begins, special_tokens=specials)
    return language, text


def randomise(model: torch.nn.Module, spread: float, seed: int = 0) -> None:
    """Weights large enough that images and prompts change the outputs; fresh ones are zero (queries) or tiny."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name.lower()
            parameter.copy_(1 + 0.1 * noise if is_norm and name.endswith("weight") else spread * noise)
            if name.endswith("qkv.bias"):  # published towers have no bias on the key
                parameter.chunk(3)[1].zero_()


def write_published(folder: Path, family: Family, **vision: Any) -> Any:
    """Save a model of the family with its processor; returns the model, in eval mode. `vision` changes its tower."""
    language, text = tokenizers(family.begins)
    vision = VISION | family.vision | vision
    side = vision["image_size"]
    images = BlipImageProcessorPil(size={"height": side, "width": side})
    wrap: dict[str, Callable[[], Any]] = {
        "caption": lambda: Blip2Processor(images, language, QUERIES if family.image_token_has_row else None),
        "retrieval": lambda: Blip2Processor(images, text),
        "instruct": lambda: InstructBlipProcessor(images, language, text, QUERIES),
    }
    words, rows = len(text), len(language)
    processor = wrap[family.kind]()  # adds <image> to its tokenizer
    text_config = dict(family.text_config)
    if text_config.pop("ends_with_newline", False):
        text_config["eos_token_id"] = language.convert_tokens_to_ids(NEWLINE)
    if family.image_token_has_row:
        rows = len(language)
    qformer = QFORMER | family.qformer | {"vocab_size": words}
    fields: dict[str, Any] = {"vision_config": vision, "num_query_tokens": QUERIES}
    if family.text_config:
        fields["text_config"] = text_config | {"vocab_size": rows}
        fields["image_token_index"] = language.convert_tokens_to_ids("<image>") if family.image_token_has_row else None
    torch.manual_seed(0)
    if family.kind == "instruct":
        model = InstructBlipForConditionalGeneration(InstructBlipConfig(**fields, qformer_config=qformer))
    else:
        qformer |= {"use_qformer_text_input": family.kind == "retrieval"}
        config = Blip2Config(**fields, qformer_config=qformer, image_text_hidden_size=12)
        made = {"caption": Blip2ForConditionalGeneration, "retrieval": Blip2ForImageTextRetrieval}[family.kind]
        model = made(config)
    randomise(model, family.spread)
    model.save_pretrained(folder, **family.save)
    processor.save_pretrained(folder)
    return model.eval()


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
