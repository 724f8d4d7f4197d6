"""The language model as modules to trace: its token embedding, and either one decoder, or an encoder and a decoder.

The wrappers rewrite nothing. They flatten the KV cache into named tensors, because transformers' cache objects do not
survive tracing.

Shape letters: B batch, D language width, T prompt tokens, S new positions, P cached positions, L = P + S, R positions
the encoder read, h heads, d head width, V vocabulary
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from trainer.language import takes

SAME = 1e-3
"""Logits that differ by no more of their standard deviation are the same, rounded elsewhere."""


class EmbedGraph(nn.Module):
    """The language model's own token embedding."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.embedding = language_model.get_input_embeddings()

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
        # A family that takes no positions derives them from the mask itself.
        self.takes_positions = takes(language_model, "position_ids")
        self.fewer_logits = {"logits_to_keep": 1} if takes(language_model, "logits_to_keep") else {}

    def forward(self, embeds_BSD: Tensor, mask_BL: Tensor, *past_BhPd: Tensor) -> tuple[Tensor, ...]:
        """Logits after the last position [B, V], then present keys and values [B, h, L, d]."""
        cache = _filled(past_BhPd)
        extra = {}
        if self.takes_positions:
            # maximum, not clamp(min=0): OpenVINO 2025 reads a Clip of integers without an upper bound as "all are 0".
            counted_BL = torch.maximum(mask_BL.cumsum(-1) - 1, torch.zeros_like(mask_BL))
            extra["position_ids"] = counted_BL[:, past_BhPd[0].shape[2] :]
        result = self.language_model(
            inputs_embeds=embeds_BSD,
            attention_mask=mask_BL,
            past_key_values=cache,
            use_cache=True,
            **self.fewer_logits,
            **extra,
        )
        return (result.logits[:, -1], *_tensors(result.past_key_values))


class EncoderGraph(nn.Module):
    """The encoder, and the keys and values that every cross-attention layer of the decoder makes of what it read."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.encoder, self.decoder = language_model.get_encoder(), language_model.get_decoder()

    def forward(self, embeds_BRD: Tensor, mask_BR: Tensor) -> tuple[Tensor, ...]:
        """encoder_hidden [B, R, D], then cross-attention keys and values [B, h, R, d]."""
        hidden_BRD = self.encoder(inputs_embeds=embeds_BRD, attention_mask=mask_BR).last_hidden_state
        # One position is decoded for the sake of the cache that it fills; tracing drops all else it computes.
        first = self.decoder(
            inputs_embeds=embeds_BRD[:, :1],
            encoder_hidden_states=hidden_BRD,
            encoder_attention_mask=mask_BR,
            use_cache=True,
        )
        return (hidden_BRD, *_tensors(first.past_key_values.cross_attention_cache))


class DecoderGraph(nn.Module):
    """One step of an encoder-decoder's decoder; its own cache grows, the cross-attention's stays."""

    def __init__(self, language_model: PreTrainedModel, *, masks_past: bool) -> None:
        """`masks_past`: it is told which cached positions hold something; only where `ignores_hidden_past` is true."""
        super().__init__()
        self.language_model, self.masks_past = language_model, masks_past

    def forward(self, embeds_B1D: Tensor, mask_BR: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, V], then present keys and values [B, h, P + 1, d].

        `rest` holds the mask of what was said [B, P + 1] where it has one, the decoder's own past [B, h, P, d] and then
        the cross-attention's tensors [B, h, R, d].
        """
        mask_BL, cached = (rest[0], rest[1:]) if self.masks_past else (None, rest)
        half = len(cached) // 2
        result = self.language_model(
            # Keys and values of what was read are cached, so of the encoder's output only the length is looked at.
            encoder_outputs=BaseModelOutput(last_hidden_state=mask_BR[:, :, None].to(embeds_B1D.dtype)),
            attention_mask=mask_BR,
            decoder_attention_mask=mask_BL,
            decoder_inputs_embeds=embeds_B1D,
            past_key_values=EncoderDecoderCache(_filled(cached[:half]), _filled(cached[half:])),
            use_cache=True,
        )
        return (result.logits[:, -1], *_tensors(result.past_key_values.self_attention_cache))


@torch.no_grad()
def ignores_hidden_past(language_model: PreTrainedModel) -> bool:
    """Whether an encoder-decoder says the same behind positions that are hidden from it.

    It does where positions are told by their distance (T5), and not where they are counted from the beginning of the
    cache (BART): rows that have said more and less than each other can share a batch in the first kind alone.
    """
    width = language_model.get_input_embeddings().embedding_dim
    draw, like = torch.Generator().manual_seed(0), next(language_model.parameters())
    read_1RD, said_1SD = (torch.randn(1, length, width, generator=draw).to(like) for length in (4, 3))
    hidden = 2
    behind_1SD = torch.cat([torch.zeros_like(said_1SD[:, :hidden]), said_1SD], dim=1)
    mask_1S = torch.tensor([[0] * hidden + [1] * said_1SD.shape[1]], device=like.device)

    def logits(embeds_1SD: Tensor, mask_1S: Tensor | None) -> Tensor:
        read = BaseModelOutput(last_hidden_state=read_1RD)
        given = {"decoder_inputs_embeds": embeds_1SD, "decoder_attention_mask": mask_1S}
        said: Tensor = language_model(encoder_outputs=read, **given).logits[:, -1].float()
        return said

    alone, behind = logits(said_1SD, None), logits(behind_1SD, mask_1S)
    return bool((alone - behind).abs().max() <= SAME * alone.std())


def _filled(tensors: tuple[Tensor, ...]) -> DynamicCache:
    """A cache of whole layers, also where a family would keep only a window: its mask still hides what is older."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache


def _tensors(cache: DynamicCache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
