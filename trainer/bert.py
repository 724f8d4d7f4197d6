"""A fresh Q-Former starts from BERT, as published: its layers, its text embeddings and its masked-language head.

What BERT has and a Q-Former has not is its segment ("token type"); a text is always segment 0, so that row is added to
every position. What a Q-Former has besides stays as it was drawn: cross-attention, queries, contrastive and matching
heads, and the row of `[DEC]`. The query FFN is a copy of BERT's FFN (LAVIS blip2.py, init_Qformer).
"""

from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from runtime.errors import CheckpointError, InputError
from trainer.blip2 import Blip2
from trainer.towers import load_pretrained, read_hf_config, source_folder


@torch.no_grad()
def start_from_bert(model: Blip2, source: str) -> None:
    """Copy BERT's weights from a folder or hub id into a fresh bridge with all its parts.

    Raises:
        MissingFile: nothing transformers can read. InputError: no BERT, or one of other sizes than the Q-Former.
        CheckpointError: weights missing, or a tokenizer that is not this BERT's.
    """
    folder = source_folder(source, "text")
    config = read_hf_config(folder)
    if not isinstance(config, BertConfig):
        raise InputError(
            f"model.qformer_init: expected a BERT (model_type bert) in {folder}, found {config.model_type}"
        )
    _require_sizes(model, config, folder)
    bert: Any = load_pretrained(BertForMaskedLM, folder, unexpected="left")
    _copy_embeddings(model.bridge, bert.bert.embeddings, folder)
    for ours, theirs in zip(model.bridge.qformer.encoder.layers(), bert.bert.encoder.layer, strict=False):
        _copy_layer(ours, theirs)
    head: Any = model.bridge.itg_head
    predictions = bert.cls.predictions
    _take(head.dense, predictions.transform.dense)
    _take(head.LayerNorm, predictions.transform.LayerNorm)
    head.bias[: len(predictions.bias)] = predictions.bias


def _require_sizes(model: Blip2, theirs: BertConfig, folder: str) -> None:
    ours = model.config.qformer
    pairs = {
        "width": (ours.width, theirs.hidden_size),
        "heads": (ours.heads, theirs.num_attention_heads),
        "ffn_width": (ours.ffn_width, theirs.intermediate_size),
        "text_positions": (ours.text_positions, theirs.max_position_embeddings),
        "layer_norm_eps": (ours.layer_norm_eps, theirs.layer_norm_eps),
        "activation": (ours.activation, theirs.hidden_act),
    }
    for name, (found, expected) in pairs.items():
        if found != expected:
            raise InputError(
                f"model.qformer.{name}: expected {expected}, as the BERT in {folder} has it, found {found}; change it, "
                f"or leave model.qformer_init out"
            )
    if ours.layers > theirs.num_hidden_layers:
        raise InputError(
            f"model.qformer.layers: expected at most {theirs.num_hidden_layers}, the layers of the BERT in {folder}, "
            f"found {ours.layers}"
        )


def _copy_embeddings(bridge: Any, theirs: Any, folder: str) -> None:
    ours, rows = bridge.embeddings.word_embeddings.weight, theirs.word_embeddings.weight.shape[0]
    if rows > len(ours):
        raise CheckpointError(
            f"{folder} embeds {rows} tokens, the Q-Former {len(ours)}: model.text_tokenizer is not this BERT's; name "
            f"the folder of its tokenizer"
        )
    ours[:rows] = theirs.word_embeddings.weight
    segment_0 = theirs.token_type_embeddings.weight[0]
    bridge.embeddings.position_embeddings.weight.copy_(theirs.position_embeddings.weight + segment_0)
    _take(bridge.qformer.layernorm, theirs.LayerNorm)


def _copy_layer(ours: Any, theirs: Any) -> None:
    for name in ("query", "key", "value"):
        _take(getattr(ours.attention.attention, name), getattr(theirs.attention.self, name))
    for block, from_ in ((ours.attention.output, theirs.attention.output), (ours.output, theirs.output)):
        _take(block.dense, from_.dense)
        _take(block.LayerNorm, from_.LayerNorm)
    _take(ours.intermediate.dense, theirs.intermediate.dense)
    _take(ours.intermediate_query, ours.intermediate)
    _take(ours.output_query, ours.output)


def _take(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())
