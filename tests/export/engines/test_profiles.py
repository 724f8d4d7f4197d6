"""Profiles cover what the manifest allows, and nothing that the runtime asks for falls between them."""

import pytest

from export.engines.profiles import patches_of, profiles_of
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.manifest import Manifest, TensorSpec


def test_a_batch_each_and_a_range(bundle_fp32: Bundle) -> None:
    profiles = profiles_of("vision", bundle_fp32.manifest)
    assert [profile.name for profile in profiles] == ["batch-1", "batch-2", "batch-4", "range"]
    assert profiles[2].shapes["pixels"] == ((4, 3, 16, 16),) * 3
    assert [shape[0] for shape in profiles[3].shapes["pixels"]] == [1, 5, 5]


def test_prompt_and_token_have_their_own(bundle_fp32: Bundle) -> None:
    limits, profiles = bundle_fp32.manifest.limits, profiles_of("language", bundle_fp32.manifest, (2,))
    assert [profile.name for profile in profiles] == ["batch-2-prefill", "batch-2-step", "range-prefill", "range-step"]
    prefill, step = (profile.shapes for profile in profiles[:2])
    least, _, most = prefill["inputs_embeds"]
    assert (least[1], most[1]) == (1, limits.max_positions)
    assert prefill["past_key_0"] == ((2, 4, 0, 8),) * 3
    least, _, most = step["past_key_0"]
    assert (least[2], most[2]) == (0, limits.max_positions - 1)
    assert [shape[1] for shape in step["attention_mask"]][::2] == [1, limits.max_positions]


@pytest.mark.parametrize(("batch", "past", "new"), [(1, 0, 1), (5, 0, 96), (3, 95, 1), (4, 1, 1), (2, 0, 20)])
def test_whatever_the_runtime_asks_fits_one(batch: int, past: int, new: int, bundle_fp32: Bundle) -> None:
    entry = bundle_fp32.manifest.graphs["language"]
    sizes = {"batch": batch, "past": past, "new": new, "past + new": past + new}
    shapes = {name: tuple(sizes.get(str(axis), axis) for axis in spec.shape) for name, spec in entry.inputs.items()}
    fitting = [profile for profile in profiles_of("language", bundle_fp32.manifest) if profile.holds(shapes)]
    assert any(profile.name.startswith("range") for profile in fitting)
    assert any(profile.name.startswith(f"batch-{batch}-") for profile in fitting) == (batch in (1, 2, 4))


def test_texts_and_questions_have_their_limits(bundle_fp32: Bundle) -> None:
    limits = bundle_fp32.manifest.limits
    most = {
        name: max(profile.shapes[tensor][2][1] for profile in profiles_of(name, bundle_fp32.manifest))
        for name, tensor in (("qformer", "question_ids"), ("embed", "input_ids"))
    }
    assert most == {"qformer": limits.max_question_tokens, "embed": limits.max_positions}


@pytest.mark.parametrize(("side", "patches"), [(16, 17), (20, 26), (24, 37)])
@pytest.mark.parametrize("name", ["vision", "fused", "qformer"])
def test_every_image_size_fits(name: str, side: int, patches: int, bundle_wide: Bundle) -> None:
    sizes = {"batch": 3, "height": side, "width": side, "patches": patches, "tokens": 5}
    inputs = bundle_wide.manifest.graphs[name].inputs
    shapes = {tensor: tuple(sizes.get(str(axis), axis) for axis in spec.shape) for tensor, spec in inputs.items()}
    profiles = profiles_of(name, bundle_wide.manifest, (3,), patches=patches_of(bundle_wide))
    assert [profile.name for profile in profiles if profile.holds(shapes)] == ["batch-3", "range"]
    trained = profiles[0].shapes["image_embeds" if name == "qformer" else "pixels"][1]
    assert trained == ((3, 17, 32) if name == "qformer" else (3, 3, 16, 16)), "kernels are chosen for the trained one"


def test_one_image_size_needs_no_recorded_tokens(bundle_fp32: Bundle) -> None:
    assert patches_of(bundle_fp32) is None


def test_an_image_size_that_was_not_recorded(bundle_wide: Bundle) -> None:
    limits = bundle_wide.manifest.limits.model_copy(update={"image_sizes": (24, 12)})
    more = Bundle(bundle_wide.path, bundle_wide.manifest.model_copy(update={"limits": limits}))
    with pytest.raises(InputError, match=r"reference\.npz: expected the vision graph's outputs .* none at 12 pixels"):
        patches_of(more)


def test_a_batch_beyond_the_limit(bundle_fp32: Bundle) -> None:
    with pytest.raises(InputError, match=r"--batch: expected 1 to 5 \(this bundle's limit\), found 8"):
        profiles_of("vision", bundle_fp32.manifest, (1, 8))


def test_an_axis_that_nobody_knows(bundle_fp32: Bundle) -> None:
    manifest = bundle_fp32.manifest
    odd = {"pixels": TensorSpec(dtype="float32", shape=("batch", 3, "rows", 16))}
    vision = manifest.graphs["vision"].model_copy(update={"inputs": odd})
    changed: Manifest = manifest.model_copy(update={"graphs": {"vision": vision}})
    with pytest.raises(InputError, match="graph 'vision': input 'pixels' has a varying size 'rows' whose range is not"):
        profiles_of("vision", changed)
