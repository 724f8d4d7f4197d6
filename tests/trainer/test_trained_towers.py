"""A vision tower that is trained: what gets a gradient and which one, by transformers' and torch's own code."""

import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from runtime.errors import InputError
from tests.trainer.test_towers import TOWERS, saved
from trainer.layer_decay import layer_scales
from trainer.towers import load_vision


@pytest.mark.parametrize("name", TOWERS)
def test_what_reaches_the_hidden_state_gets_the_gradient_of_transformers(name: str, tmp_path: Path) -> None:
    theirs, pixels = saved(name, tmp_path), torch.randn(2, 3, 16, 16)
    theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2].square().mean().backward()
    expected = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    tower = load_vision(str(tmp_path), -2)
    assert not tower.trained
    assert not tower(pixels).requires_grad
    tower.unfreeze(checkpointing=False)
    assert {key for key, p in tower.model.named_parameters() if p.requires_grad} == expected.keys()
    assert not any(p.requires_grad for p in tower.layers()[-1].parameters()), "the state before the last layer"
    tower(pixels).square().mean().backward()
    for key, parameter in tower.model.named_parameters():
        if key in expected:
            torch.testing.assert_close(parameter.grad, expected[key], msg=key)


def test_activations_computed_again_give_the_same_gradients(tmp_path: Path) -> None:
    saved("blip2", tmp_path)
    plain, again = (load_vision(str(tmp_path), -1) for _ in range(2))
    plain.unfreeze(checkpointing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a name that the next transformers will not have
        again.unfreeze(checkpointing=True)
    pixels, kept = torch.randn(2, 3, 16, 16), [list[torch.Tensor](), list[torch.Tensor]()]
    for tower, tensors in zip((plain, again), kept, strict=True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t, tensors=tensors: tensors.append(t) or t, lambda t: t):
            loss = tower(pixels).square().mean()
        loss.backward()
    assert len(kept[1]) < 0.3 * len(kept[0]), "most activations are not kept"
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_positions_are_trained_through_bicubic_interpolation(tmp_path: Path) -> None:
    """The gradient of the tower's own 4 x 4 table is that of torch's bicubic resize to 6 x 6."""
    saved("blip2", tmp_path)
    tower = load_vision(str(tmp_path), 0, image_size=24)
    tower.unfreeze(checkpointing=False)
    weights = torch.randn(1, 37, 32)
    (tower(torch.zeros(1, 3, 24, 24)) * weights).sum().backward()
    found = dict(tower.model.named_parameters())["embeddings.position_embedding"]
    table = found.detach().clone().requires_grad_()
    grid = table[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    (torch.cat([table[:, :1], resized], dim=1) * weights).sum().backward()
    torch.testing.assert_close(found.grad, table.grad, atol=1e-5, rtol=1e-5)
    frozen = load_vision(str(tmp_path), 0, image_size=24)
    torch.testing.assert_close(tower(torch.ones(1, 3, 24, 24)), frozen(torch.ones(1, 3, 24, 24)))


def test_only_a_trained_tower_leaves_eval_mode(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    tower = load_vision(str(tmp_path), -1)
    assert not tower.train().training
    tower.unfreeze(checkpointing=False)
    assert tower.training
    assert not tower.eval().training
    with torch.no_grad():
        assert not tower(torch.zeros(1, 3, 16, 16)).requires_grad


def test_layers_below_have_lower_rates(tmp_path: Path) -> None:
    """Three layers of which two are in use: embeddings d^3, layer 0 d^2, layer 1 d."""
    saved("clip", tmp_path)
    tower = load_vision(str(tmp_path), -2)
    assert layer_scales(tower, 0.5) == {}
    tower.unfreeze(checkpointing=False)
    scales = {key: layer_scales(tower, 0.5).get(p) for key, p in tower.model.named_parameters()}
    assert {scales[key] for key in scales if "embedding" in key or key.startswith("pre_")} == {0.125}
    assert {scales[key] for key in scales if ".layers.0." in key} == {0.25}
    assert {scales[key] for key in scales if ".layers.1." in key} == {0.5}
    assert {scales[key] for key in scales if ".layers.2." in key or key.startswith("post_")} == {None}


def test_a_tower_that_is_no_stack_of_layers_is_refused(tmp_path: Path) -> None:
    saved("vit", tmp_path)
    tower = load_vision(str(tmp_path), -1)
    tower.model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="is no stack of 5 layers"):
        tower.layers()
