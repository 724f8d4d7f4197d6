"""Our Q-Former is BLIP-2's: equal to transformers' with the same random weights; and its masks hide what they must."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from tests.tiny import widen
from trainer.bridge import Bridge
from trainer.config import QFormerConfig
from trainer.qformer import QFormer, padding_mask

SIZES = dict(queries=5, width=48, layers=4, heads=4, ffn_width=96, contrastive_width=16)
IMAGE_WIDTH, VOCABULARY = 24, 60


def twins(frequency: int) -> tuple[QFormer, Blip2QFormerModel]:
    torch.manual_seed(0)
    ours = QFormer(QFormerConfig(**SIZES, cross_attention_frequency=frequency), IMAGE_WIDTH).eval()
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=SIZES["width"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            intermediate_size=SIZES["ffn_width"],
            cross_attention_frequency=frequency,
            encoder_hidden_size=IMAGE_WIDTH,
            use_qformer_text_input=True,
        )
    ).eval()
    widen(theirs, 0.3)
    report = ours.load_state_dict(theirs.state_dict(), strict=True)
    assert not report.missing_keys
    return ours, theirs


@pytest.mark.parametrize("frequency", [1, 2, 3])
@pytest.mark.parametrize("text_lengths", [None, (7, 3)])
def test_equals_transformers(frequency: int, text_lengths: tuple[int, ...] | None) -> None:
    ours, theirs = twins(frequency)
    queries, image = torch.randn(2, SIZES["queries"], SIZES["width"]), torch.randn(2, 9, IMAGE_WIDTH)
    text, mask, both, seen = None, None, queries, None
    if text_lengths is not None:
        text = torch.randn(2, max(text_lengths), SIZES["width"])
        text_mask = torch.tensor([[1] * n + [0] * (max(text_lengths) - n) for n in text_lengths])
        mask, both = padding_mask(text_mask, SIZES["queries"]), torch.cat([queries, text], 1)
        seen = torch.cat([torch.ones(2, SIZES["queries"], dtype=torch.long), text_mask], 1)
    with torch.no_grad():
        query_out, text_out = ours(queries, text, mask, ours.image_keys(image))
        expected = theirs(both, query_length=SIZES["queries"], attention_mask=seen, encoder_hidden_states=image)
    found = torch.cat([query_out, text_out], 1)
    valid = torch.ones(found.shape[:2], dtype=torch.bool) if seen is None else seen.bool()
    assert (found - expected.last_hidden_state)[valid].abs().max() < 1e-5


@pytest.fixture
def bridge() -> Bridge:
    torch.manual_seed(1)
    return Bridge(QFormerConfig(**SIZES), image_width=IMAGE_WIDTH, language_width=32, vocabulary=VOCABULARY).eval()


IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0]])
MASK = (IDS > 0).long()


@torch.no_grad()
def test_matching_sees_text_and_ignores_padding(bridge: Bridge) -> None:
    keys = bridge.image_keys(torch.randn(2, 9, IMAGE_WIDTH))
    logits = bridge.matching_logits(keys, IDS, MASK)
    padded = torch.nn.functional.pad(IDS, (0, 3), value=7)
    longer = bridge.matching_logits(keys, padded, torch.nn.functional.pad(MASK, (0, 3)))
    assert torch.allclose(logits, longer, atol=1e-6)
    changed = IDS.clone()
    changed[0, 2] = 41
    after = bridge.matching_logits(keys, changed, MASK)
    assert not torch.allclose(logits[0], after[0])
    assert torch.allclose(logits[1], after[1], atol=1e-6)


@torch.no_grad()
def test_a_masked_question_is_no_question(bridge: Bridge) -> None:
    image = torch.randn(2, 9, IMAGE_WIDTH)
    assert torch.allclose(bridge.prefix(image), bridge.prefix(image, IDS, torch.zeros_like(MASK)), atol=1e-6)
    assert not torch.allclose(bridge.prefix(image), bridge.prefix(image, IDS, MASK), atol=1e-3)


def test_fresh_bridge_has_different_queries_and_copied_ffn(bridge: Bridge) -> None:
    assert float(bridge.query_tokens.detach().std()) == pytest.approx(0.02, rel=0.3)
    for layer in bridge.qformer.encoder.layer:
        assert torch.equal(layer.intermediate.dense.weight, layer.intermediate_query.dense.weight)


def test_shared_image_keys_equal_repeated_images(bridge: Bridge) -> None:
    image = torch.randn(2, 9, IMAGE_WIDTH)
    rows = torch.tensor([1, 0, 1])
    ids, mask = IDS[[0, 1, 1]], MASK[[0, 1, 1]]
    shared = bridge.matching_logits(bridge.image_keys(image).rows(rows), ids, mask)
    repeated = bridge.matching_logits(bridge.image_keys(image[rows]), ids, mask)
    assert torch.allclose(shared, repeated, atol=1e-6)
