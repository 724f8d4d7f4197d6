"""Extreme inputs reach every graph, and a number that overflows is told with the place where it does."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.latency import read_latency, table
from export.probes import extreme_pixels, probe
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from tests.export.conftest import QUIET


def test_every_graph_ran_and_the_bundle_says_so(bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    for bundle in (bundle_fp32, bundle_int8):
        probed = json.loads((bundle.path / "parity.json").read_text())["probes"]
        assert probed == {"vision": 1, "qformer": 1, "embed": 4, "language": 4}
        assert "(10 runs), and gave finite numbers" in (bundle.path / "README.md").read_text().replace("\n", " ")


def test_the_pixels_are_the_ends_of_the_scale(bundle_fp32: Bundle) -> None:
    settings = bundle_fp32.manifest.preprocess
    pixels_BCHW = extreme_pixels(bundle_fp32.manifest, 5)
    black, white = ((np.array([end, end, end]) - settings.mean) / settings.std for end in (0.0, 1.0))
    for row, ends in enumerate(({0}, {1}, {0, 1}, {0, 1}, {0})):
        for channel in range(3):
            expected = sorted(np.float32((black, white)[end][channel]) for end in ends)
            assert np.allclose(np.unique(pixels_BCHW[row, channel]), expected, atol=1e-6)


def overflowing(bundle: Bundle, name: str, to: Path, scale: float) -> Bundle:
    """A copy in which a graph's first output passes through FP16, `scale` times as large, and back."""
    path = shutil.copytree(bundle.path, to)
    model = onnx.load(path / f"onnx/{name}.onnx")
    output = model.graph.output[0].name
    maker = next(node for node in model.graph.node if output in node.output)
    maker.output[list(maker.output).index(output)] = "inner"
    for node in model.graph.node:
        for place, tensor in enumerate(node.input):
            if tensor == output:
                node.input[place] = "inner"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), "scale"))
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["inner", "scale"], ["large"]),
            helper.make_node("Cast", ["large"], ["half"], to=TensorProto.FLOAT16, name="to_half"),
            helper.make_node("Cast", ["half"], ["single"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["single", "scale"], [output]),
        ]
    )
    onnx.save(model, path / f"onnx/{name}.onnx")
    return Bundle(path, bundle.manifest)


@pytest.mark.parametrize("name", ["vision", "qformer", "embed", "language"])
def test_an_overflow_is_found_and_located(name: str, bundle_fp32: Bundle, tmp_path: Path) -> None:
    spoilt = overflowing(bundle_fp32, name, tmp_path / name, 1e6)
    with pytest.raises(CheckFailed, match=rf"graph '{name}': NaN or infinity in .*, first in 'half' \(Cast to_half\)"):
        probe(spoilt, QUIET)
    assert not list(spoilt.path.rglob("*.probe"))


def test_what_fits_is_no_overflow(bundle_fp32: Bundle, tmp_path: Path) -> None:
    assert probe(overflowing(bundle_fp32, "vision", tmp_path / "fits", 2.0), QUIET)["vision"] == 1


def test_the_table_has_every_graph_at_both_batch_sizes(bundle_int8: Bundle) -> None:
    timings = read_latency(bundle_int8.path)
    cases = {("vision", "run"), ("qformer", "run"), ("embed", "run"), ("language", "prefill"), ("language", "step")}
    assert {(timing.graph, timing.case, timing.rows) for timing in timings} == {
        (*case, n) for case in cases for n in (1, 5)
    }
    assert all(timing.median_ms > 0 and timing.runs == 5 for timing in timings)
    shown = table(bundle_int8.manifest, timings)
    assert shown in (bundle_int8.path / "README.md").read_text()
    lines = shown.splitlines()
    assert lines[0] == "| graph | precision | MiB | case | batch 1 (ms) | batch 5 (ms) |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| vision", "int8"],
        ["| qformer", "int8"],
        ["| embed", "fp32"],
        ["| language", "int8"],
        ["| language", "int8"],
        ["| all", ""],
    ]
    assert len({line.count("|") for line in lines}) == 1
