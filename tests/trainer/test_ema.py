"""The average of weights: torch's own averaged model is the oracle."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.ema import Ema


def trained(steps: int) -> tuple[nn.Sequential, Ema, AveragedModel]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    ema, theirs = Ema(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first call copies
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        ema.update()
        theirs.update_parameters(model)
    return model, ema, theirs


def test_the_average_is_torchs_and_takes_the_place_of_the_weights() -> None:
    model, ema, theirs = trained(5)
    own = [parameter.clone() for parameter in model.parameters()]
    with ema.in_place():
        for found, expected in zip(model.parameters(), theirs.module.parameters(), strict=True):
            torch.testing.assert_close(found, expected)
        assert not torch.equal(model[1].weight, own[2])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own, strict=True))
    ema.swap()
    torch.testing.assert_close(model[1].weight, theirs.module[1].weight)


def test_only_trained_weights_are_kept_and_a_state_brings_them_back() -> None:
    _, ema, theirs = trained(3)
    state = ema.state_dict()
    assert state.keys() == {"0.bias", "1.weight", "1.bias"}
    fresh, other, _ = trained(0)
    other.load_state_dict(state)
    other.swap()
    torch.testing.assert_close(fresh[1].bias, theirs.module[1].bias)
    with pytest.raises(KeyError, match="averages of other weights"):
        other.load_state_dict({"0.bias": state["0.bias"]})
