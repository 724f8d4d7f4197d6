"""Stage 1 as LAVIS takes it, written for comparison: the same weights, losses and settings, another order of work.

What makes it LAVIS' (salesforce/LAVIS 506965b, blip2_qformer.py and Qformer.py): four separate passes, queries (A),
text (B), matching (C), generation (D) over the cached keys of A; text padded to its limit; the image's keys and values
projected in A and again for each of the three rows of C, whose image features are copied; attention written out as
products and softmax; one multinomial draw and one host synchronisation for each negative.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.bridge import Bridge
from trainer.losses import IGNORED
from trainer.qformer import AttentionBlock

MASKED = -10_000.0
SMOOTHING = 0.1

# Shape letters: B pairs, N image tokens, E image width, Q queries, T text tokens, L positions, K keys, H width,
# C contrastive width
Cache = tuple[Tensor, Tensor]
Chooser = Callable[[Tensor, Tensor], tuple[list[int], list[int]]]
"""From weights [B images, B texts] and [B texts, B images]: a wrong text per image, a wrong image per text."""


@dataclass(frozen=True)
class Losses:
    """The three losses of a step."""

    itc: Tensor
    itm: Tensor
    itg: Tensor


def choose_one_by_one(image_to_text_BB: Tensor, text_to_image_BB: Tensor) -> tuple[list[int], list[int]]:
    """LAVIS' draw: a loop over rows."""
    texts = [int(torch.multinomial(row, 1).item()) for row in image_to_text_BB]
    images = [int(torch.multinomial(row, 1).item()) for row in text_to_image_BB]
    return texts, images


def lavis_losses(
    bridge: Bridge, features_BNE: Tensor, ids_BT: Tensor, mask_BT: Tensor, start: int, choose: Chooser
) -> Losses:
    """ITC, ITM and ITG of B pairs of different images; `start` is [DEC]."""
    rows, queries = len(ids_BT), bridge.config.queries
    image_embeds_BNE = bridge.post_layernorm(features_BNE)
    query_tokens = bridge.query_tokens.expand(rows, -1, -1)
    ones_BQ = mask_BT.new_ones(rows, queries)

    query_BQH, caches = _encode(bridge, query_tokens, None, _visible(ones_BQ), image_embeds_BNE, None)
    assert bridge.vision_projection is not None and bridge.text_projection is not None
    image_BQC = F.normalize(bridge.vision_projection(query_BQH), dim=-1)
    text_BLH, _ = _encode(bridge, None, ids_BT, _visible(mask_BT), None, None)
    text_BC = F.normalize(bridge.text_projection(text_BLH[:, 0]), dim=-1)
    image_to_text = torch.matmul(image_BQC.unsqueeze(1), text_BC.unsqueeze(-1)).squeeze(-1).amax(-1)
    image_to_text = bridge.over_temperature(image_to_text)
    text_to_image = torch.matmul(text_BC.unsqueeze(1).unsqueeze(1), image_BQC.permute(0, 2, 1)).squeeze(2).amax(-1)
    text_to_image = bridge.over_temperature(text_to_image)
    own = torch.arange(rows)
    itc = F.cross_entropy(image_to_text, own, label_smoothing=SMOOTHING)
    itc = (itc + F.cross_entropy(text_to_image, own, label_smoothing=SMOOTHING)) / 2

    with torch.no_grad():
        for_images, for_texts = image_to_text.clone(), text_to_image.clone()
        for_images.fill_diagonal_(MASKED)
        for_texts.fill_diagonal_(MASKED)
        wrong_texts, wrong_images = choose(F.softmax(for_images, dim=1), F.softmax(for_texts, dim=1))
    image_neg = torch.stack([image_embeds_BNE[place] for place in wrong_images])
    ids_neg = torch.stack([ids_BT[place] for place in wrong_texts])
    mask_neg = torch.stack([mask_BT[place] for place in wrong_texts])
    ids_all, mask_all = torch.cat([ids_BT, ids_BT, ids_neg]), torch.cat([mask_BT, mask_BT, mask_neg])
    images_all = torch.cat([image_embeds_BNE, image_neg, image_embeds_BNE])
    seen = _visible(torch.cat([mask_BT.new_ones(3 * rows, queries), mask_all], dim=1))
    joint, _ = _encode(bridge, bridge.query_tokens.expand(3 * rows, -1, -1), ids_all, seen, images_all, None)
    assert bridge.itm_head is not None
    logits = bridge.itm_head(joint[:, :queries]).mean(dim=1)
    labels = torch.cat([torch.ones(rows, dtype=torch.long), torch.zeros(2 * rows, dtype=torch.long)])
    itm = F.cross_entropy(logits, labels)

    said = ids_BT.clone()
    said[:, 0] = start
    causal = torch.ones(said.shape[1], said.shape[1]).tril()
    causal = torch.cat([torch.ones(said.shape[1], queries), causal], dim=1)
    whole_BK = torch.cat([ones_BQ, mask_BT], dim=1)
    mask = (1.0 - causal[None, None] * whole_BK[:, None, None, :]) * MASKED
    text_BTH, _ = _encode(bridge, None, said, mask, None, caches)
    assert bridge.itg_head is not None and bridge.embeddings is not None
    predicted = bridge.itg_head(text_BTH, bridge.embeddings.word_embeddings.weight)
    targets = said.masked_fill(mask_BT == 0, IGNORED)
    itg = F.cross_entropy(
        predicted[:, :-1].reshape(-1, predicted.shape[-1]), targets[:, 1:].reshape(-1), label_smoothing=SMOOTHING
    )
    return Losses(itc, itm, itg)


def _visible(mask_BK: Tensor) -> Tensor:
    """1 and 0 as what is added to scores [B, 1, 1, K]."""
    return (1.0 - mask_BK[:, None, None, :].float()) * MASKED


def _encode(
    bridge: Bridge,
    query_BQH: Tensor | None,
    ids_BT: Tensor | None,
    mask: Tensor,
    image_embeds_BNE: Tensor | None,
    caches: list[Cache] | None,
) -> tuple[Tensor, list[Cache]]:
    """One pass over [queries; text]; `caches` are keys and values to look at beside one's own, per layer."""
    parts = [] if query_BQH is None else [query_BQH]
    if ids_BT is not None:
        assert bridge.embeddings is not None
        parts.append(bridge.embeddings(ids_BT))
    qformer, queries = bridge.qformer, 0 if query_BQH is None else query_BQH.shape[1]
    states = qformer.dropout(qformer.layernorm(torch.cat(parts, dim=1)))
    made = []
    for number, layer in enumerate(qformer.encoder.layers()):
        states, own = _attend(layer.attention, states, states, mask, None if caches is None else caches[number])
        made.append(own)
        out = []
        if queries:
            query = states[:, :queries]
            if layer.crossattention is not None:
                assert image_embeds_BNE is not None
                query, _ = _attend(layer.crossattention, query, image_embeds_BNE, None, None)
            out.append(layer.output_query(layer.intermediate_query(query), query))
        if states.shape[1] > queries:
            assert layer.intermediate is not None and layer.output is not None
            text = states[:, queries:]
            out.append(layer.output(layer.intermediate(text), text))
        states = torch.cat(out, dim=1)
    return states, made


def _attend(
    block: AttentionBlock, states_BLH: Tensor, source_BKE: Tensor, mask: Tensor | None, before: Cache | None
) -> tuple[Tensor, Cache]:
    """Attention written out, and its output block."""
    attention = block.attention
    query = attention.split(attention.query(states_BLH))
    key, value = attention.split(attention.key(source_BKE)), attention.split(attention.value(source_BKE))
    if before is not None:
        key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), attention.dropout, attention.training)
    seen = torch.matmul(weights, value).permute(0, 2, 1, 3).flatten(2)
    return block.output(seen, states_BLH), (key, value)
