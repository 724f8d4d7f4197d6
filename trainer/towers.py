"""The door to transformers: frozen vision towers, language models and tokenizers, loaded or made small.

Everything the bridge stands between is a Hugging Face class in a Hugging Face folder; the demo halves go
through the same door as CLIP and OPT do.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from runtime.errors import CheckpointError, MissingFile
from runtime.preprocess import PreprocessSettings
from trainer.config import DEMO

hf_logging.disable_progress_bar()  # a bar for a file read in milliseconds hides ours

DEMO_HALVES = Path(__file__).parent / "demo_halves"
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as preprocessor_config.json stores them."""


# Shape letters: B images, N image tokens, E image width
class VisionTower(nn.Module):
    """A Hugging Face vision model that hands out one of its hidden states, frozen and in eval mode."""

    def __init__(self, model: PreTrainedModel, layer: int, preprocess: PreprocessSettings) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.layer = layer
        self.preprocess = preprocess
        self.width = int(model.config.hidden_size)

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in eval mode: a frozen tower has no dropout (LAVIS disables its train switch too)."""
        return super().train(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Image features [B, N, E]; the class token, where there is one, comes first."""
        if self.layer == -1:
            return self.model(pixel_values=pixels_BCHW).last_hidden_state
        return self.model(pixel_values=pixels_BCHW, output_hidden_states=True).hidden_states[self.layer]


def source_folder(source: str, half: str) -> str:
    """Folder or hub id to load from; `demo` is the shipped half named `half` ("vision", "language", "text")."""
    if source != DEMO:
        return source
    folder = DEMO_HALVES / half
    if not folder.is_dir():
        raise MissingFile(
            f"{folder} is missing: the demo half {half!r} is part of the package. "
            f"Reinstall qforge, or make it again with --set model.demo_halves.rebuild=true"
        )
    return str(folder)


def load_vision(source: str, layer: int) -> VisionTower:
    """Vision tower from a local folder or hub id; of a two-tower model (CLIP, SigLIP) the vision half."""
    folder = source_folder(source, "vision")
    model = load_pretrained(AutoModel, folder, unexpected="left")
    model = getattr(model, "vision_model", model)
    return VisionTower(model, layer, read_preprocess(folder, model.config))


def load_tokenizer(source: str, half: str) -> PreTrainedTokenizerBase:
    """Fast tokenizer of a folder or hub id."""
    folder = source_folder(source, half)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MissingFile(f"{folder} holds no tokenizer that transformers can read: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder} has a slow tokenizer; save its fast form (tokenizer.json) there")
    return tokenizer


def load_pretrained(kind: Any, folder: str, *, unexpected: Literal["left", "refused"]) -> PreTrainedModel:
    """fp32 weights whatever the folder stores; every key must be there.

    `unexpected` weights, which the model has no place for, are left where only a part of a model is wanted (a vision
    tower without its head), else refused.

    Raises:
        MissingFile: nothing transformers can read. CheckpointError: weights missing, unexpected or of another shape.
    """
    try:
        with _report_is_ours():
            model, report = kind.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError) as error:
        raise MissingFile(f"{folder} holds no model that transformers can read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: a weight file is damaged ({error}); copy it again from its source") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{folder} lacks {len(missing)} weights its config asks for, the first is {missing[0]}")
    if mismatched := sorted(report["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise CheckpointError(f"{folder}: {key} expected shape {list(expected)} by config.json, found {list(found)}")
    if (more := sorted(report["unexpected_keys"])) and unexpected == "refused":
        raise CheckpointError(f"{folder} has {len(more)} weights its config does not know, the first is {more[0]}")
    return model


@contextmanager
def _report_is_ours() -> Iterator[None]:
    """Transformers' own table of what did not fit stays unsaid: we refuse it, in a sentence."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def read_preprocess(folder: str, vision_config: Any) -> PreprocessSettings:
    """What the tower wants of its pixels: size from its config, resampling and mean/std from preprocessor_config.json.

    Evaluation images are resized to a square without cropping, as BLIP-2 does (LAVIS blip_image_eval).
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise MissingFile(f"{path} is missing: it says how images are normalised for this tower. Copy it there")
    stored = json.loads(path.read_text())
    side = int(vision_config.image_size)
    return PreprocessSettings.model_validate(
        {
            "height": side,
            "width": side,
            "resample": RESAMPLE.get(stored.get("resample", 3), "bicubic"),
            "mean": tuple(stored["image_mean"]),
            "std": tuple(stored["image_std"]),
        }
    )


def new_vision_tower(*, image_size: int, patch: int, width: int, layers: int, heads: int) -> CLIPVisionModel:
    """A small CLIP-shaped vision tower with random weights."""
    config = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)


def new_language_model(
    *, vocabulary: int, width: int, layers: int, heads: int, positions: int, end: int, pad: int
) -> OPTForCausalLM:
    """A small OPT-shaped language model with random weights; like OPT it begins a text with its end token."""
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        dropout=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return OPTForCausalLM(config)
