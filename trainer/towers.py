"""The door to transformers: frozen vision towers, language models and tokenizers, loaded or made small.

Everything the bridge stands between is a Hugging Face class in a Hugging Face folder; the demo halves go
through the same door as CLIP and OPT do.
"""

import inspect
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.utils import logging as hf_logging

from runtime.errors import CheckpointError, InputError, MissingFile
from runtime.preprocess import PreprocessSettings
from trainer.config import DEMO_FOLDERS

hf_logging.disable_progress_bar()  # a bar for a file read in milliseconds hides ours

DEMO_HALVES = Path(__file__).parent / "demo_halves"
INITIAL_EMBEDDING = 0.1
"""Size at which token and position embeddings of a new small language model start."""
T5_ADDED = 0.3
"""What is left of the size at which T5's layers start to add to the residual stream: that of the OPT-shaped model."""
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as preprocessor_config.json stores them."""


# Shape letters: B images, N image tokens, E image width
class VisionTower(nn.Module):
    """A Hugging Face vision model that hands out one of its hidden states, frozen and in eval mode.

    `layer` indexes transformers' `hidden_states`: -1 is what the last layer gives, before any norm of the tower itself
    (BLIP-2's final norm is trained and lives in our bridge).
    """

    def __init__(self, model: PreTrainedModel, layer: int, preprocess: PreprocessSettings) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.layer = layer
        self.preprocess = preprocess
        self.width = int(model.config.hidden_size)
        self.other_sides: tuple[int, ...] = ()
        """Sides (pixels) of further images it reads, beside `preprocess`; see `trainer.any_size`."""
        self._options: dict[str, bool] = {}
        if _side(model.config) != preprocess.height:
            self.always_interpolate()

    def always_interpolate(self) -> None:
        """Ask the tower for positions of the size that an image has, where it has to be asked."""
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            self._options = {"interpolate_pos_encoding": True}

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in eval mode: a frozen tower has no dropout (LAVIS disables its train switch too)."""
        return super().train(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Image features [B, N, E]; the class token, where there is one, comes first."""
        states = self.model(pixel_values=pixels_BCHW, output_hidden_states=True, **self._options).hidden_states
        return states[self.layer]


def source_folder(source: str, half: str) -> str:
    """Folder or hub id to load from; `demo` and `demo-t5` are shipped halves (`half`: "vision", "language", "text")."""
    shipped = DEMO_FOLDERS.get((half, source))
    if shipped is None:
        return source
    folder = DEMO_HALVES / shipped
    if not folder.is_dir():
        raise MissingFile(
            f"{folder} is missing: the demo half {shipped!r} is part of the package. "
            f"Reinstall qforge, or make it again with --set model.demo_halves.rebuild=true"
        )
    return str(folder)


def load_vision(source: str, layer: int, image_size: int | None = None) -> VisionTower:
    """Vision tower from a local folder or hub id; of a two-tower model (CLIP, SigLIP) the vision half.

    `image_size` (pixels) is the side it shall read; None: its own.
    """
    folder = source_folder(source, "vision")
    model = load_pretrained(_vision_class(folder), folder, unexpected="left")
    model = getattr(model, "vision_model", model)
    layers = int(model.config.num_hidden_layers)
    if not -layers - 1 <= layer <= layers:
        raise InputError(f"model.vision_layer: expected -{layers + 1} to {layers} for {folder}, found {layer}")
    if image_size is not None and image_size != _side(model.config):
        _resize_positions(model, image_size, folder)
    return VisionTower(model, layer, read_preprocess(folder, model.config, image_size))


def _vision_class(folder: str) -> Any:
    """AutoModel, or the class the folder names where transformers has no automatic one (BLIP-2's own ViT)."""
    config = read_hf_config(folder)
    if type(config) in MODEL_MAPPING:
        return AutoModel
    named = (config.architectures or ["none"])[0]
    if not hasattr(transformers, named):
        raise CheckpointError(
            f"{folder}: expected a vision model that transformers {transformers.__version__} has, "
            f"found {named} ({config.model_type})"
        )
    return getattr(transformers, named)


def read_hf_config(folder: str) -> Any:
    """A folder's config.json as transformers reads it; MissingFile when it cannot."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MissingFile(f"{folder} holds no model that transformers can read: {error}") from error


def _side(vision_config: Any) -> int:
    """Side of the pixels (a square) that a tower was made for."""
    size = vision_config.image_size
    sides = {int(side) for side in size} if isinstance(size, list | tuple) else {int(size)}
    if len(sides) != 1:
        raise CheckpointError(f"expected a vision tower for square images, found image_size {size}")
    return sides.pop()


@torch.no_grad()
def _resize_positions(model: PreTrainedModel, side: int, folder: str) -> None:
    """Interpolate the position embeddings to `side` pixels once, by the tower's own rule (bicubic).

    The result is handed out in place of that rule from then on, so a traced graph holds the table, not the resize.
    """
    embeddings = next((part for part in model.modules() if hasattr(part, "interpolate_pos_encoding")), None)
    patch = model.config.patch_size
    if embeddings is None:
        raise InputError(
            f"model.image_size: {type(model).__name__} in {folder} cannot interpolate its positions; "
            f"leave it at {_side(model.config)} pixels"
        )
    if not isinstance(patch, int) or side % patch:
        raise InputError(f"model.image_size: expected a multiple of the patch size {patch} of {folder}, found {side}")
    tables: list[Tensor] = []
    own_rule = embeddings.interpolate_pos_encoding

    def watched(*arguments: Any) -> Tensor:
        tables.append(own_rule(*arguments))
        return tables[-1]

    embeddings.interpolate_pos_encoding = watched
    flag = "interpolate_pos_encoding"
    options = {flag: True} if flag in inspect.signature(embeddings.forward).parameters else {}
    embeddings(torch.zeros(1, 3, side, side), **options)
    embeddings.register_buffer("resized_positions", tables[-1].clone(), persistent=False)
    embeddings.interpolate_pos_encoding = lambda *_: embeddings.resized_positions


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


def read_preprocess(folder: str, vision_config: Any, image_size: int | None = None) -> PreprocessSettings:
    """What the tower wants of its pixels: size from its config, resampling and mean/std from preprocessor_config.json.

    `image_size` replaces the size of the config.

    Evaluation images are resized to a square without cropping, as BLIP-2 does (LAVIS blip_image_eval).
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise MissingFile(f"{path} is missing: it says how images are normalised for this tower. Copy it there")
    stored = json.loads(path.read_text())
    side = _side(vision_config) if image_size is None else image_size
    number = stored.get("resample", 3)
    if number not in RESAMPLE:
        raise CheckpointError(f"{path}: expected resample {', '.join(map(str, RESAMPLE))} (PIL), found {number}")
    return PreprocessSettings.model_validate(
        {
            "height": side,
            "width": side,
            "resample": RESAMPLE[number],
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
    """A small OPT-shaped language model with random weights; like OPT it begins a text with its end token.

    OPT's own start (0.02 everywhere) suits a width of 768; at 128 it leaves a model that for thousands of steps copies
    only what stands beside. Here matrices start at 0.02 * sqrt(768 / width), what a layer adds to the residual stream
    is scaled down by depth (GPT-2, section 2.3) so that the embeddings stay heard, and positions start as sinusoids
    ("Attention is all you need", section 3.5), so that neighbours are alike from the start.
    """
    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        dropout=0.0,
        init_std=0.02 * math.sqrt(768 / width),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = OPTForCausalLM(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                weights.mul_((2 * layers) ** -0.5)
        embedding = model.get_input_embeddings().weight
        embedding.mul_(INITIAL_EMBEDDING / embedding.std())
        embed_positions = model.model.decoder.embed_positions.weight
        embed_positions.copy_(INITIAL_EMBEDDING * _sinusoids(len(embed_positions), width))
    return model


def new_encoder_decoder(
    *, vocabulary: int, width: int, layers: int, decoder_layers: int, heads: int, end: int, pad: int
) -> T5ForConditionalGeneration:
    """A small T5-shaped language model with random weights; like T5 its decoder begins with the pad token.

    T5's own start is made for Adafactor, whose steps grow with the weights. For Adam, whose steps do not, embeddings
    and residual stream start as those of `new_language_model`, the last norm undoes the division of T5's logits by
    sqrt(width), and the position biases, which would need a thousand steps to say "the word before", start with it.
    """
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        dropout_rate=0.0,
        eos_token_id=end,
        pad_token_id=pad,
        decoder_start_token_id=pad,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                added = 2 * layers if name.startswith("encoder") else 3 * decoder_layers
                weights.mul_(T5_ADDED * added**-0.5)
        model.shared.weight.mul_(INITIAL_EMBEDDING)
        model.decoder.final_layer_norm.weight.fill_(width**0.5)
        for stack in (model.encoder, model.decoder):
            attention = stack.block[0].layer[0].SelfAttention
            attention.relative_attention_bias.weight.copy_(_neighbours(attention))
    return model


def _neighbours(attention: T5Attention) -> Tensor:
    """Position biases [buckets, heads]: of four heads one looks a word back and one, in an encoder, a word ahead.

    They fall with the distance from that neighbour (ALiBi, arXiv 2108.12409), and no further than what a head can
    learn to overcome; all layers share them. The other heads look everywhere.
    """
    farthest = attention.relative_attention_max_distance
    offsets = torch.arange(-farthest, 1 if attention.is_decoder else farthest + 1)
    buckets = attention._relative_position_bucket(
        offsets, not attention.is_decoder, attention.relative_attention_num_buckets, farthest
    )
    biases = torch.zeros(attention.relative_attention_num_buckets, attention.n_heads)
    for first, neighbour in ((1, -1),) if attention.is_decoder else ((1, -1), (2, 1)):
        fall = -(2.0 * (offsets - neighbour).abs()).clamp(max=6.0)
        biases[buckets, first::4] = fall[:, None]
    return biases


def _sinusoids(positions: int, width: int) -> Tensor:
    """Sines, then cosines, of wavelengths from 2 pi to 20,000 pi positions: [positions, width]."""
    angles = torch.arange(positions)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
