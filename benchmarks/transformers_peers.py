"""BLIP-2 as transformers runs it: eager in fp32 and bf16, and compiled by inductor; what a bundle is measured against.

Weights are random and the shapes are published ones (ViT-B/16 at 224 pixels, 12-layer Q-Former, OPT-125M): speed does
not depend on what the numbers are. All peers answer from image files, as a bundle does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from trainer.config import DEMO
from trainer.towers import load_tokenizer

QUERIES = 32
VOCABULARY = 50_272
TOWER: dict[str, float] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "image_size": 224,
    "initializer_range": 0.02,
}
"""transformers' own tower begins at 1e-10: the ranges of such activations are those of rounding."""
OPT_125M = {
    "model_type": "opt",
    "hidden_size": 768,
    "word_embed_proj_dim": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": VOCABULARY,
    "eos_token_id": 2,
}


def write_blip2(folder: Path, seed: int = 0) -> int:
    """Save such a model in fp32 with a processor; returns its number of parameters."""
    config = Blip2Config(
        vision_config=TOWER,
        qformer_config={"encoder_hidden_size": TOWER["hidden_size"]},
        text_config=OPT_125M,
        num_query_tokens=QUERIES,
        image_token_index=VOCABULARY - 1,
    )
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(config)
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": TOWER["image_size"], "width": TOWER["image_size"]})
    Blip2Processor(images, load_tokenizer(DEMO, "language"), QUERIES).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


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
