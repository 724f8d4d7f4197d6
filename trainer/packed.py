"""The Q-Former over rows of different length laid end to end: padding is not computed, images are not repeated.

Training only. Every token goes through the dense layers once, whatever its row; rows exist for attention alone. A
caption of 13 tokens beside one of 25 costs 13, and rows that look at the same image share its keys and values without
a copy of them. Results are those of `QFormer.forward` on padded rows, within rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.qformer import Attention, ImageKeys, Layer, QFormer, generation_mask, padding_mask


# Shape letters: R rows, Q queries, T text tokens of the longest row, L = Q + T, M text tokens that are no padding,
# P query tokens (R * Q), S = P + M, H width, h heads, d width per head, I images, N image tokens, E image width
@dataclass(frozen=True)
class Packing:
    """Where the tokens of rows lie when all queries are laid end to end, and after them all text."""

    places_RL: Tensor
    """For each position of the padded rows its place among the S tokens; padding names token 0, and is masked."""
    kept_S: Tensor
    """For each of the S tokens its place among the R * L positions."""
    text_M: Tensor
    """For each text token its place among the R * T positions of the padded text."""
    mask: Tensor
    """True where a position may be seen, broadcastable to [R, h, L, L]."""


def pack(text_mask_RT: Tensor, queries: int, mask: Tensor) -> Packing:
    """Lay rows out; `text_mask_RT` is 1 where a token stands, `mask` is over the padded rows."""
    valid_RT = text_mask_RT.bool()
    rows, longest = valid_RT.shape
    text_M = valid_RT.flatten().nonzero().squeeze(1)
    device, length = text_M.device, queries + longest
    first_R = torch.arange(rows, device=device) * length
    query_places = torch.arange(rows * queries, device=device).view(rows, queries)
    text_places = (rows * queries - 1 + valid_RT.flatten().cumsum(0)).view_as(valid_RT) * valid_RT
    kept_query = (first_R[:, None] + torch.arange(queries, device=device)).flatten()
    kept_text = first_R[text_M // longest] + queries + text_M % longest
    places_RL = torch.cat([query_places, text_places], dim=1)
    return Packing(places_RL, torch.cat([kept_query, kept_text]), text_M, mask)


def matching_packing(text_mask_RT: Tensor, queries: int) -> Packing:
    """ITM: queries and text see each other."""
    return pack(text_mask_RT, queries, padding_mask(text_mask_RT, queries))


def first_pass_packing(mask_BT: Tensor, queries: int, *, generation: bool, contrast: bool) -> Packing:
    """ITC and ITG in one pass, each text up to twice beside its queries: to be said, then to be compared.

    Queries see queries; the text to be said sees queries and what stands before it; the text to be compared sees
    itself alone. So both texts and the queries are what separate passes would make them.
    """
    texts = generation + contrast
    text_mask = mask_BT.repeat(1, texts)
    said = queries + generation * mask_BT.shape[1]
    length = queries + text_mask.shape[1]
    may_see_LL = torch.zeros(length, length, dtype=torch.bool, device=mask_BT.device)
    may_see_LL[said:, said:] = True
    mask = may_see_LL & padding_mask(text_mask, queries)
    mask[:, :, :said, :said] = generation_mask(mask_BT[:, : said - queries], queries)
    return pack(text_mask, queries, mask)


def said_and_compared(mask_BT: Tensor, packing: Packing, *, generation: bool, contrast: bool) -> tuple[Tensor, Tensor]:
    """Which of the M text tokens of a first pass speak of a next one, and which begin a text to be compared."""
    speaks_BT = F.pad(mask_BT[:, 1:], (0, 1))  # the last token speaks of none
    begins_BT = torch.zeros_like(mask_BT)
    begins_BT[:, 0] = 1
    none_BT = torch.zeros_like(mask_BT)
    speaks = torch.cat([speaks_BT] * generation + [none_BT] * contrast, dim=1)
    begins = torch.cat([none_BT] * generation + [begins_BT] * contrast, dim=1)
    return speaks.flatten()[packing.text_M].bool(), begins.flatten()[packing.text_M].bool()


@dataclass(frozen=True)
class Lookers:
    """Consecutive rows that look at the same images, an equal number of neighbours at each."""

    keys: ImageKeys
    rows: int


def packed_pass(
    qformer: QFormer,
    query_tokens_1QH: Tensor,
    text_embeds_MH: Tensor,
    packing: Packing,
    lookers: Sequence[Lookers],
    *,
    text_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Hidden states of queries [R, Q, H] and of text [M, H], which is empty (and saved) when it is not wanted."""
    rows, queries = packing.places_RL.shape[0], query_tokens_1QH.shape[1]
    query_PH = query_tokens_1QH.expand(rows, -1, -1).flatten(0, 1)
    states_SH = qformer.dropout(qformer.layernorm(torch.cat([query_PH, text_embeds_MH])))
    layers = qformer.encoder.layers()
    sees_image = [number for number, layer in enumerate(layers) if layer.crossattention is not None]
    place = {number: at for at, number in enumerate(sees_image)}
    for number, layer in enumerate(layers):
        keys = [(group.keys.per_layer[place[number]], group.rows) for group in lookers] if number in place else []
        with_text = text_wanted or number + 1 < len(layers)
        states_SH = _layer(layer, states_SH, packing, rows * queries, queries, keys, with_text)
    return states_SH[: rows * queries].view(rows, queries, -1), states_SH[rows * queries :]


def _layer(
    layer: Layer,
    states_SH: Tensor,
    packing: Packing,
    query_tokens: int,
    queries: int,
    keys: Sequence[tuple[tuple[Tensor, Tensor], int]],
    with_text: bool,
) -> Tensor:
    block = layer.attention
    states_SH = block.output(_self_attention(block.attention, states_SH, packing), states_SH)
    query_PH, text_MH = states_SH.split([query_tokens, len(states_SH) - query_tokens])
    if layer.crossattention is not None:
        seen_PH = _image_attention(layer.crossattention.attention, query_PH, queries, keys)
        query_PH = layer.crossattention.output(seen_PH, query_PH)
    query_PH = layer.output_query(layer.intermediate_query(query_PH), query_PH)
    if not with_text or layer.intermediate is None or layer.output is None:
        return query_PH
    return torch.cat([query_PH, layer.output(layer.intermediate(text_MH), text_MH)])


def _self_attention(attention: Attention, states_SH: Tensor, packing: Packing) -> Tensor:
    """Attention within each row: padded for the product alone."""
    linear = (attention.query, attention.key, attention.value)
    weight, bias = torch.cat([part.weight for part in linear]), torch.cat([part.bias for part in linear])
    rows, length = packing.places_RL.shape
    together_RL = F.linear(states_SH, weight, bias).index_select(0, packing.places_RL.flatten())
    query, key, value = together_RL.view(rows, length, 3, attention.heads, -1).transpose(1, 3).unbind(2)
    seen_RhLd = attention.attend(query, key, value, packing.mask)
    return seen_RhLd.transpose(1, 2).reshape(rows * length, -1).index_select(0, packing.kept_S)


def _image_attention(
    attention: Attention, query_PH: Tensor, queries: int, keys: Sequence[tuple[tuple[Tensor, Tensor], int]]
) -> Tensor:
    """Attention to images: all queries of an image's neighbours stand in one row before its keys."""
    groups = attention.query(query_PH).split([rows * queries for _, rows in keys])
    seen = []
    for group, ((key, value), _) in zip(groups, keys, strict=True):
        query_IhPd = attention.split(group.view(key.shape[0], -1, group.shape[-1]))
        seen.append(attention.attend(query_IhPd, key, value, None).transpose(1, 2).flatten(0, 1).flatten(1))
    return torch.cat(seen)


def keys_of_features(qformer: QFormer, norm: nn.LayerNorm, features_INE: Tensor) -> ImageKeys:
    """`qformer.image_keys(norm(features))` in one product, with the norm's scale and shift folded into its matrix.

    A product with frozen features on one side has no gradient to hand back to them, and the norm's own gradient
    follows from that of the folded matrix: a third of the projections' cost is saved in training.
    """
    attentions = [layer.crossattention.attention for layer in qformer.encoder.layers() if layer.crossattention]
    linear = [part for attention in attentions for part in (attention.key, attention.value)]
    weight, bias = torch.cat([part.weight for part in linear]), torch.cat([part.bias for part in linear])
    normal_INE = F.layer_norm(features_INE, norm.normalized_shape, None, None, norm.eps)
    together = F.linear(normal_INE, weight * norm.weight, bias + weight @ norm.bias)
    heads = attentions[0].heads
    parts = [part.transpose(1, 2) for part in together.unflatten(-1, (len(linear), heads, -1)).unbind(2)]
    return ImageKeys(tuple(zip(parts[::2], parts[1::2], strict=True)))
