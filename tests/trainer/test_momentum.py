"""The momentum encoder against a straightforward one: lists, loops, and a plain moving average."""

import copy

import pytest
import torch
from torch.nn import functional as F

from trainer.blip2 import TextBatch
from trainer.bridge import Bridge
from trainer.config import QFormerConfig
from trainer.losses import itc_loss
from trainer.momentum import MomentumEncoder
from trainer.negatives import Pairs
from trainer.ranks import Ranks

SIZES = QFormerConfig(queries=3, width=32, layers=2, heads=2, ffn_width=64, contrastive_width=8, dropout=0.3)
BATCH, CAPACITY, MOMENTUM = 4, 6, 0.9


@pytest.fixture
def bridge() -> Bridge:
    torch.manual_seed(0)
    return Bridge(SIZES, image_width=16, language_width=20, vocabulary=40).train()


def pairs(step: int) -> Pairs:
    torch.manual_seed(100 + step)
    ids = torch.randint(3, 40, (BATCH, 6))
    images = torch.tensor([step * 2, step * 2 + 1, 50, 60 + step])  # 50 is seen in every step
    return Pairs(TextBatch(ids, torch.ones_like(ids)), torch.randn(BATCH, 5, 16), images)


def test_equals_a_straightforward_queue(bridge: Bridge) -> None:
    encoder = MomentumEncoder(bridge, MOMENTUM, CAPACITY)
    twin, remembered = copy.deepcopy(bridge).eval(), []
    for step in range(5):
        with torch.no_grad():
            for parameter in bridge.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
            for mine, online in zip(twin.parameters(), bridge.parameters(), strict=True):
                mine.copy_(MOMENTUM * mine + (1 - MOMENTUM) * online)
        part = pairs(step)
        image_BQC = F.normalize(torch.randn(BATCH, 3, 8), dim=-1)
        text_BC = F.normalize(torch.randn(BATCH, 8), dim=-1)
        found = encoder.logits(bridge, image_BQC, text_BC, [part], Ranks())
        with torch.no_grad():
            keys = twin.image_keys(twin.post_layernorm(part.features_bnE))
            images, texts = twin.image_features(keys, BATCH), twin.text_features(part.texts.ids, part.texts.mask)
        now = list(zip(images, texts, part.image_ids_b.tolist(), strict=True))
        pool = now + remembered[-CAPACITY:]
        assert found[0].shape == (BATCH, len(pool))
        of_pool = {(round(float(t.sum()), 5), number): (i, t) for i, t, number in pool}
        assert len(of_pool) == len(pool)
        temperature = float(bridge.temperature)
        for row in range(BATCH):
            to_text = sorted(float((image_BQC[row] @ text).max()) / temperature for _, text, _ in pool)
            to_image = sorted(float((image @ text_BC[row]).max()) / temperature for image, _, _ in pool)
            assert found[0][row].sort().values.tolist() == pytest.approx(to_text, abs=1e-4)
            assert found[1][row].sort().values.tolist() == pytest.approx(to_image, abs=1e-4)
            number = int(part.image_ids_b[row])
            assert int(found[2][row].sum()) == sum(other == number for _, _, other in pool)
        assert torch.isfinite(itc_loss(*found, 0.1))
        remembered += now


def test_gradient_reaches_the_anchors_and_not_the_twin(bridge: Bridge) -> None:
    encoder = MomentumEncoder(bridge, MOMENTUM, CAPACITY)
    image = F.normalize(torch.randn(BATCH, 3, 8), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(BATCH, 8), dim=-1).requires_grad_()
    itc_loss(*encoder.logits(bridge, image, text, [pairs(0)], Ranks()), 0.1).backward()
    reached = [name for name, parameter in bridge.named_parameters() if parameter.grad is not None]
    assert image.grad is not None and text.grad is not None and reached == ["temperature"]


def test_a_resumed_queue_goes_on_with_the_same_bits(bridge: Bridge) -> None:
    whole, begun = (MomentumEncoder(bridge, MOMENTUM, CAPACITY) for _ in range(2))
    image, text = F.normalize(torch.randn(BATCH, 3, 8), dim=-1), F.normalize(torch.randn(BATCH, 8), dim=-1)
    for step in range(2):
        for encoder in (whole, begun):
            encoder.logits(bridge, image, text, [pairs(step)], Ranks())
    resumed = MomentumEncoder(bridge, MOMENTUM, CAPACITY)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    with torch.no_grad():
        bridge.query_tokens.add_(0.1)
    one, other = (encoder.logits(bridge, image, text, [pairs(2)], Ranks()) for encoder in (whole, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(RuntimeError):
        MomentumEncoder(bridge, MOMENTUM, CAPACITY + 1).load_state_dict(begun.state_dict())
