"""A module behind the runtime's decode loop: what it was run with is kept, and nothing that is not a number passes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.eager import Eager, Recorder, require_finite
from export.feeds import StoredFeeds
from export.graphs import Graph
from runtime.errors import CheckFailed


def feeds(graph: Graph) -> dict[str, np.ndarray]:
    return {name: plan.example.numpy() for name, plan in graph.inputs.items()}


def test_runs_are_read_back_as_they_were(graphs: dict[str, Graph], tmp_path: Path) -> None:
    stored = StoredFeeds(tmp_path / "vision")
    recorder = Recorder(graphs["vision"], stored)
    given = [{"pixels": np.random.default_rng(i).normal(size=(2, 3, 16, 16)).astype(np.float32)} for i in range(3)]
    made = [recorder.run(one) for one in given]
    assert len(stored) == 3
    for kept, inputs, outputs in zip(stored, given, made, strict=True):
        assert np.array_equal(kept["pixels"], inputs["pixels"])
        assert np.array_equal(Eager(graphs["vision"]).run(kept)["image_embeds"], outputs["image_embeds"])


def test_a_cache_that_is_handed_on_is_kept(graphs: dict[str, Graph], tmp_path: Path) -> None:
    stored, inputs = StoredFeeds(tmp_path / "language"), feeds(graphs["language"])
    recorder = Recorder(graphs["language"], stored)
    caches = {name: array[:, :, :0] for name, array in inputs.items() if name.startswith("past_")}
    prefill = recorder.run({**inputs, "attention_mask": inputs["attention_mask"][:, -3:], **caches})
    past = {name: prefill[name.replace("past_", "present_", 1)] for name in caches}
    recorder.run({"inputs_embeds": inputs["inputs_embeds"][:, :1], "attention_mask": np.ones((2, 4), int), **past})
    assert [feed["past_key_0"].shape[2] for feed in stored] == [0, 3]
    assert all(np.array_equal(stored[1][name], array) for name, array in past.items())


def test_shapes_tell_the_decode_loop_its_caches(graphs: dict[str, Graph]) -> None:
    batch, heads, past, width = Eager(graphs["language"]).inputs()["past_key_0"]
    assert (batch, past) == ("batch", "past") and isinstance(heads, int) and isinstance(width, int)


def test_nan_is_refused_with_its_output(graphs: dict[str, Graph], tmp_path: Path) -> None:
    graph = graphs["embed"]
    weight = graph.module.embedding.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[1] = float("nan")
        with pytest.raises(CheckFailed, match=r"graph 'embed': eager PyTorch gives NaN .* of 'inputs_embeds'"):
            Recorder(graph, StoredFeeds(tmp_path / "embed")).run(feeds(graph))
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_an_empty_array_is_finite() -> None:
    require_finite({"cache": np.zeros((2, 0, 3), np.float32)}, "it gives", "no")
