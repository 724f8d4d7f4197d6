"""Decoders whose cache has a fixed size and is written in place: what a GPU engine runs fastest.

The portable graphs hand a longer cache back at every step, so that every step copies it. Here a cache has all its
positions from the start, `TensorScatter` writes the new ones where they belong, and `Attention` looks at all of them
through a mask: TensorRT turns the pair into its own cache layer, whose output lies in its input's memory. Both
operators exist from opset 24 on, and TensorRT has `Attention` in FP16 and BF16 alone (reference/export.md §1.5), so
these graphs are traced in that type and lie beside the portable ones.

Any family of transformers that asks its cache to add keys and values, and transformers' table of attention functions
to attend, is traced by two replacements: a cache that writes by `TensorScatter`, and an attention that is `Attention`.
Key-value heads stay as few as the family has.

Shape letters: B batch, D language width, S new positions, L cache positions (fixed), R positions the encoder read,
h heads, d head width, V vocabulary
"""

import copy
import re
from collections import Counter
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutput

from export.graphs import BATCH, NEW, READ, Axes, Graph, InputPlan
from runtime.errors import InputError
from runtime.manifest import Limits
from runtime.precision import LanguagePrecision
from runtime.speaker import STATIC
from trainer.blip2 import Blip2
from trainer.language import takes

OPSET = 24
"""The first with both operators."""
ATTENTION = "onnx_attention"
"""Name of our attention in transformers' table."""
FEWEST_HEADS = 4
"""TensorRT-RTX 1.7.1 has an attention kernel for one row and one position from four heads on (measured)."""
TYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ScatteredLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """One layer's cache [B, h, L, d], written at `indices` [B]."""

    def __init__(self, keys_BhLd: Tensor, values_BhLd: Tensor, indices_B: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.indices_B = keys_BhLd, values_BhLd, indices_B
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The whole cache with the new positions in it."""
        self.keys = _scattered(self.keys, key_states, self.indices_B)
        self.values = _scattered(self.values, value_states, self.indices_B)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All positions, from the first."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        """Positions written before this step, as a tensor: what a family counts its own positions from."""
        return self.indices_B[0]

    def get_max_length(self) -> int:
        """L."""
        return self.keys.shape[2]


class StaticLanguageGraph(nn.Module):
    """A decoder-only language model over a cache of fixed size; prompts are padded on the left, as everywhere."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model
        self.fewer_logits = {"logits_to_keep": 1} if takes(language_model, "logits_to_keep") else {}

    def forward(self, embeds_BSD: Tensor, mask_BL: Tensor, indices_B: Tensor, *past_BhLd: Tensor) -> tuple[Tensor, ...]:
        """Logits after the last position [B, V] in fp32, then all caches with S positions more.

        `mask_BL` is 1 for every position that holds something to see, the new ones among them. A new position sees
        itself even where it is padding, because a row that sees nothing is NaN.
        """
        places_L = torch.arange(past_BhLd[0].shape[2])
        own_BS = indices_B[:, None] + torch.arange(embeds_BSD.shape[1])
        earlier_BSL = (places_L <= own_BS[:, :, None]) & mask_BL.bool()[:, None]
        seen_BSL = earlier_BSL | (places_L == own_BS[:, :, None])
        cache = _cache(past_BhLd, indices_B)
        result = self.language_model(
            inputs_embeds=embeds_BSD.to(self.language_model.dtype),
            attention_mask=seen_BSL[:, None],
            position_ids=(mask_BL.cumsum(-1) - 1).clamp(min=0).gather(1, own_BS),
            past_key_values=cache,
            use_cache=True,
            **self.fewer_logits,
        )
        return (result.logits[:, -1].float(), *_tensors(cache))


class StaticDecoderGraph(nn.Module):
    """One step of an encoder-decoder's decoder; all rows are at one step, which is all that relative positions know."""

    def __init__(self, language_model: PreTrainedModel) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, embeds_B1D: Tensor, mask_BR: Tensor, index_1: Tensor, *cached: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, V] in fp32, then the decoder's own caches with one position more.

        `cached` holds the decoder's own tensors [B, h, L, d] and then the cross-attention's [B, h, R, d].
        """
        batch, half = embeds_B1D.shape[0], len(cached) // 2
        cache, cross = _cache(cached[:half], index_1.expand(batch)), DynamicCache()
        for layer, (keys, values) in enumerate(zip(cached[half::2], cached[half + 1 :: 2], strict=True)):
            cross.update(keys, values, layer)
        places_L = torch.arange(cached[0].shape[2])
        result = self.language_model(
            encoder_outputs=BaseModelOutput(last_hidden_state=mask_BR[:, :, None].to(self.language_model.dtype)),
            attention_mask=mask_BR.bool()[:, None, None],
            decoder_attention_mask=(places_L <= index_1)[None, None, None].expand(batch, 1, 1, -1),
            decoder_inputs_embeds=embeds_B1D.to(self.language_model.dtype),
            past_key_values=EncoderDecoderCache(cache, cross),
            use_cache=True,
        )
        return (result.logits[:, -1].float(), *_tensors(cache))


def static_graph(model: Blip2, portable: Graph, held_in: LanguagePrecision, limits: Limits) -> Graph:
    """`language_static` beside `language`, or `decoder_static` beside `decoder`, computing and caching in `held_in`.

    Args:
        model: Its language model is copied, weight by weight, into the type.
        portable: The graph with the growing cache; tells layers, heads and widths.
        held_in: Type of weights and caches; logits and embeddings are fp32.
        limits: How many positions the cache gets.

    Raises:
        InputError: a family whose attention this form cannot say, or another type than fp16 and bf16.
    """
    if held_in not in TYPES:
        raise InputError(f"export.static_cache: expected language_precision fp16 or bf16, found {held_in}")
    dtype, decoder_only = TYPES[held_in], model.style == "decoder-only"
    positions = limits.max_positions if decoder_only else limits.max_new_tokens
    past: dict[str, InputPlan] = {}
    for name, plan in portable.inputs.items():
        if name.startswith("past_"):
            _, heads, _, width = plan.example.shape
            past[name] = InputPlan(torch.zeros(BATCH, heads, positions, width, dtype=dtype), {0: "batch"})
    _require_sayable(model.language_model, positions, {plan.example.shape[-1] for plan in past.values()}, decoder_only)
    language_model = _converted(model.language_model, dtype)
    width = portable.inputs["inputs_embeds"].example.shape[-1]
    if decoder_only:
        module: nn.Module = StaticLanguageGraph(language_model)
        inputs = {
            "inputs_embeds": InputPlan(torch.zeros(BATCH, NEW, width), {0: "batch", 1: "new"}),
            "attention_mask": InputPlan(torch.ones(BATCH, positions, dtype=torch.long), {0: "batch"}),
            "write_indices": InputPlan(torch.zeros(BATCH, dtype=torch.long), {0: "batch"}),
            **past,
        }
    else:
        module = StaticDecoderGraph(language_model)
        cross = {
            name: InputPlan(plan.example.to(dtype), plan.varying)
            for name, plan in portable.inputs.items()
            if name.startswith("cross_")
        }
        inputs = {
            "inputs_embeds": InputPlan(torch.zeros(BATCH, 1, width), {0: "batch"}),
            "attention_mask": InputPlan(torch.ones(BATCH, READ, dtype=torch.long), {0: "batch", 1: "read"}),
            "write_index": InputPlan(torch.zeros(1, dtype=torch.long), {}),
            **past,
            **cross,
        }
    present: dict[str, Axes] = {name.replace("past_", "present_", 1): {0: "batch"} for name in past}
    outputs: dict[str, Axes] = {"logits": {0: "batch"}, **present}
    return Graph(f"{portable.name}{STATIC}", module.eval(), inputs, outputs, frozenset(present), OPSET)


def require_static(model: onnx.ModelProto, graph: Graph) -> None:
    """InputError when a traced graph does not hold its caches by the two operators: its family goes another way."""
    found = Counter(node.op_type for node in model.graph.node)
    caches = sum(name.startswith("past_") for name in graph.inputs)
    attends = sum(name.startswith(("past_key", "cross_key")) for name in graph.inputs)
    if found["TensorScatter"] != caches or found["Attention"] != attends:
        raise InputError(
            f"graph '{graph.name}': expected {attends} Attention and {caches} TensorScatter nodes, found "
            f"{found['Attention']} and {found['TensorScatter']}: this family does not attend through transformers' "
            f"table of attention functions; export without --static-cache"
        )


def onnx_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as one ONNX node [B, S, h, d]; `attention_mask` is true where a position is seen.

    Its signature is that of transformers' attention functions. Outside of tracing it computes what the node would.
    """
    if s_aux is not None or softcap is not None:
        raise InputError(f"{type(module).__name__}: attends with sinks or capped scores; export without --static-cache")
    mask = attention_mask
    if position_bias is not None:
        hidden = torch.finfo(query.dtype).min
        bias = position_bias.to(query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, hidden)
    if torch.onnx.is_in_onnx_export():
        inputs = (query, key, value) if mask is None else (query, key, value, mask)
        settings: dict[str, Any] = {} if scaling is None else {"scale": float(scaling)}
        shape = (*query.shape[:-1], value.shape[-1])
        seen = torch.onnx.ops.symbolic("Attention", inputs, settings, dtype=query.dtype, shape=shape, version=OPSET)
    else:
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return seen.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, onnx_attention)


def _scattered(cache_BhLd: Tensor, new_BhSd: Tensor, indices_B: Tensor) -> Tensor:
    """The cache with `new` from each row's index on."""
    new_BhSd = new_BhSd.to(cache_BhLd.dtype)
    if torch.onnx.is_in_onnx_export():
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache_BhLd, new_BhSd, indices_B),
            {"axis": 2, "mode": "linear"},
            dtype=cache_BhLd.dtype,
            shape=cache_BhLd.shape,
            version=OPSET,
        )
    places_BS = indices_B[:, None] + torch.arange(new_BhSd.shape[2])
    return cache_BhLd.scatter(2, places_BS[:, None, :, None].expand_as(new_BhSd), new_BhSd)


def _cache(past_BhLd: tuple[Tensor, ...], indices_B: Tensor) -> Cache:
    pairs = zip(past_BhLd[::2], past_BhLd[1::2], strict=True)
    return Cache(layers=[ScatteredLayer(keys, values, indices_B) for keys, values in pairs])


def _tensors(cache: Cache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _converted(language_model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in another type that attends by our function; never a second copy in fp32.

    What the family itself keeps in fp32 stays so (T5's `wo`), and so do buffers that are computed (rotary frequencies).
    """
    strict = getattr(language_model, "_keep_in_fp32_modules_strict", None) or ()
    usual = (getattr(language_model, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else ()
    kept = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in (*strict, *usual)) or r"(?!)")
    memo: dict[int, Any] = {}
    for name, parameter in language_model.named_parameters():
        held = parameter.detach() if kept.search(name) else parameter.detach().to(dtype)
        memo[id(parameter)] = nn.Parameter(held, requires_grad=False)
    saved = language_model.state_dict(keep_vars=True)
    for name, buffer in language_model.named_buffers():
        if name in saved and buffer.is_floating_point():
            memo[id(buffer)] = buffer.to(dtype)
    converted: PreTrainedModel = copy.deepcopy(language_model, memo)
    try:
        converted.set_attn_implementation(ATTENTION)
    except ValueError as error:
        raise InputError(
            f"{type(language_model).__name__}: does not attend through transformers' table of attention functions "
            f"({error}); export without --static-cache"
        ) from error
    return converted


def _require_sayable(model: PreTrainedModel, positions: int, widths: set[int], decoder_only: bool) -> None:
    """InputError for what a plain mask over all positions cannot say, or TensorRT has no attention kernel for."""
    family, config = type(model).__name__, model.config.get_text_config(decoder=True)
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    heads = config.num_attention_heads
    windowed = window is not None and window < positions and (not kinds or "sliding_attention" in kinds)
    reasons = {
        f"has layers of another kind ({', '.join(sorted(kinds))})": kinds - {"full_attention", "sliding_attention"},
        f"looks back {window} positions, fewer than the {positions} of the cache": windowed,
        "takes no position_ids, it derives them from a mask that grows": decoder_only
        and not takes(model, "position_ids"),
        f"has {heads} heads, and TensorRT attends with no fewer than {FEWEST_HEADS} at batch 1": heads < FEWEST_HEADS,
        f"has heads of width {sorted(widths)}, and TensorRT attends in multiples of 8 from 16 to 256": any(
            width % 8 or not 16 <= width <= 256 for width in widths
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise InputError(f"export.static_cache: {family} {reason}; export without --static-cache")
