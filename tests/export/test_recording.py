"""What a recording says is what the module gave, and a cache that is handed on is written once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from export.graphs import Graph
from export.recording import ArrayFile, Recorder
from runtime.errors import CheckFailed


def feeds(graph: Graph) -> dict[str, np.ndarray]:
    return {name: plan.example.numpy() for name, plan in graph.inputs.items()}


def test_runs_are_read_back_as_they_were(graphs: dict[str, Graph], tmp_path: Path) -> None:
    recorder = Recorder(graphs["vision"], tmp_path)
    given = [{"pixels": np.random.default_rng(i).normal(size=(2, 3, 16, 16)).astype(np.float32)} for i in range(3)]
    made = [recorder.run(one) for one in given]
    assert len(recorder.recording) == 3
    for run, inputs, outputs in zip(recorder.recording, given, made, strict=True):
        assert run.case == "run"
        assert np.array_equal(run.inputs["pixels"], inputs["pixels"])
        assert np.array_equal(run.outputs["image_embeds"], outputs["image_embeds"])
        assert not run.outputs["image_embeds"].flags.writeable
    assert np.array_equal(recorder.recording.firsts()[0].inputs["pixels"], given[0]["pixels"])


def test_a_cache_that_is_handed_on_is_written_once(graphs: dict[str, Graph], tmp_path: Path) -> None:
    recorder, inputs = Recorder(graphs["language"], tmp_path), feeds(graphs["language"])
    caches = {name: array[:, :, :0] for name, array in inputs.items() if name.startswith("past_")}
    prefill = recorder.run({**inputs, "attention_mask": inputs["attention_mask"][:, -3:], **caches})
    before = (tmp_path / "language.runs").stat().st_size
    past = {name: prefill[name.replace("past_", "present_", 1)] for name in caches}
    step = recorder.run(
        {"inputs_embeds": inputs["inputs_embeds"][:, :1], "attention_mask": np.ones((2, 4), int), **past}
    )
    written = (tmp_path / "language.runs").stat().st_size - before
    assert written == sum(a.nbytes for a in step.values()) + inputs["inputs_embeds"][:, :1].nbytes + 8 * 8
    first, second = recorder.recording
    assert (first.case, second.case) == ("prefill", "step")
    assert all(np.array_equal(second.inputs[name], array) for name, array in past.items())


def test_shapes_tell_the_decode_loop_its_caches(graphs: dict[str, Graph], tmp_path: Path) -> None:
    shapes = Recorder(graphs["language"], tmp_path).inputs()
    batch, heads, past, width = shapes["past_key_0"]
    assert (batch, past) == ("batch", "past") and isinstance(heads, int) and isinstance(width, int)


def test_nan_is_refused_with_its_output(graphs: dict[str, Graph], tmp_path: Path) -> None:
    graph = graphs["embed"]
    weight = graph.module.embedding.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[1] = float("nan")
        with pytest.raises(CheckFailed, match=r"graph 'embed': eager PyTorch gives NaN .* of 'inputs_embeds'"):
            Recorder(graph, tmp_path).run(feeds(graph))
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_empty_arrays_and_an_existing_file(tmp_path: Path) -> None:
    file = ArrayFile(tmp_path / "x")
    empty, full = file.put(np.zeros((2, 0, 3), np.float32)), file.put(np.arange(3))
    assert file.get(empty).shape == (2, 0, 3) and np.array_equal(file.get(full), [0, 1, 2])
    with pytest.raises(FileExistsError):
        ArrayFile(tmp_path / "x")
