"""The wrappers against the plain model: cached equals recomputed, padded equals not padded, no question equals none."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from export.graphs import Graph, graphs_of
from export.language_modules import LanguageGraph
from trainer.blip2 import Blip2

WIDTH = 32


def empty_cache(graph: Graph, rows: int) -> dict[str, np.ndarray]:
    shapes = {name: plan.example.shape for name, plan in graph.inputs.items() if name.startswith("past_")}
    return {name: np.zeros((rows, heads, 0, width), np.float32) for name, (_, heads, _, width) in shapes.items()}


def fed_in_pieces(graph: Graph, embeds_BSD: np.ndarray, mask_BS: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits after the last position when the sequence arrives in `pieces` through the cache."""
    past, done, logits = empty_cache(graph, len(embeds_BSD)), 0, np.empty(0)
    for piece in pieces:
        feeds = {"inputs_embeds": embeds_BSD[:, done : done + piece], "attention_mask": mask_BS[:, : done + piece]}
        outputs = graph.run_eager(feeds | past)
        logits, done = outputs["logits"], done + piece
        past = {name: outputs[name.replace("past", "present")] for name in past}
    assert done == embeds_BSD.shape[1]
    return logits


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [6, 1, 2]])
def test_cached_equals_recomputed(graphs: dict[str, Graph], model: Blip2, pieces: list[int]) -> None:
    embeds = torch.randn(2, 9, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.language_model(inputs_embeds=embeds, use_cache=False).logits[:, -1].numpy()
    logits = fed_in_pieces(graphs["language"], embeds.numpy(), np.ones((2, 9), np.int64), pieces)
    np.testing.assert_allclose(logits, whole, atol=2e-5)


def test_rows_padded_on_the_left_equal_rows_without_padding(graphs: dict[str, Graph]) -> None:
    assert_padding_is_unseen(graphs["language"].module)


def test_rotary_positions_count_the_mask() -> None:
    """A family that takes `position_ids`: its wrapper must not count the padding either."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    module = LanguageGraph(LlamaForCausalLM(config).eval())
    assert module.takes_positions
    assert_padding_is_unseen(module)


@torch.no_grad()
def assert_padding_is_unseen(module: torch.nn.Module) -> None:
    """One row alone, and the same row behind two pads: equal logits at prefill and at the next step."""
    embeds, after = torch.randn(1, 5, WIDTH), torch.randn(1, 1, WIDTH)
    padded = torch.cat([torch.full((1, 2, WIDTH), 9.0), embeds], dim=1)
    mask_alone, mask_padded = torch.ones(1, 5, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    one = torch.ones(1, 1, dtype=torch.long)
    none = [torch.zeros(1, tensor.shape[1], 0, tensor.shape[3]) for tensor in first_cache(module)]
    alone, behind = module(embeds, mask_alone, *none), module(padded, mask_padded, *none)
    torch.testing.assert_close(alone[0], behind[0], atol=1e-5, rtol=0)
    step = module(after, torch.cat([mask_alone, one], 1), *alone[1:])
    step_behind = module(after, torch.cat([mask_padded, one], 1), *behind[1:])
    torch.testing.assert_close(step[0], step_behind[0], atol=1e-5, rtol=0)


def first_cache(module: torch.nn.Module) -> list[torch.Tensor]:
    cache = module.language_model(inputs_embeds=torch.zeros(1, 1, WIDTH), use_cache=True).past_key_values
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def test_a_hidden_question_is_no_question(graphs: dict[str, Graph], model: Blip2) -> None:
    image_embeds = np.random.default_rng(0).normal(size=(2, 17, WIDTH)).astype(np.float32)
    ids = np.array([[2, 9, 11, 3]] * 2)
    hidden = graphs["qformer"].run_eager(
        {"image_embeds": image_embeds, "question_ids": ids, "question_mask": np.zeros_like(ids)}
    )
    with torch.no_grad():
        none = model.query_prefix(torch.from_numpy(image_embeds)).numpy()
    np.testing.assert_allclose(hidden["prefix"], none, atol=1e-5)
    asked = graphs["qformer"].run_eager(
        {"image_embeds": image_embeds, "question_ids": ids, "question_mask": np.ones_like(ids)}
    )
    assert np.abs(asked["prefix"] - none).max() > 1e-2


def test_examples_differ_in_every_varying_size(graphs: dict[str, Graph]) -> None:
    sizes: dict[str, set[int]] = {}
    for graph in graphs.values():
        for plan in graph.inputs.values():
            for axis, name in plan.varying.items():
                sizes.setdefault(name, set()).add(plan.example.shape[axis])
    assert {name: len(found) for name, found in sizes.items()} == dict.fromkeys(sizes, 1)
    found = [size for (size,) in sizes.values()]
    assert min(found) >= 2
    assert len(set(found)) == len(found)


def test_a_model_that_reads_no_question_has_no_question_inputs(model: Blip2) -> None:
    plain = Blip2(
        model.config,
        model.vision,
        model.language_model,
        model.tokenizer,
        model.text_tokenizer,
        question_conditioned=False,
    ).eval()
    assert list(graphs_of(plain)["qformer"].inputs) == ["image_embeds"]
