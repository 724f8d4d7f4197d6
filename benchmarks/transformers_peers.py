"""BLIP-2 as transformers runs it: eager in fp32 and bf16, and compiled by inductor; what a bundle is measured against.

Weights are random and the shapes published ones: speed does not depend on what the numbers are. All peers answer from
image files, as a bundle does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from trainer.config import DEMO
from trainer.towers import load_tokenizer

QUERIES = 32


@dataclass(frozen=True)
class Size:
    """How large the model is, in transformers' words."""

    vision: dict[str, float]
    """transformers' own tower begins at 1e-10, where the ranges of activations are those of rounding."""
    qformer: dict[str, int]
    language: dict[str, int]


SIZES = {
    "opt-125m": Size(
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"patch_size": 16, "image_size": 224, "initializer_range": 0.02},
        {"encoder_hidden_size": 768},
        {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "vocab_size": 50_272},
    ),
    "tiny": Size(
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"patch_size": 16, "image_size": 32, "initializer_range": 0.1},
        {"encoder_hidden_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "cross_attention_frequency": 1},
        {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 1}
        | {"num_attention_heads": 2, "vocab_size": 1024},
    ),
}
"""ViT-B/16 at 224 pixels, Q-Former 12 x 768 and OPT-125M; one for tests."""


def write_blip2(folder: Path, size: Size, seed: int = 0) -> None:
    """Save such a model in fp32 with a processor."""
    config = Blip2Config(
        vision_config=size.vision,
        qformer_config=size.qformer,
        text_config={"model_type": "opt", "eos_token_id": 2, **size.language},
        num_query_tokens=QUERIES,
        image_token_index=size.language["vocab_size"] - 1,
    )
    torch.manual_seed(seed)
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    side = int(size.vision["image_size"])
    images = BlipImageProcessorPil(size={"height": side, "width": side})
    Blip2Processor(images, load_tokenizer(DEMO, "language"), QUERIES).save_pretrained(folder)


class Blip2Peer:
    """transformers' own `Blip2ForConditionalGeneration`, asked from image files."""

    def __init__(self, folder: Path, dtype: torch.dtype, compiled: bool = False) -> None:
        """`compiled`: each half goes through `torch.compile`, the language model for any length."""
        self._model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        self._processor = Blip2Processor.from_pretrained(folder)
        self._dtype = dtype
        if compiled:
            for module, varying in (
                (self._model.vision_model, None),
                (self._model.qformer, None),
                (self._model.language_model, True),
            ):
                module.forward = torch.compile(module.forward, dynamic=varying)

    @torch.inference_mode()
    def say(self, images: Sequence[Path], prompt: str, tokens: int) -> list[tuple[int, ...]]:
        """Exactly so many tokens for each image, greedily."""
        pictures = [Image.open(image).convert("RGB") for image in images]
        given = self._processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt")
        given["pixel_values"] = given["pixel_values"].to(self._dtype)
        said = self._model.generate(**given, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return [tuple(row) for row in said[:, -tokens:].tolist()]
