"""Counted operations equal those worked out by hand, counting changes no bit, and peaks are those of the data sheets."""

import pytest
import torch
from torch.nn import functional as F

from trainer.config import ModelConfig, QFormerConfig
from trainer.logs.flops import flop_counter, peak_of, published
from trainer.qformer import QFormer


def counted(work) -> int:
    with flop_counter() as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_counts_the_same_whatever_kernel_runs_it(masked: bool, dropout: float) -> None:
    """PyTorch's own table has no entry for the CPU's fused kernel; with dropout it takes plain products instead."""
    rows, heads, queries, keys, width = 2, 3, 5, 7, 16
    query = torch.randn(rows, heads, queries, width, requires_grad=True)
    key, value = (torch.randn(rows, heads, keys, width, requires_grad=True) for _ in range(2))
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if masked else None
    forward = 2 * 2 * rows * heads * queries * keys * width

    def attend():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)

    assert counted(attend) == forward
    assert counted(lambda: attend().sum().backward()) == 3 * forward
