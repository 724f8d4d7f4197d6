"""Ranges of activations, streamed: one pass over the feeds, memory that does not grow with their number.

minmax       widest value seen.
percentile   99.99 % of all magnitudes; what lies beyond is clipped.
entropy      where clipping and rounding to 8 bits change the distribution least (Kullback-Leibler, as TensorRT's
             calibrator did it; its removal is why precision is written into the graph, reference/export.md §1).

What a tensor was is kept as a histogram of magnitudes. When a value falls beyond it, pairs of bins are merged and the
width doubles, so that nothing is ever clipped by the sketch itself.
"""

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from export.graphs import Arrays
from runtime.backends.ort import OrtEngine
from runtime.errors import CheckFailed
from runtime.precision import RangeMethod

Ranges = dict[str, tuple[float, float]]
"""Tensor → (low, high)."""

BINS = 2048
"""Of a histogram; 16 KiB a tensor."""
SHARE_KEPT = 0.9999
LEVELS = 128
"""Magnitudes that INT8 tells apart."""
STRIDE = 16
"""Bins between two thresholds that entropy tries."""
WEIGHTED = ("MatMul", "Gemm", "Conv")
"""Operators whose constant matrix or kernel is what INT8 is about."""


class Sketch:
    """What is remembered of a tensor: extremes and a histogram of magnitudes."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self._top = 0.0
        self._counts = np.zeros(BINS, np.int64)

    def add(self, values: npt.NDArray[Any]) -> None:
        """Take in the values of one run; all must be finite."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        magnitudes = np.abs(values.ravel())
        largest = float(magnitudes.max())
        if not self._top:  # nothing but zeros so far, all of them in the first bin
            self._top = largest
        if not self._top:
            self._counts[0] += magnitudes.size
            return
        while largest > self._top:
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self._top *= 2
        places = np.minimum((magnitudes * (BINS / self._top)).astype(np.int64), BINS - 1)
        self._counts += np.bincount(places, minlength=BINS)

    def range(self, method: RangeMethod) -> tuple[float, float]:
        """(low, high) that the method keeps."""
        if method == "minmax" or not self._top:
            return self.low, self.high
        threshold = self._percentile() if method == "percentile" else self._entropy()
        return max(self.low, -threshold), min(self.high, threshold)

    def _percentile(self) -> float:
        upto = np.searchsorted(np.cumsum(self._counts), SHARE_KEPT * self._counts.sum())
        return float(upto + 1) * self._top / BINS

    def _entropy(self) -> float:
        """The threshold whose clipped and rounded distribution loses least."""
        tried = range(LEVELS, BINS + 1, STRIDE)
        losses = [_divergence(self._counts, kept) for kept in tried]
        return tried[int(np.argmin(losses))] * self._top / BINS


def observe(file: Path, feeds: Iterable[Arrays], method: RangeMethod, tensors: Sequence[str] | None = None) -> Ranges:
    """Ranges of tensors of a graph over all feeds; by default of every activation that meets a constant matrix.

    Raises:
        CheckFailed: a tensor holds NaN or infinity; names it.
    """
    model = onnx.load(str(file), load_external_data=False)
    names = list(tensors) if tensors is not None else weighted_inputs(model)
    own = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in own
    )
    opened = file.with_name(f".{secrets.token_hex(4)}.onnx")  # beside the graph, where its external weights are
    try:
        onnx.save(model, str(opened))
        engine = OrtEngine(opened)
    finally:
        opened.unlink(missing_ok=True)
    sketches = {name: Sketch() for name in names}
    with engine:
        for feed in feeds:
            found = feed | engine.run(feed)
            for name, sketch in sketches.items():
                if not np.isfinite(found[name]).all():
                    raise CheckFailed(
                        f"{file.name}: tensor '{name}' holds NaN or infinity on a real image; no range fits"
                    )
                sketch.add(found[name])
    return {name: sketch.range(method) for name, sketch in sketches.items()}


def weighted_inputs(model: onnx.ModelProto) -> list[str]:
    """Activations that a MatMul, Gemm or Conv multiplies with a constant, each once, in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    found = [
        name
        for node in model.graph.node
        if node.op_type in WEIGHTED and constants & set(node.input[:2])
        for name in node.input[:2]
        if name not in constants
    ]
    return list(dict.fromkeys(found))


def written_ranges(file: Path) -> Ranges:
    """Ranges that the Q/DQ pairs of a graph state for its activations: what INT8 really computes with."""
    model = onnx.load(str(file))
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found: Ranges = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in constants or node.input[1] not in constants:
            continue
        scale = onnx.numpy_helper.to_array(constants[node.input[1]])
        zero = constants[node.input[2]] if len(node.input) > 2 else None
        largest = _largest(zero.data_type if zero is not None else TensorProto.UINT8)
        if scale.size == 1 and node.input[0] not in found:
            high = float(scale.ravel()[0]) * largest
            found[node.input[0]] = (-high, high)
    return found


def _largest(data_type: int) -> float:
    """Largest value of a quantised type."""
    known: dict[int, float] = {
        TensorProto.INT8: 127.0,
        TensorProto.FLOAT8E4M3FN: 448.0,
        TensorProto.FLOAT8E5M2: 57344.0,
    }
    return known.get(data_type, 255.0)


def _divergence(counts: npt.NDArray[np.int64], kept: int) -> float:
    """Kullback-Leibler distance between `kept` bins with the rest clipped onto the last, and their 128-level copy."""
    clipped = counts[:kept].astype(np.float64)
    occupied = clipped > 0
    edges = (np.arange(kept) * LEVELS) // kept
    mass = np.bincount(edges, weights=clipped, minlength=LEVELS)
    places = np.bincount(edges, weights=occupied, minlength=LEVELS)
    copied = np.where(occupied, (mass / np.maximum(places, 1))[edges], 0.0)
    clipped[-1] += counts[kept:].sum()
    if not copied.sum():
        return np.inf
    p, q = clipped / clipped.sum(), copied / copied.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))))
