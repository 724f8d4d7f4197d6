"""What values pass through a graph, measured by onnxruntime on real feeds; memory does not grow with their number.

Shape letters: none, tensors of any shape
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graphs import Arrays
from export.precision.files import element_types, lift_constants, read_structure
from runtime.errors import require


def largest_values(file: Path, feeds: Sequence[Arrays]) -> dict[str, float]:
    """Largest magnitude of every float tensor that the graph computes or is fed; NaN where one is NaN."""
    model = read_structure(file)
    lift_constants(model)
    types = element_types(model)
    known = {tensor.name for tensor in model.graph.initializer}
    names = [name for name, kind in types.items() if kind == TensorProto.FLOAT and name not in known]
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "probe_flat"))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "probe_zero"))
    del model.graph.output[:]
    for place, name in enumerate(names):
        steps = [f"probe_{place}_{step}" for step in ("flat", "some", "size", "largest")]
        model.graph.node.extend(
            [
                helper.make_node("Reshape", [name, "probe_flat"], steps[:1]),
                helper.make_node("Concat", [steps[0], "probe_zero"], steps[1:2], axis=0),  # no tensor is empty then
                helper.make_node("Abs", steps[1:2], steps[2:3]),
                helper.make_node("ReduceMax", steps[2:3], steps[3:], keepdims=0),
            ]
        )
        model.graph.output.append(helper.make_tensor_value_info(steps[3], TensorProto.FLOAT, []))
    found = np.zeros(len(names))
    with session(model, file) as probe:
        for feed in feeds:
            found = np.maximum(found, np.array(probe.run(None, feed)))
    return dict(zip(names, found.tolist(), strict=True))


@contextmanager
def session(model: onnx.ModelProto, file: Path) -> Iterator[Any]:
    """A changed graph run beside its file, because its weights may lie there; nothing of it stays on the disk."""
    ort: Any = require("onnxruntime", extra="cpu", why="Calibration")
    options, probe = ort.SessionOptions(), file.with_name(f"{file.stem}.probe.onnx")
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnx.save(model, str(probe))
    try:
        yield ort.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
    finally:
        probe.unlink()
