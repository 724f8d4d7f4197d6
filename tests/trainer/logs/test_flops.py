"""Counted operations equal those worked out by hand, counting changes no bit, peaks are those of the data sheets."""

import pytest
import torch
from torch.nn import functional as F

from trainer.config import QFormerConfig
from trainer.logs import flops
from trainer.logs.flops import Peak, flop_counter, peak_of, published, raised
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


def qformer_forward(config: QFormerConfig, tokens: int, image_width: int) -> int:
    """Operations of one image's queries: dense layers and attention products, 2 per multiply-add."""
    queries, width = config.queries, config.width
    dense = 4 * queries * width * width + 2 * queries * width * config.ffn_width
    total = config.layers * (dense + 2 * queries * queries * width)
    crossed = 2 * queries * width * width + 2 * tokens * image_width * width + 2 * queries * tokens * width
    return 2 * (total + -(-config.layers // config.cross_attention_frequency) * crossed)


def encode(qformer: QFormer, queries_BQH: torch.Tensor, image_BNE: torch.Tensor) -> torch.Tensor:
    return qformer(queries_BQH, None, None, qformer.image_keys(image_BNE))[0]


def test_a_qformer_counts_what_is_worked_out_by_hand() -> None:
    config = QFormerConfig(queries=4, width=32, layers=3, heads=2, ffn_width=48, dropout=0.0)
    qformer = QFormer(config, image_width=24)
    queries, image = torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 9, 24, requires_grad=True)
    assert counted(lambda: encode(qformer, queries, image)) == 2 * qformer_forward(config, 9, 24)
    assert counted(lambda: encode(qformer, queries, image).sum().backward()) == 6 * qformer_forward(config, 9, 24)


def test_blip2s_qformer_counts_what_is_published() -> None:
    """38 GFLOP per image forward and backward in stage 2 with ViT-g at 224 pixels; the weights are never made."""
    with torch.device("meta"):
        qformer = QFormer(QFormerConfig(dropout=0.0), image_width=1408)
        queries, image = torch.empty(1, 32, 768, requires_grad=True), torch.empty(1, 257, 1408, requires_grad=True)
        total = counted(lambda: encode(qformer, queries, image).sum().backward())
    assert total == pytest.approx(38e9, rel=0.02)
    assert total == pytest.approx(3 * qformer_forward(QFormerConfig(), 257, 1408), rel=0.02)


def test_counting_changes_no_bit() -> None:
    """A resumed run counts its first step, a whole run does not count that step: both must compute the same."""
    config = QFormerConfig(queries=4, width=32, layers=2, heads=2, ffn_width=48, dropout=0.1)
    qformer = QFormer(config, image_width=24)
    queries, image = torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 9, 24)

    def gradient() -> torch.Tensor:
        torch.manual_seed(0)
        queries.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            out = encode(qformer, queries, image)
        out.square().sum().backward()
        assert queries.grad is not None
        return queries.grad

    plain = gradient()
    with flop_counter():
        found = gradient()
    assert torch.equal(plain, found)


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 19.5e12, 312e12),
        ("NVIDIA H100 80GB HBM3", 67e12, 989.5e12),
        ("NVIDIA H100 PCIe", 51e12, 756.5e12),
        ("NVIDIA H200", 67e12, 989.5e12),
        ("NVIDIA L40S", 91.6e12, 362e12),
        ("NVIDIA L4", 30.3e12, 121e12),
        ("Tesla T4", 8.1e12, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A1000 Laptop GPU", None, None),
    ],
)
def test_data_sheets_are_found_by_the_devices_name(name: str, fp32: float | None, bf16: float | None) -> None:
    assert published(name, torch.float32) == fp32
    assert published(name, torch.bfloat16) == bf16


def test_a_cpus_peak_is_measured_and_no_product_beats_it_by_far() -> None:
    import time

    peak = peak_of(torch.device("cpu"), torch.float32)
    assert peak.source == "measured"
    left = torch.ones(512, 512)
    torch.mm(left, left)
    start = time.perf_counter()
    for _ in range(5):
        torch.mm(left, left)
    # neighbours may have had the cores while the peak was measured
    assert 5 * 2 * 512**3 / (time.perf_counter() - start) < 5 * peak.flops
    assert peak_of(torch.device("cpu"), torch.float32) is peak or peak_of(torch.device("cpu"), torch.float32) == peak


def test_a_measured_peak_is_no_lower_than_that_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast leaves products in fp32; a CPU without instructions for fp16 does them a hundred times as fast."""
    speeds = {torch.float16: 0.7e9, torch.float32: 60e9}
    monkeypatch.setattr(flops, "_fastest_product", lambda _, dtype: speeds[dtype])
    assert flops._measure(torch.device("cpu"), torch.float16) == 60e9


@pytest.mark.parametrize(("source", "expected"), [("measured", 1e18), ("data sheet", 1e6)])
def test_only_a_measured_peak_is_raised_to_what_was_seen(source: str, expected: float) -> None:
    peak = Peak(1e6, source)
    assert raised(peak, 1e18, torch.device("cpu"), torch.float32) == Peak(expected, source)
    assert raised(peak, 5e5, torch.device("cpu"), torch.float32) is peak
