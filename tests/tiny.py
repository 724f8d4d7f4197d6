"""Tiny honest halves and recipes for tests: random Hugging Face folders through the same door as real ones."""

import json
from pathlib import Path

import torch

from trainer.config import ModelConfig, QFormerConfig
from trainer.demo_world.language import QuestionWriter, caption
from trainer.demo_world.scene import WIDE, random_scenes
from trainer.demo_world.vocabulary import train_language_tokenizer, train_text_tokenizer
from trainer.new_halves import new_language_model, new_vision_tower

SIDE = 16


def widen(model: torch.nn.Module, std: float = 0.2, *, matrices_only: bool = False) -> None:
    """Draw weights anew, large enough to be heard: fresh ones are so small that every output is nearly the same."""
    for parameter in model.parameters():
        if parameter.ndim == 2 or not matrices_only:
            torch.nn.init.normal_(parameter, std=std)


def write_tiny_halves(folder: Path, *, seed: int = 0) -> ModelConfig:
    """Save a 16-pixel vision tower, a two-layer language model and both tokenizers; returns their model section."""
    torch.manual_seed(seed)
    writer = QuestionWriter(seed, WIDE)
    texts = [
        text
        for scene in random_scenes(60, "train", seed, WIDE)
        for text in (caption(scene), *(f"Question: {q.text} Answer: {q.answer}" for q in writer.ask(scene, 4)))
    ]
    language, text = train_language_tokenizer(texts, "decoder-only"), train_text_tokenizer(texts)
    new_vision_tower(image_size=SIDE, patch=4, width=32, layers=2, heads=4).save_pretrained(folder / "vision")
    stored = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2], "resample": 3}
    (folder / "vision" / "preprocessor_config.json").write_text(json.dumps(stored))
    model = new_language_model(
        vocabulary=len(language),
        width=32,
        layers=2,
        heads=4,
        positions=96,
        end=language.eos_token_id,
        pad=language.pad_token_id,
    )
    widen(model, matrices_only=True)  # or every answer is one token repeated
    model.save_pretrained(folder / "language")
    language.save_pretrained(folder / "language")
    text.save_pretrained(folder / "text")
    return ModelConfig(
        vision=str(folder / "vision"),
        language=str(folder / "language"),
        text_tokenizer=str(folder / "text"),
        qformer=QFormerConfig(queries=4, width=32, layers=2, heads=4, ffn_width=64, contrastive_width=16),
    )
