"""Which encoder-decoders can share a batch between rows that have said more and less than each other."""

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from export.language_modules import DecoderGraph, ignores_hidden_past
from tests.families import new_model

SMALL = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(BartConfig(vocab_size=40, d_model=16, **SMALL, **HEADS)).eval()


@pytest.mark.parametrize("name", ["t5", "flan"])
def test_positions_told_by_distance_do_not_change_behind_pads(name: str) -> None:
    torch.manual_seed(0)
    model = new_model(name, 40).eval()
    assert ignores_hidden_past(model)
    assert ignores_hidden_past(model.to(torch.float16).float())


def test_positions_counted_from_the_beginning_do() -> None:
    assert not ignores_hidden_past(bart())


def test_hidden_positions_change_nothing_in_a_step() -> None:
    """Whatever lies in them."""
    torch.manual_seed(0)
    model = new_model("t5", 40).eval()
    layers, width = model.config.num_decoder_layers, model.config.d_model
    graph = DecoderGraph(model, masks_past=True)
    embeds_B1D, mask_BR = torch.randn(2, 1, width), torch.ones(2, 4, dtype=torch.long)
    past = [torch.randn(2, model.config.num_heads, 5, model.config.d_kv) for _ in range(2 * layers)]
    cross = [torch.randn(2, model.config.num_heads, 4, model.config.d_kv) for _ in range(2 * layers)]
    mask_BL = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        logits_BV, *_ = graph(embeds_B1D, mask_BR, mask_BL, *past, *cross)
        other = [torch.cat([7 * tensor[:, :, :2], tensor[:, :, 2:]], dim=2) for tensor in past]
        changed_BV, *_ = graph(embeds_B1D, mask_BR, mask_BL, *other, *cross)
        short = [tensor[:, :, 2:] for tensor in past]
        short_BV, *_ = graph(embeds_B1D, mask_BR, mask_BL[:, 2:], *short, *cross)
    assert not torch.allclose(changed_BV[0], logits_BV[0], atol=1e-3), "the first row sees all of it"
    torch.testing.assert_close(changed_BV[1], logits_BV[1], rtol=0, atol=0)
    torch.testing.assert_close(short_BV[1], logits_BV[1], rtol=0, atol=1e-6)
