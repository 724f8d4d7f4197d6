"""Small halves with random weights, in the shapes of published ones: CLIP towers, OPT and T5 language models."""

import math

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5Attention

INITIAL_EMBEDDING = 0.1
"""Size at which token and position embeddings of a new language model start."""
FARTHEST_FALL = 6.0
"""How much less than its favourite place a head of the T5-shaped model attends to any other at first (nats)."""
T5_ADDED = 0.3
"""What is left of the size at which T5's layers start to add to the residual stream: that of the OPT-shaped model."""


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
    """Position biases [buckets, heads]: of four heads the second looks a word back, the third of an encoder a word on.

    They fall with the distance from that neighbour (ALiBi, arXiv 2108.12409), and no further than what a head can
    learn to overcome; all layers share them. The first head of an encoder looks at what was said before, so that a
    word finds where it stood and not itself; the fourth looks everywhere.
    """
    farthest = attention.relative_attention_max_distance
    offsets = torch.arange(-farthest, 1 if attention.is_decoder else farthest + 1)
    buckets = attention._relative_position_bucket(
        offsets, not attention.is_decoder, attention.relative_attention_num_buckets, farthest
    )
    biases = torch.zeros(attention.relative_attention_num_buckets, attention.n_heads)
    for first, neighbour in ((1, -1),) if attention.is_decoder else ((1, -1), (2, 1)):
        fall = -(2.0 * (offsets - neighbour).abs()).clamp(max=FARTHEST_FALL)
        biases[buckets, first::4] = fall[:, None]
    if not attention.is_decoder:
        biases[buckets, 0::4] = -FARTHEST_FALL * (offsets >= -1).float()[:, None]
    return biases


def _sinusoids(positions: int, width: int) -> Tensor:
    """Sines, then cosines, of wavelengths from 2 pi to 20,000 pi positions: [positions, width]."""
    angles = torch.arange(positions)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
