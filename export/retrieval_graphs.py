"""What becomes a graph for searching: image features, text features, and the match of one image with one text.

The graphs hold the scores' parts, not the scores: features of a million images are made once and compared by a matrix
product (`runtime.search`), so only what a Q-Former must compute is traced.

Shape letters: B rows, C H W pixels, N image tokens, E image width, Q queries, T text tokens, F contrastive width
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.config import Heads
from export.graphs import BATCH, TOKENS, Graph, InputPlan, fused_graph, graphs_of, vision_graph
from runtime.errors import InputError
from trainer.blip2 import Blip2
from trainer.retrieval import NEEDS

TRAINS_HEADS = ("stage1", "retrieval")
"""Stages that train the retrieval heads with the Q-Former; every later one moves the Q-Former away from them."""


@dataclass(frozen=True)
class GraphSet:
    """The graphs of one bundle; `vision` is in both parts."""

    answering: dict[str, Graph]
    """Empty in a bundle that only searches."""
    searching: dict[str, Graph]
    """Empty in a bundle that only answers."""

    @property
    def all(self) -> dict[str, Graph]:
        """By name, each once."""
        return self.answering | self.searching


def chosen_heads(model: Blip2, wanted: Heads | None, stage: str) -> Heads:
    """What the bundle will do: as the setting says, else what the checkpoint's last stage trained.

    Raises:
        InputError: answering is wanted of a model without a language model, or without a projection into it.
    """
    speaks = model.language_model is not None and "language" in model.bridge.parts
    if wanted is None:
        return "generate" if speaks and stage not in TRAINS_HEADS else "retrieval"
    if wanted != "retrieval" and not speaks:
        raise InputError(
            f"export.heads: expected retrieval, found {wanted}: this checkpoint has no language model to answer with, "
            f"or no projection into it"
        )
    return wanted


def graph_set(model: Blip2, heads: Heads, *, fused: bool = False) -> GraphSet:
    """The graphs that `heads` asks for, and the one for captions where `fused` does.

    Raises:
        CheckpointError: retrieval is asked for and the bridge lacks a head.
        InputError: the language model cannot take an image prefix, or there is nothing to fuse.
    """
    if fused and heads == "retrieval":
        raise InputError("export.fused: expected a bundle that captions, found export.heads retrieval; leave one out")
    answering = {} if heads == "retrieval" else graphs_of(model)
    if fused:
        answering |= {graph.name: graph for graph in (fused_graph(model),)}
    if heads == "generate":
        return GraphSet(answering, {})
    vision = answering.get("vision") or vision_graph(model)
    return GraphSet(answering, {graph.name: graph for graph in (vision, *_retrieval_graphs(model))})


class ImageFeaturesGraph(nn.Module):
    """Queries through the Q-Former into the space shared with texts."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.bridge = model.bridge

    def forward(self, image_embeds_BNE: Tensor) -> tuple[Tensor]:
        """image_features [B, Q, F], each of unit length."""
        keys = self.bridge.image_keys(image_embeds_BNE)
        return (self.bridge.image_features(keys, image_embeds_BNE.shape[0]),)


class TextFeatureGraph(nn.Module):
    """A text alone through the Q-Former into the space shared with images."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.bridge = model.bridge

    def forward(self, text_ids_BT: Tensor, text_mask_BT: Tensor) -> tuple[Tensor]:
        """text_feature [B, F], of unit length."""
        return (self.bridge.text_features(text_ids_BT, text_mask_BT),)


class MatchGraph(nn.Module):
    """One image and one text a row, seen together."""

    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.bridge = model.bridge

    def forward(self, image_embeds_BNE: Tensor, text_ids_BT: Tensor, text_mask_BT: Tensor) -> tuple[Tensor]:
        """match_logits [B, 2]: no match, match; mean over the queries."""
        keys = self.bridge.image_keys(image_embeds_BNE)
        return (self.bridge.matching_logits(keys, text_ids_BT, text_mask_BT),)


def _retrieval_graphs(model: Blip2) -> tuple[Graph, Graph, Graph]:
    model.bridge.need(*NEEDS)
    side = model.preprocess
    with torch.no_grad():
        image_embeds_BNE = model.encode_image(torch.zeros(BATCH, 3, side.height, side.width))
    image = {"image_embeds": InputPlan(image_embeds_BNE, {0: "batch"})}
    ids_BT = torch.ones(BATCH, TOKENS, dtype=torch.long)
    text = {name: InputPlan(ids_BT, {0: "batch", 1: "tokens"}) for name in ("text_ids", "text_mask")}
    return (
        Graph("itc_image", ImageFeaturesGraph(model).eval(), image, {"image_features": {0: "batch"}}),
        Graph("itc_text", TextFeatureGraph(model).eval(), text, {"text_feature": {0: "batch"}}),
        Graph("itm", MatchGraph(model).eval(), image | text, {"match_logits": {0: "batch"}}),
    )
