"""The decoder with a fixed-size cache, written beside the portable one and judged by what eager PyTorch gave that one.

ONNX Runtime runs the same file on the CPU, in FP16; it copies the caches that a GPU engine updates in place.

Shape letters: B rows, S new positions, P cached positions, L positions of the fixed cache, h heads, d head width
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export.config import Tolerance
from export.graphs import Graph
from export.judge import Parity, cosine
from export.static_cache import require_static, static_graph
from export.trace import DATA_SUFFIX, trace
from runtime.backends.ort import OrtEngine
from runtime.bundle import Bundle
from runtime.checks import relative_error
from runtime.errors import InputError, QforgeError
from runtime.manifest import Limits
from runtime.precision import LanguagePrecision
from runtime.reference import GraphCase
from runtime.speaker import LANGUAGE_GRAPHS, STATIC
from runtime.static_cache import PortableFace
from trainer.blip2 import Blip2


def write_static(
    model: Blip2, portable: Mapping[str, Graph], held_in: LanguagePrecision, limits: Limits, folder: Path
) -> Graph:
    """Trace the static twin of the language model's decoder into `folder`; returns it.

    Raises:
        InputError: a family that has no such form; says why.
    """
    graph = static_graph(model, portable[LANGUAGE_GRAPHS[model.style][-1]], held_in, limits)
    try:
        file = trace(graph, folder)
    except torch.onnx.OnnxExporterError as error:
        said = next((cause for cause in _causes(error) if isinstance(cause, QforgeError)), None)
        reason = str(said or list(_causes(error))[-1]).strip().splitlines()[0]
        raise InputError(
            f"export.static_cache: {type(model.language_model).__name__} cannot be traced with a cache of fixed size: "
            f"{reason}"
        ) from error
    require_static(onnx.load(str(file), load_external_data=False), graph)
    return graph


def judge_static(bundle: Bundle, graph: Graph, cases: Sequence[GraphCase], tolerance: Tolerance) -> tuple[Parity, ...]:
    """How far the static twin is from what eager gave the portable graph, prefill and step; the caller judges."""
    parities, precision = list[Parity](), bundle.manifest.language_precision
    with tempfile.TemporaryDirectory(dir=bundle.path.parent, prefix=".widened-") as folder:
        file = bundle.graph(graph.name)
        held_in: np.dtype[Any] = np.dtype(np.float16)
        if precision == "bf16":
            file, held_in = widened(file, Path(folder) / file.name), np.dtype(np.float32)
        with PortableFace(OrtEngine(file), held_in) as portable:
            for case in (case for case in cases if case.graph == graph.name.removesuffix(STATIC)):
                found = portable.run(case.inputs)
                for name, expected in case.outputs.items():
                    allowed = tolerance.max_error, tolerance.min_cosine
                    parity = Parity(graph.name, case.case, name, precision, *allowed, runs=1)
                    parity.max_error = relative_error(found[name], expected)
                    parity.cosine = cosine(found[name], expected) if np.isfinite(parity.max_error) else 0.0
                    parities.append(parity)
    return tuple(parities)


def widened(file: Path, out: Path) -> Path:
    """A copy of a BF16 graph that computes in fp32 with the same, rounded weights: ONNX Runtime has no BF16 on a CPU.

    It shows that the graph and its weights are right; what BF16 arithmetic adds is the GPU's to show.
    """
    model = onnx.load(str(file))
    wide, narrow = onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                tensors.append(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    for tensor in tensors:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    onnx.save(model, str(out), save_as_external_data=True, location=out.name + DATA_SUFFIX)
    return out


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(cause)
    return found
