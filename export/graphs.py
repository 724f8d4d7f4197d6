"""What becomes a graph: four thin modules around the trained model, and the one table of their names and sizes.

The wrappers rewrite nothing. They put the parts together as the runtime calls them and flatten the KV cache into named
tensors, because transformers' cache objects do not survive tracing. One language graph serves prefill (past = 0) and
every further step.

Shape letters: B batch, C H W pixels, N image tokens, E image width, Q queries, D language width, T question or prompt
tokens, S new positions, P cached positions, h heads, d head width, V vocabulary
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from runtime.errors import InputError
from trainer.blip2 import Blip2

Arrays = dict[str, npt.NDArray[Any]]
BATCH, PAST, NEW, TOKENS = 2, 5, 3, 7
"""Sizes of the traced example: at least 2 and all different, because the exporter freezes 0 and 1 and merges equals."""


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


class EmbedGraph(nn.Module):
    """The language model's own token embedding."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.embedding = model.language_model.get_input_embeddings()

    def forward(self, input_ids_BT: Tensor) -> tuple[Tensor]:
        """inputs_embeds [B, T, D]."""
        return (self.embedding(input_ids_BT),)


class LanguageGraph(nn.Module):
    """A decoder-only language model with its cache as plain tensors, key and value of each layer in turn.

    Positions count the 1s of the mask, so rows padded on the left count like rows without padding.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        parameters = inspect.signature(language_model.forward).parameters
        self.takes_positions = "position_ids" in parameters  # models that do not take them derive them from the mask
        if "inputs_embeds" not in parameters:
            raise InputError(
                f"{type(language_model).__name__} takes no `inputs_embeds`, so no image prefix can be put before its "
                f"text; choose another language model"
            )

    def forward(self, embeds_BSD: Tensor, mask_BL: Tensor, *past_BhPd: Tensor) -> tuple[Tensor, ...]:
        """Logits after the last position [B, V], then present keys and values [B, h, L, d]; L = P + S."""
        cache = DynamicCache(config=self.language_model.config)
        for layer, (keys, values) in enumerate(zip(past_BhPd[::2], past_BhPd[1::2], strict=True)):
            cache.update(keys, values, layer)
        extra = {}
        if self.takes_positions:
            extra["position_ids"] = (mask_BL.cumsum(-1) - 1).clamp(min=0)[:, past_BhPd[0].shape[2] :]
        result = self.language_model(
            inputs_embeds=embeds_BSD,
            attention_mask=mask_BL,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **extra,
        )
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits[:, -1], *present)


def graphs_of(model: Blip2) -> dict[str, Graph]:
    """The graphs of a bundle, in the order the runtime runs them.

    Raises:
        InputError: the language model cannot take an image prefix.
    """
    graphs = (vision_graph(model), _qformer(model), _embed(model), _language(model))
    return {graph.name: graph for graph in graphs}


def vision_graph(model: Blip2) -> Graph:
    """Pixels → image_embeds; what every bundle begins with."""
    side = model.preprocess
    pixels = InputPlan(torch.zeros(BATCH, 3, side.height, side.width), {0: "batch"})
    return Graph("vision", VisionGraph(model).eval(), {"pixels": pixels}, {"image_embeds": {0: "batch"}})


def _qformer(model: Blip2) -> Graph:
    side = model.preprocess
    with torch.no_grad():
        image_embeds_BNE = model.encode_image(torch.zeros(BATCH, 3, side.height, side.width))
    inputs = {"image_embeds": InputPlan(image_embeds_BNE, {0: "batch"})}
    if model.question_conditioned:
        ids_BT = torch.ones(BATCH, TOKENS, dtype=torch.long)
        inputs |= {name: InputPlan(ids_BT, {0: "batch", 1: "tokens"}) for name in ("question_ids", "question_mask")}
    return Graph("qformer", QFormerGraph(model).eval(), inputs, {"prefix": {0: "batch"}})


def _embed(model: Blip2) -> Graph:
    ids = InputPlan(torch.ones(BATCH, TOKENS, dtype=torch.long), {0: "batch", 1: "tokens"})
    return Graph("embed", EmbedGraph(model).eval(), {"input_ids": ids}, {"inputs_embeds": {0: "batch", 1: "tokens"}})


def _language(model: Blip2) -> Graph:
    module = LanguageGraph(model.language_model).eval()
    width = model.language_model.get_input_embeddings().embedding_dim
    with torch.no_grad():  # one short run tells layers, heads and head width of any family
        cache = model.language_model(inputs_embeds=torch.zeros(1, 1, width), use_cache=True).past_key_values
    embeds = InputPlan(torch.zeros(BATCH, NEW, width), {0: "batch", 1: "new"})
    mask = InputPlan(torch.ones(BATCH, PAST + NEW, dtype=torch.long), {0: "batch", 1: "past + new"})
    inputs: dict[str, InputPlan] = {"inputs_embeds": embeds, "attention_mask": mask}
    outputs: dict[str, Axes] = {"logits": {0: "batch"}}
    for i, layer in enumerate(cache.layers):
        for kind, seen in (("key", layer.keys), ("value", layer.values)):
            _, heads, _, head_width = seen.shape
            inputs[f"past_{kind}_{i}"] = InputPlan(torch.zeros(BATCH, heads, PAST, head_width), {0: "batch", 2: "past"})
            outputs[f"present_{kind}_{i}"] = {0: "batch", 2: "past + new"}
    return Graph("language", module, inputs, outputs)
