"""The Q-Former: learned queries and text in one BERT-like transformer; every few layers the queries see the image.

Module names follow transformers' `Blip2QFormerModel` (modeling_blip_2.py), so weights move key for key. What
transformers lacks is here: any attention mask (ITC, ITM and ITG differ in nothing else) and an image whose keys
and values are projected once and shared by every row and pass that looks at it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from runtime.errors import InputError
from trainer.config import QFormerConfig


def activation(name: str) -> nn.Module:
    """A non-linearity by transformers' name ("gelu", "gelu_new", "relu" …); InputError for one it does not have."""
    if name not in ACT2FN:
        raise InputError(f"qformer.activation: expected one of {', '.join(sorted(ACT2FN))}, found {name!r}")
    made: nn.Module = ACT2FN[name]
    return made


# Shape letters: B rows, I images, Q queries, T text tokens, L = Q + T, N image tokens, E image width, H width,
# h heads, d width per head
@dataclass(frozen=True)
class ImageKeys:
    """Keys and values of images for every cross-attention layer, each [I, h, N, d]."""

    per_layer: tuple[tuple[Tensor, Tensor], ...]

    def rows(self, index_B: Tensor) -> "ImageKeys":
        """The keys for rows that look at images `index_B` (int64)."""
        return ImageKeys(tuple((k.index_select(0, index_B), v.index_select(0, index_B)) for k, v in self.per_layer))

    def with_more(self, other: "ImageKeys") -> "ImageKeys":
        """These images and then those of `other`."""
        pairs = zip(self.per_layer, other.per_layer, strict=True)
        return ImageKeys(tuple((torch.cat([k, k2]), torch.cat([v, v2])) for (k, v), (k2, v2) in pairs))


class Attention(nn.Module):
    """Multi-head attention over keys and values that are given already projected."""

    def __init__(self, config: QFormerConfig, key_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(key_width, config.width)
        self.value = nn.Linear(key_width, config.width)

    def split(self, states_BLH: Tensor) -> Tensor:
        """[B, L, H] → [B, h, L, d]."""
        return states_BLH.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, states_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `states_BLE`, each [B, h, L, d]."""
        return self.split(self.key(states_BLE)), self.split(self.value(states_BLE))

    def forward(self, states_BLH: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Attend from `states_BLH`; `mask` is True where a position may be seen, broadcastable to [B, h, L, L]."""
        return self.attend(self.split(self.query(states_BLH)), *keys, mask).transpose(1, 2).flatten(-2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Weighted values for queries, keys and values that are split into heads [B, h, L, d]."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class Residual(nn.Module):
    """BERT's output block: dense, dropout, add, LayerNorm."""

    def __init__(self, config: QFormerConfig, inner_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inner: Tensor, residual_BLH: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(inner)) + residual_BLH)


class AttentionBlock(nn.Module):
    """Attention and its output block."""

    def __init__(self, config: QFormerConfig, key_width: int) -> None:
        super().__init__()
        self.attention = Attention(config, key_width)
        self.output = Residual(config, config.width)

    def forward(self, states_BLH: Tensor, keys: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """Attend to `keys`, or to the states themselves when None."""
        keys = self.attention.keys(states_BLH) if keys is None else keys
        return self.output(self.attention(states_BLH, keys, mask), states_BLH)


class Intermediate(nn.Module):
    """First half of a feed-forward network."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.ffn_width)
        self.activation = activation(config.activation)

    def forward(self, states_BLH: Tensor) -> Tensor:
        return self.activation(self.dense(states_BLH))


class Layer(nn.Module):
    """Shared self-attention; for the queries, cross-attention where the layer has it; own FFNs for queries and text."""

    def __init__(self, config: QFormerConfig, image_width: int, sees_image: bool, reads_text: bool) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, config.width)
        self.crossattention = AttentionBlock(config, image_width) if sees_image else None
        self.intermediate = Intermediate(config) if reads_text else None
        self.output = Residual(config, config.ffn_width) if reads_text else None
        self.intermediate_query = Intermediate(config)
        self.output_query = Residual(config, config.ffn_width)

    def forward(
        self, states_BLH: Tensor, queries: int, mask: Tensor | None, image_keys: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The first `queries` positions are queries, the rest is text."""
        states_BLH = self.attention(states_BLH, None, mask)
        parts = []
        if queries:
            query_BQH = states_BLH[:, :queries]
            if self.crossattention is not None:
                query_BQH = self.crossattention(query_BQH, image_keys, None)
            parts.append(self.output_query(self.intermediate_query(query_BQH), query_BQH))
        if self.intermediate is not None and self.output is not None and states_BLH.shape[1] > queries:
            text_BTH = states_BLH[:, queries:]
            parts.append(self.output(self.intermediate(text_BTH), text_BTH))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Encoder(nn.Module):
    """The stack of layers; a module of its own so that key names equal transformers'."""

    def __init__(self, config: QFormerConfig, image_width: int, reads_text: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, image_width, sees_image=i % config.cross_attention_frequency == 0, reads_text=reads_text)
            for i in range(config.layers)
        )

    def layers(self) -> list[Layer]:
        """The layers, typed."""
        return [layer for layer in self.layer if isinstance(layer, Layer)]


class QFormer(nn.Module):
    """Queries and text embeddings in, hidden states out; equal to `Blip2QFormerModel` within 1e-5 in fp32.

    Without `reads_text` there is no text FFN (a published stage-2 model has none) and no text may be given.
    """

    def __init__(self, config: QFormerConfig, image_width: int, *, reads_text: bool = True) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = Encoder(config, image_width, reads_text)

    def image_keys(self, image_embeds_INE: Tensor) -> ImageKeys:
        """Project each image once for all cross-attention layers."""
        blocks = (layer.crossattention for layer in self.encoder.layers())
        return ImageKeys(tuple(block.attention.keys(image_embeds_INE) for block in blocks if block is not None))

    def forward(
        self,
        query_embeds_BQH: Tensor | None,
        text_embeds_BTH: Tensor | None,
        mask: Tensor | None,
        image_keys: ImageKeys | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of queries [B, Q, H] and of text [B, T, H]; either may be absent (then its length is 0).

        `mask` is boolean, True where a row (second last axis) may see a column, broadcastable to [B, h, L, L];
        None lets all see all. `image_keys` holds one image per row and is needed when there are queries.
        """
        given = [part for part in (query_embeds_BQH, text_embeds_BTH) if part is not None]
        states_BLH = self.dropout(self.layernorm(torch.cat(given, dim=1)))
        queries = 0 if query_embeds_BQH is None else query_embeds_BQH.shape[1]
        per_layer = iter(image_keys.per_layer if image_keys is not None else ())
        for layer in self.encoder.layers():
            keys = next(per_layer) if layer.crossattention is not None and queries else None
            states_BLH = layer(states_BLH, queries, mask, keys)
        return states_BLH[:, :queries], states_BLH[:, queries:]


def padding_mask(text_mask_BT: Tensor, queries: int) -> Tensor:
    """ITM and question conditioning: all see all but padding. [B, 1, 1, L], True = may be seen."""
    seen_BL = F.pad(text_mask_BT.bool(), (queries, 0), value=True)
    return seen_BL[:, None, None, :]


def generation_mask(text_mask_BT: Tensor, queries: int) -> Tensor:
    """ITG, the multimodal causal mask (paper figure 2): queries see queries, text sees queries and earlier text."""
    length = queries + text_mask_BT.shape[1]
    may_see_LL = torch.ones(length, length, dtype=torch.bool, device=text_mask_BT.device).tril()
    may_see_LL[:queries, :queries] = True
    return may_see_LL & padding_mask(text_mask_BT, queries)
