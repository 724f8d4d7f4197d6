"""Ranges of activations: right by each method, and in memory that does not grow with the images."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import ranges
from export.graphs import Arrays
from export.precision.activations import Calibration, write_int8
from export.ranges import Sketch, observe, weighted_inputs, written_ranges
from runtime.errors import CheckFailed

WIDTH = 64


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x → MatMul → Gelu → MatMul."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["middle"], name="one"),
        helper.make_node("Gelu", ["middle"], ["bent"], name="gelu"),
        helper.make_node("MatMul", ["bent", "second"], ["y"], name="two"),
    ]
    weights = [
        numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8, name)
        for name in ("first", "second")
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "graph", tensors[:1], tensors[1:], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    file = tmp_path_factory.mktemp("graph") / "graph.onnx"
    onnx.save(model, file)
    return file


def feeds(count: int, outlier: float = 0.0) -> Iterator[Arrays]:
    rng = np.random.default_rng(1)
    for number in range(count):
        x = rng.normal(size=(256, WIDTH)).astype(np.float32)
        x[0, 0] = outlier if number == 0 else x[0, 0]
        yield {"x": x}


def test_what_meets_a_constant_matrix_is_observed(graph: Path) -> None:
    assert weighted_inputs(onnx.load(graph)) == ["x", "bent"]


def test_minmax_is_the_widest_value(graph: Path) -> None:
    every = np.concatenate([feed["x"] for feed in feeds(3)])
    found = observe(graph, feeds(3), "minmax")
    assert found["x"] == pytest.approx((every.min(), every.max()))
    assert -0.18 < found["bent"][0] < -0.16, "Gelu's own least value"
    assert [path.name for path in graph.parent.iterdir()] == ["graph.onnx"], "nothing is left beside the graph"


def test_percentile_leaves_the_rarest_out(graph: Path) -> None:
    every = np.abs(np.concatenate([feed["x"] for feed in feeds(6, 30.0)])).ravel()
    low, high = observe(graph, feeds(6, 30.0), "percentile")["x"]
    assert high == pytest.approx(float(np.quantile(every, ranges.SHARE_KEPT)), abs=30 / ranges.BINS * 2)
    assert low == pytest.approx(-high, abs=0.6)


def test_entropy_clips_an_outlier_and_keeps_the_bulk(graph: Path) -> None:
    for outlier, least, most in ((0.0, 2.0, 6.0), (30.0, 2.0, 15.0)):
        high = observe(graph, feeds(6, outlier), "entropy")["x"][1]
        assert least < high < most, outlier


def test_entropy_keeps_a_uniform_tensor_whole() -> None:
    sketch = Sketch()
    sketch.add(np.random.default_rng(0).uniform(-1, 1, 200_000))
    assert sketch.range("entropy")[1] > 0.95


def test_a_growing_range_loses_no_count() -> None:
    """Small values first, then ever larger ones: the histogram widens, its percentiles stay right."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=20_000) * size for size in (1e-3, 1e-2, 0.1, 1.0)]
    sketch = Sketch()
    for part in [np.zeros(10), *parts]:
        sketch.add(part)
    exact = float(np.quantile(np.abs(np.concatenate(parts)), ranges.SHARE_KEPT))
    assert sketch.range("percentile")[1] == pytest.approx(exact, rel=0.02)
    assert sketch.range("minmax") == (min(map(np.min, parts)), max(map(np.max, parts)))


def test_a_tensor_of_zeros_has_an_empty_range() -> None:
    sketch = Sketch()
    sketch.add(np.zeros(5))
    for method in ("minmax", "percentile", "entropy"):
        assert sketch.range(method) == (0.0, 0.0)


def test_memory_does_not_grow_with_the_images(graph: Path) -> None:
    """onnxruntime's own arrays are numpy's here, so tracemalloc sees them."""
    peaks = []
    for count in (4, 40):
        tracemalloc.start()
        observe(graph, feeds(count), "entropy")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_refused(graph: Path, value: float) -> None:
    with pytest.raises(CheckFailed, match=r"graph.onnx: tensor 'x' holds NaN or infinity"):
        observe(graph, feeds(2, value), "minmax")


def test_the_method_decides_what_is_written(graph: Path, tmp_path: Path) -> None:
    """One row of 12,000 is far out in every channel: smoothing cannot help, percentile and entropy clip it."""
    rng, written = np.random.default_rng(2), {}
    rows = [{"x": rng.normal(size=(2048, WIDTH)).astype(np.float32)} for _ in range(6)]
    rows[0]["x"][0] = 30.0
    for method in ("minmax", "percentile", "entropy"):
        file = tmp_path / f"{method}.onnx"
        file.write_bytes(graph.read_bytes())
        write_int8(file, rows, (), calibration=Calibration(method, 0.95), own_pairs=True)
        written[method] = next(iter(written_ranges(file).values()))[1]  # of x
    assert written["percentile"] < 0.5 * written["minmax"]
    assert written["entropy"] < 0.8 * written["minmax"]
