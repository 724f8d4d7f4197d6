"""Packed passes are the dense Q-Former's without its padding; the three masks hide what they must."""

import pytest
import torch
from torch import Tensor

from tests.tiny import widen
from trainer.bridge import Bridge, FirstPass
from trainer.config import QFormerConfig
from trainer.packed import Lookers
from trainer.qformer import generation_mask

SIZES = QFormerConfig(queries=5, width=48, layers=4, heads=4, ffn_width=96, contrastive_width=16)
IMAGE_WIDTH, VOCABULARY, START = 24, 60, 1
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0], [2, 3, 0, 0, 0]])
MASK = (IDS > 0).long()


@pytest.fixture
def bridge() -> Bridge:
    torch.manual_seed(1)
    made = Bridge(SIZES, image_width=IMAGE_WIDTH, language_width=None, vocabulary=VOCABULARY).eval()
    widen(made)
    return made


@pytest.fixture
def features() -> Tensor:
    return torch.randn(3, 9, IMAGE_WIDTH, generator=torch.Generator().manual_seed(2))


def first_pass(bridge: Bridge, features: Tensor, ids: Tensor = IDS) -> FirstPass:
    keys = bridge.keys_of_features(features)
    return bridge.first_pass(keys, ids, MASK, START, generation=True, contrast=True)


def dense_logits(bridge: Bridge, features: Tensor) -> Tensor:
    """ITG by the padded Q-Former under the generation mask: logits of tokens that speak of a next one."""
    said = IDS.clone()
    said[:, 0] = START
    keys = bridge.image_keys(bridge.post_layernorm(features))
    assert bridge.embeddings is not None and bridge.itg_head is not None
    mask = generation_mask(MASK, SIZES.queries)
    _, text = bridge.qformer(bridge.query_tokens.expand(3, -1, -1), bridge.embeddings(said), mask, keys)
    logits = bridge.itg_head(text, bridge.embeddings.word_embeddings.weight)
    return torch.cat([logits[row, : int(MASK[row].sum()) - 1] for row in range(3)])


def test_first_pass_equals_separate_dense_passes(bridge: Bridge, features: Tensor) -> None:
    found = first_pass(bridge, features)
    keys = bridge.image_keys(bridge.post_layernorm(features))
    assert found.text_BC is not None and found.logits_PV is not None
    assert torch.allclose(found.image_BQC, bridge.image_features(keys, 3), atol=1e-5)
    assert torch.allclose(found.text_BC, bridge.text_features(IDS, MASK), atol=1e-5)
    assert torch.allclose(found.logits_PV, dense_logits(bridge, features), atol=1e-5)


@pytest.mark.parametrize(("generation", "contrast"), [(True, False), (False, True)])
def test_a_loss_that_is_off_leaves_the_other_as_it_is(
    bridge: Bridge, features: Tensor, generation: bool, contrast: bool
) -> None:
    both, keys = first_pass(bridge, features), bridge.keys_of_features(features)
    one = bridge.first_pass(keys, IDS, MASK, START, generation=generation, contrast=contrast)
    assert (one.logits_PV is None, one.text_BC is None) == (not generation, not contrast)
    for alone, together in (
        (one.image_BQC, both.image_BQC),
        (one.text_BC, both.text_BC),
        (one.logits_PV, both.logits_PV),
    ):
        assert alone is None or torch.allclose(alone, together, atol=1e-5)


def test_gradients_equal_those_of_dense_passes(bridge: Bridge, features: Tensor) -> None:
    def gradients(loss: Tensor) -> dict[str, Tensor]:
        bridge.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in bridge.named_parameters() if p.grad is not None}

    found, keys = first_pass(bridge, features), bridge.image_keys(bridge.post_layernorm(features))
    assert found.text_BC is not None and found.logits_PV is not None
    weights = [torch.randn(part.shape) for part in (found.image_BQC, found.text_BC, found.logits_PV)]
    ours = [found.image_BQC, found.text_BC, found.logits_PV]
    dense = [bridge.image_features(keys, 3), bridge.text_features(IDS, MASK), dense_logits(bridge, features)]
    by_packed, by_dense = (
        gradients(sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)))
        for parts in (ours, dense)
    )
    assert by_packed.keys() == by_dense.keys()
    assert {"post_layernorm.weight", "post_layernorm.bias", "query_tokens"} <= by_packed.keys()
    largest = max(float(gradient.abs().max()) for gradient in by_dense.values())
    for name, gradient in by_dense.items():
        assert torch.allclose(by_packed[name], gradient, rtol=1e-4, atol=1e-7 * largest), name


def test_rows_that_share_images_equal_repeated_images(bridge: Bridge, features: Tensor) -> None:
    images, texts = torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 1]), torch.tensor([0, 1, 1, 2, 2, 0, 0, 1, 2])
    keys = bridge.keys_of_features(features)
    lookers = [Lookers(keys, 6), Lookers(keys.rows(images[6:]), 3)]
    found = bridge.matching(lookers, IDS[texts], MASK[texts])
    repeated = bridge.image_keys(bridge.post_layernorm(features[images]))
    assert torch.allclose(found, bridge.matching_logits(repeated, IDS[texts], MASK[texts]), atol=1e-5)


@torch.no_grad()
def test_masks_of_the_first_pass(bridge: Bridge, features: Tensor) -> None:
    """A later token never changes earlier ITG logits, text never the queries, the image never a compared text."""
    before, changed = first_pass(bridge, features), IDS.clone()
    changed[0, 2] = 40  # of row 0, which predicts its tokens 1 to 4 from rows 0 to 3 of the logits
    after = first_pass(bridge, features, changed)
    assert before.logits_PV is not None and after.logits_PV is not None
    assert torch.equal(before.image_BQC, after.image_BQC)
    assert torch.equal(before.logits_PV[:2], after.logits_PV[:2])
    assert not torch.allclose(before.logits_PV[2:4], after.logits_PV[2:4], atol=1e-3)
    assert torch.equal(before.logits_PV[4:], after.logits_PV[4:]), "other rows"
    elsewhere = first_pass(bridge, features + torch.randn_like(features))
    assert torch.equal(before.text_BC, elsewhere.text_BC)
    assert not torch.allclose(before.image_BQC, elsewhere.image_BQC, atol=1e-3)


@torch.no_grad()
def test_text_reaches_the_image_through_the_queries_alone(bridge: Bridge, features: Tensor) -> None:
    """With queries that pass nothing on (their values are zero), another image changes no ITG logit."""
    other = features + torch.randn_like(features)
    one, two = first_pass(bridge, features).logits_PV, first_pass(bridge, other).logits_PV
    assert one is not None and two is not None and not torch.allclose(one, two, atol=1e-3)
    for layer in bridge.qformer.encoder.layers():
        if layer.crossattention is not None:
            layer.crossattention.output.dense.weight.zero_()
    one, two = first_pass(bridge, features).logits_PV, first_pass(bridge, other).logits_PV
    assert one is not None and two is not None and torch.equal(one, two)


@torch.no_grad()
def test_matching_sees_both(bridge: Bridge, features: Tensor) -> None:
    def logits(features: Tensor, ids: Tensor) -> Tensor:
        return bridge.matching([Lookers(bridge.keys_of_features(features), 3)], ids, MASK)

    before, other_text, other_image = logits(features, IDS), IDS.clone(), features.clone()
    other_text[0, 3] = 41  # the last word: every query sees it
    other_image[1] = torch.randn_like(features[1])
    by_text, by_image = logits(features, other_text), logits(other_image, IDS)
    assert not torch.allclose(before[0], by_text[0], atol=1e-4)
    assert torch.equal(before[1:], by_text[1:])
    assert not torch.allclose(before[1], by_image[1], atol=1e-4)
    assert torch.equal(before[[0, 2]], by_image[[0, 2]])
