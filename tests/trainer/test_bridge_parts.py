"""A bridge without some of its parts: what is there works as before, what is not is named with its remedy."""

from collections.abc import Callable

import pytest
import torch

from runtime.errors import CheckpointError, InputError
from trainer.bridge import PARTS, Bridge, Part, part_of
from trainer.config import QFormerConfig

CONFIG = QFormerConfig(queries=3, width=24, layers=2, heads=4, ffn_width=40, contrastive_width=8)
IMAGE, IDS = torch.randn(2, 5, 16), torch.tensor([[2, 5, 3], [2, 6, 3]])
MASK = torch.ones_like(IDS)


def bridge(*parts: Part, **changes: object) -> Bridge:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update=changes)
    return Bridge(config, image_width=16, language_width=12, vocabulary=9, parts=parts).eval()


USES: list[tuple[Part, Callable[[Bridge], object]]] = [
    ("text", lambda b: b.matching_logits(b.image_keys(IMAGE), IDS, MASK)),
    ("text", lambda b: b.prefix(IMAGE, IDS, MASK)),
    ("contrast", lambda b: b.text_features(IDS, MASK)),
    ("contrast", lambda b: b.image_features(b.image_keys(IMAGE), 2)),
    ("matching", lambda b: b.matching_logits(b.image_keys(IMAGE), IDS, MASK)),
    ("generation", lambda b: b.first_pass(b.image_keys(IMAGE), IDS, MASK, 1, generation=True, contrast=False)),
    ("temperature", lambda b: b.over_temperature(torch.ones(2, 2))),
    ("language", lambda b: b.prefix(IMAGE)),
]


@pytest.mark.parametrize(("part", "use"), USES)
def test_a_part_that_is_not_there_is_named(part: Part, use: Callable[[Bridge], object]) -> None:
    use(bridge(*PARTS))
    remedy = "--set model.language=DIR" if part == "language" else "--text-from STAGE1_CKPT"
    without = bridge(*(other for other in PARTS if other != part))
    with pytest.raises(CheckpointError, match=part) as error:
        use(without)
    assert remedy in str(error.value)
    with pytest.raises(CheckpointError, match=part):
        without.need("text" if part != "text" else "matching", part)


def test_every_parameter_belongs_to_a_part_or_to_the_core() -> None:
    whole = bridge(*PARTS).state_dict()
    for part in PARTS:
        without = bridge(*(other for other in PARTS if other != part)).state_dict()
        assert {key for key in whole if part_of(key) == part} == whole.keys() - without.keys()
    assert all(part_of(key) is None for key in bridge().state_dict())


@torch.no_grad()
def test_what_is_there_does_not_depend_on_what_is_not() -> None:
    whole, lean = bridge(*PARTS), bridge("language")
    lean.load_state_dict({key: whole.state_dict()[key] for key in lean.state_dict()})
    assert torch.equal(whole.prefix(IMAGE), lean.prefix(IMAGE))


@torch.no_grad()
def test_epsilon_and_activation_are_data() -> None:
    prefix = bridge(*PARTS).prefix(IMAGE)
    assert not torch.equal(prefix, bridge(*PARTS, activation="relu").prefix(IMAGE))
    assert not torch.equal(prefix, bridge(*PARTS, layer_norm_eps=1e-2).prefix(IMAGE))
    with pytest.raises(InputError, match=r"qformer.activation: expected one of .* found 'swoosh'"):
        bridge(*PARTS, activation="swoosh")


def test_no_language_model_means_no_projection() -> None:
    made = Bridge(CONFIG, image_width=16, language_width=None, vocabulary=9)
    assert made.parts == set(PARTS) - {"language"}
