"""FP8 (E4M3) weights and activations, for GPUs of compute capability 8.9 and above.

The pairs stand where INT8's stand (activations.py, without SmoothQuant: FP8 keeps small values beside large ones by
itself); ranges and weights are measured anew. ModelOpt 0.47 turns INT8 scales into FP8 scales by 448/127 where it
should be 127/448, and so uses a twelfth of the type's range; see LOG.md for what that costs.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from export.graphs import Arrays
from export.precision.activations import INT8_MAX, Calibration, activation_pairs, quantized, unquantized
from export.precision.files import require_opset, save
from export.precision.kept import Kept

FP8_MAX = 448.0
"""Largest E4M3 number."""
OPSET = 23
"""From here on a Transpose may move 8-bit floats, which onnxruntime makes it do."""
ZERO = "fp8_zero"


def write_fp8(file: Path, feeds: Sequence[Arrays], keep: Collection[str], *, calibration: Calibration) -> list[Kept]:
    """Rewrite a graph in place: E4M3 weights per channel, E4M3 activations with ranges measured on `feeds`.

    Raises:
        CheckFailed: the result is not valid ONNX.
    """
    traced = onnx.load(str(file))
    original = {tensor.name: tensor for tensor in traced.graph.initializer}
    weight_of = {node.name: list(node.input) for node in traced.graph.node}
    model = quantized(traced, file, feeds, keep, replace(calibration, smooth_quant=None))
    kept = unquantized(model, keep)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), ZERO))
    for name in {node.input[1] for pair in activation_pairs(model) for node in pair}:
        scale = numpy_helper.to_array(constants[name]) * np.float32(INT8_MAX / FP8_MAX)
        constants[name].CopyFrom(numpy_helper.from_array(scale, name))
    for node in [node for pair in activation_pairs(model) for node in pair]:
        node.input[2] = ZERO
    made_by = {output: node for node in model.graph.node for output in node.output}
    done = set[str]()
    for reader in model.graph.node:
        for place, name in enumerate(reader.input):
            weight = made_by.get(name)
            if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in constants:
                continue
            if weight.name not in done:
                axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 1)
                exact = numpy_helper.to_array(original[weight_of[reader.name][place]])
                narrow, scale = _narrowed(exact, int(axis))
                zeros = np.zeros(scale.shape, ml_dtypes.float8_e4m3fn)
                for constant, array in zip(weight.input, (narrow, scale, zeros), strict=True):
                    constants[constant].CopyFrom(numpy_helper.from_array(array, constant))
                done.add(weight.name)
    del model.graph.value_info[:]  # it says INT8
    require_opset(model, OPSET)
    save(model, file)
    return kept


def _narrowed(exact: npt.NDArray[np.float32], axis: int) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.float32]]:
    """E4M3 values, and one scale per channel of `axis`."""
    others = tuple(other for other in range(exact.ndim) if other != axis % exact.ndim)
    largest = np.abs(exact).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1)).astype(np.float32)
    narrow = np.clip(exact / scale, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
    return narrow, scale.reshape(-1)
