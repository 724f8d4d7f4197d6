"""The door to transformers: frozen vision towers, language models and tokenizers, loaded or made small.

Everything the bridge stands between is a Hugging Face class in a Hugging Face folder; the demo halves go
through the same door as CLIP and OPT do.
"""

import inspect
import json
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
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from runtime.errors import CheckpointError, InputError, MissingFile
from runtime.preprocess import PreprocessSettings
from trainer.config import DEMO_FOLDERS

hf_logging.disable_progress_bar()  # a bar for a file read in milliseconds hides ours

DEMO_HALVES = Path(__file__).parent / "demo_halves"
DECODER_TOKEN = "[DEC]"
"""Begins a text that the Q-Former generates (ITG); LAVIS adds it to BERT's tokens."""
PREPROCESSOR = "preprocessor_config.json"
"""The file of a tower's folder that says how it wants its pixels."""
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as preprocessor_config.json stores them."""


# Shape letters: B images, N image tokens, E image width
class VisionTower(nn.Module):
    """A Hugging Face vision model that hands out one of its hidden states; frozen and in eval mode until `unfreeze`.

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
        self.trained = False
        """Whether features carry a gradient into the tower."""
        self._options: dict[str, bool] = {}
        if _side(model.config) != preprocess.height:
            self.always_interpolate()

    def always_interpolate(self) -> None:
        """Ask the tower for positions of the size that an image has, where it has to be asked."""
        if "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            self._options = {"interpolate_pos_encoding": True}

    def unfreeze(self, *, checkpointing: bool) -> None:
        """Let everything be trained that reaches the hidden state handed out, and nothing else.

        What does not reach it (later layers, poolers, the tower's own final norm) would never get a gradient, which
        stops distributed training. Positions stay at the tower's own size and are interpolated at every pass, the
        gradient with them: one table for all image sizes (LAVIS resizes the table and trains the result).
        """
        for part in self.model.modules():
            vars(part).pop("interpolate_pos_encoding", None)  # a table for one size in place of the tower's own rule
        self.trained = True
        self.model.requires_grad_(True)
        side, device = self.preprocess.height, next(self.parameters()).device
        with torch.enable_grad():
            reached = reached_by(self(torch.zeros(1, 3, side, side, device=device)))
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter in reached)
        if checkpointing:
            now, before = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # transformers 5.23, 5.17
            enable = getattr(self.model, now if hasattr(self.model, now) else before)
            enable({"use_reentrant": False})
        self.train()

    def layers(self) -> nn.ModuleList:
        """The tower's layers, the first to see the image first."""
        count = self.model.config.num_hidden_layers
        stacks = (part for part in self.model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
        found = next(stacks, None)
        if found is None:
            raise InputError(
                f"train_vision: {type(self.model).__name__} is no stack of {count} layers, so its layers cannot have "
                f"rates of their own; leave it frozen"
            )
        return found

    def train(self, mode: bool = True) -> "VisionTower":
        """A frozen tower stays in eval mode: it has no dropout (LAVIS disables its train switch too)."""
        return super().train(mode and self.trained)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Image features [B, N, E]; the class token, where there is one, comes first."""
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            states = self.model(pixel_values=pixels_BCHW, output_hidden_states=True, **self._options).hidden_states
        return states[self.layer]


def reached_by(output: Tensor) -> set[Tensor]:
    """The leaf tensors that a gradient of `output` arrives at."""
    leaves, seen, waiting = set[Tensor](), set[Any](), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [before for before, _ in node.next_functions]
    return leaves


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


def load_text_tokenizer(source: str, rows: int | None) -> PreTrainedTokenizerBase:
    """Tokenizer of the Q-Former's text side, with a token that begins a text to generate.

    BERT has none: it gets LAVIS' `[DEC]`, a row more than BERT embeds. Where `rows` says that the Q-Former was made
    without such a row, it stays as it is.
    """
    tokenizer = load_tokenizer(source, "text")
    if tokenizer.bos_token_id is None and (rows is None or len(tokenizer) < rows):
        tokenizer.add_special_tokens({"bos_token": DECODER_TOKEN})
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
    path = Path(folder) / PREPROCESSOR
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
