"""What the tests of precisions do with single graphs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


def run_graph(file: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs; feeds are cast to what the graph takes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}
    given = {value.name: feeds[value.name].astype(kinds[value.type]) for value in session.get_inputs()}
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, given), strict=True))


def write_graph(file: Path, nodes: list[onnx.NodeProto], constants: Mapping[str, Array], width: int = 4) -> Path:
    """A graph from x [n, width] to y [n, width]."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", "y")]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file
