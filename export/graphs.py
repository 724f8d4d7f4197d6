"""What becomes a graph: thin modules around the trained model, and the one table of their names and sizes.

The wrappers rewrite nothing, they put the parts together as the runtime calls them; those of the language model are in
export/language_modules.py. A decoder-only language model is one graph that serves prefill (past = 0) and every further
step; an encoder-decoder is two, of which the first runs once.

Shape letters: B batch, C H W pixels, N image tokens, E image width, Q queries, D language width, T question or prompt
tokens
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from export.language_modules import DecoderGraph, EmbedGraph, EncoderGraph, LanguageGraph, ignores_hidden_past
from runtime.encoder_decoder import SAID_MASK
from runtime.errors import InputError
from runtime.image_encoder import FUSED
from trainer.blip2 import Blip2

Arrays = dict[str, npt.NDArray[Any]]
BATCH, PAST, NEW, TOKENS, READ = 2, 5, 3, 7, 9
"""Sizes of the traced example: at least 2 and all different, because the exporter freezes 0 and 1 and merges equals."""

OPSET = 20
"""Of all portable graphs: from 23 on the exporter writes `Attention` nodes, which TensorRT builds in fp32 for no GPU
(reference/export.md §2.1)."""

Axes = dict[int, str]
"""Axis → the name of its size; other axes are fixed."""


@dataclass(frozen=True)
class InputPlan:
    """One input of a graph."""

    example: Tensor
    """What the graph is traced with; only shape and type matter."""
    varying: Axes


@dataclass(frozen=True)
class Graph:
    """A module to trace: tensors in and out by position, their names here."""

    name: str
    module: nn.Module
    inputs: dict[str, InputPlan]
    outputs: dict[str, Axes]
    """Name → its varying axes, in the module's order."""
    hidden: frozenset[str] = frozenset()
    """Outputs [B, h, L, d] that say nothing where `attention_mask` is 0: a row padded on the left is empty there, and
    what comes of an empty row differs from engine to engine."""
    opset: int = OPSET
    """ONNX operator set it is traced at."""
    looks_up: bool = False
    """Whether it reads a few rows of its weights and computes nothing."""

    def run_eager(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """What PyTorch gives: the slow path that judges the traced graph."""
        with torch.no_grad():
            given = self.module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self.inputs))
        return dict(zip(self.outputs, (tensor.numpy() for tensor in given), strict=True))


class VisionGraph(nn.Module):
    """Frozen tower, then the trained LayerNorm."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.vision, self.post_layernorm = model.vision, model.bridge.post_layernorm

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor]:
        """image_embeds [B, N, E]."""
        return (self.post_layernorm(self.vision(pixels_BCHW)),)


class QFormerGraph(nn.Module):
    """Queries through the Q-Former and the projection; with question tensors where the model reads the question.

    A row whose mask is all 0 has no question: hidden text gets no attention at all, so its prefix is that of no text.
    """

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.bridge = model.bridge

    def forward(self, image_embeds_BNE: Tensor, *question: Tensor) -> tuple[Tensor]:
        """prefix [B, Q, D]; `question` is nothing, or ids and mask [B, T] int64."""
        return (self.bridge.prefix(image_embeds_BNE, *question),)


class FusedGraph(nn.Module):
    """Vision tower and Q-Former in one, without a question: all that a caption needs."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.vision, self.qformer = VisionGraph(model), QFormerGraph(model)
        self.gives_embeds = model.question_conditioned

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        """prefix [B, Q, D]; image_embeds [B, N, E] too where a question about the image may follow."""
        (image_embeds_BNE,) = self.vision(pixels_BCHW)
        (prefix_BQD,) = self.qformer(image_embeds_BNE)
        return (prefix_BQD, image_embeds_BNE) if self.gives_embeds else (prefix_BQD,)


def graphs_of(model: Blip2) -> dict[str, Graph]:
    """The graphs of a bundle, in the order the runtime runs them.

    Raises:
        InputError: the language model keeps no plain key-value cache.
    """
    language = (_language(model),) if model.style == "decoder-only" else (_encoder(model), _decoder(model))
    return {graph.name: graph for graph in (vision_graph(model), _qformer(model), _embed(model), *language)}


def vision_graph(model: Blip2) -> Graph:
    """Pixels → image_embeds; what every bundle begins with."""
    side = model.preprocess
    if not model.vision.other_sides:
        pixels = InputPlan(torch.zeros(BATCH, 3, side.height, side.width), {0: "batch"})
        return Graph("vision", VisionGraph(model).eval(), {"pixels": pixels}, {"image_embeds": {0: "batch"}})
    other = model.vision.other_sides[0]  # two different sizes, so that neither is taken for the other
    pixels = InputPlan(torch.zeros(BATCH, 3, side.height, other), {0: "batch", 2: "height", 3: "width"})
    return Graph("vision", VisionGraph(model).eval(), {"pixels": pixels}, {"image_embeds": _patches(model)})


def fused_graph(model: Blip2) -> Graph:
    """Pixels → prefix of a caption; InputError when a caption's prefix depends on its prompt."""
    if model.question_conditioned and model.config.qformer_reads == "prompt":
        raise InputError(
            "export.fused: expected a model whose Q-Former reads nothing for a caption; this one reads the whole "
            "prompt, so a caption needs the plain graphs: leave export.fused at false"
        )
    embeds = {"image_embeds": _patches(model)} if model.question_conditioned else {}
    inputs = vision_graph(model).inputs
    return Graph(FUSED, FusedGraph(model).eval(), inputs, {"prefix": {0: "batch"}, **embeds})


def _patches(model: Blip2) -> Axes:
    """Varying axes of image_embeds."""
    return {0: "batch", 1: "patches"} if model.vision.other_sides else {0: "batch"}


def _qformer(model: Blip2) -> Graph:
    side = model.preprocess
    with torch.no_grad():
        image_embeds_BNE = model.encode_image(torch.zeros(BATCH, 3, side.height, side.width))
    inputs = {"image_embeds": InputPlan(image_embeds_BNE, _patches(model))}
    if model.question_conditioned:
        ids_BT = torch.ones(BATCH, TOKENS, dtype=torch.long)
        inputs |= {name: InputPlan(ids_BT, {0: "batch", 1: "tokens"}) for name in ("question_ids", "question_mask")}
    return Graph("qformer", QFormerGraph(model).eval(), inputs, {"prefix": {0: "batch"}})


def _embed(model: Blip2) -> Graph:
    ids = InputPlan(torch.ones(BATCH, TOKENS, dtype=torch.long), {0: "batch", 1: "tokens"})
    module = EmbedGraph(model.language_model).eval()
    return Graph("embed", module, {"input_ids": ids}, {"inputs_embeds": {0: "batch", 1: "tokens"}}, looks_up=True)


def _language(model: Blip2) -> Graph:
    past = _cache_inputs("past", _caches(model)[0], PAST, "past")
    inputs = {
        "inputs_embeds": InputPlan(torch.zeros(BATCH, NEW, _width(model)), {0: "batch", 1: "new"}),
        "attention_mask": InputPlan(torch.ones(BATCH, PAST + NEW, dtype=torch.long), {0: "batch", 1: "past + new"}),
        **past,
    }
    present: dict[str, Axes] = {_present(name): {0: "batch", 2: "past + new"} for name in past}
    outputs = {"logits": {0: "batch"}, **present}
    return Graph("language", LanguageGraph(model.language_model).eval(), inputs, outputs, frozenset(present))


def _encoder(model: Blip2) -> Graph:
    embeds = InputPlan(torch.zeros(BATCH, READ, _width(model)), {0: "batch", 1: "read"})
    cross: dict[str, Axes] = {
        name: {0: "batch", 2: "read"} for name in _cache_inputs("cross", _caches(model)[1], READ, "read")
    }
    return Graph(
        "encoder",
        EncoderGraph(model.language_model).eval(),
        {"inputs_embeds": embeds, "attention_mask": _read_mask()},
        {"encoder_hidden": {0: "batch", 1: "read"}, **cross},
    )


def _decoder(model: Blip2) -> Graph:
    own, cross = _caches(model)
    past = _cache_inputs("past", own, PAST, "past")
    masks_past = ignores_hidden_past(model.language_model)
    said_mask = InputPlan(torch.ones(BATCH, PAST + 1, dtype=torch.long), {0: "batch", 1: "past + 1"})
    inputs = {
        "inputs_embeds": InputPlan(torch.zeros(BATCH, 1, _width(model)), {0: "batch"}),  # one token a step, always
        "attention_mask": _read_mask(),
        **({SAID_MASK: said_mask} if masks_past else {}),
        **past,
        **_cache_inputs("cross", cross, READ, "read"),
    }
    present: dict[str, Axes] = {_present(name): {0: "batch", 2: "past + 1"} for name in past}
    module = DecoderGraph(model.language_model, masks_past=masks_past).eval()
    return Graph("decoder", module, inputs, {"logits": {0: "batch"}, **present})


def _width(model: Blip2) -> int:
    return int(model.language_model.get_input_embeddings().embedding_dim)


def _read_mask() -> InputPlan:
    return InputPlan(torch.ones(BATCH, READ, dtype=torch.long), {0: "batch", 1: "read"})


def _present(past: str) -> str:
    return past.replace("past_", "present_", 1)


@torch.no_grad()
def _caches(model: Blip2) -> tuple[DynamicCache, DynamicCache]:
    """Own and cross-attention cache after one position: tells layers, heads and head widths of any family."""
    one_11D = torch.zeros(1, 1, _width(model))
    also = {} if model.style == "decoder-only" else {"decoder_inputs_embeds": one_11D}
    cache = model.language_model(inputs_embeds=one_11D, use_cache=True, **also).past_key_values
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, DynamicCache()


def _cache_inputs(kind: str, cache: DynamicCache, positions: int, axis: str) -> dict[str, InputPlan]:
    """`kind_key_0`, `kind_value_0`, `kind_key_1` … with so many cached positions."""
    plans = {}
    for i, layer in enumerate(cache.layers):
        for part in ("key", "value"):
            seen = getattr(layer, f"{part}s", None)
            if not isinstance(seen, Tensor):
                raise InputError(
                    f"{type(layer).__name__}: expected a language model that caches keys and values in every layer, "
                    f"found another state in layer {i}; choose another language model"
                )
            _, heads, _, head_width = seen.shape
            example = torch.zeros(BATCH, heads, positions, head_width)
            plans[f"{kind}_{part}_{i}"] = InputPlan(example, {0: "batch", 2: axis})
    return plans
