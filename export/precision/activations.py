"""INT8 weights and activations: NNCF's ONNX backend, TRANSFORMER + PERFORMANCE, SmoothQuant included.

One symmetric Q/DQ graph, zero points 0, that ONNX Runtime runs fastest and the TensorRT parser accepts
(reference/export.md §3.4). Where NNCF puts the pairs, the ranges may come from elsewhere: NNCF 3.4 has no entropy, and
its quantiles average over runs, so `percentile` and `entropy` are those of export/ranges.py, over all feeds.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from export.graphs import Arrays
from export.precision.files import save
from export.precision.kept import ASKED, Kept
from export.quiet import quiet
from export.ranges import observe
from runtime.errors import CheckFailed, require
from runtime.precision import RangeMethod

MATRICES = {"MatMul", "Gemm", "Conv"}
INT8_MAX = 127


@dataclass(frozen=True)
class Calibration:
    """How ranges of activations are found."""

    method: RangeMethod
    smooth_quant: float | None
    """SmoothQuant's strength, how much of an outlier moves from activations into weights; None leaves it out."""


def write_int8(
    file: Path, feeds: Sequence[Arrays], keep: Collection[str], *, calibration: Calibration, own_pairs: bool
) -> list[Kept]:
    """Rewrite a graph in place: INT8 weights per channel, INT8 activations with ranges measured on `feeds`.

    `own_pairs` gives each reader of a quantised activation a pair of its own, which only onnxruntime needs.

    Raises:
        CheckFailed: the result is not symmetric, or not valid ONNX.
    """
    traced = onnx.load(str(file))
    model = quantized(traced, file, feeds, keep, calibration)
    require_symmetric(model, file.stem)
    kept = unquantized(model, keep)
    if own_pairs:
        one_pair_per_reader(model)
    save(model, file)
    return kept


def quantized(
    traced: onnx.ModelProto, file: Path, feeds: Sequence[Arrays], keep: Collection[str], calibration: Calibration
) -> onnx.ModelProto:
    """The graph with INT8 Q/DQ pairs; `file` is where `traced` lies.

    `minmax`: a range holds every value seen. NNCF's own choice, the mean of each run's largest, clips the larger half
    of the runs: on the demo's halves its largest error was 1.3 times that of this one (see LOG.md).
    """
    nncf = _nncf()
    widest = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    strength = -1.0 if calibration.smooth_quant is None else calibration.smooth_quant
    smooth = nncf.quantization.advanced_parameters.AdvancedSmoothQuantParameters(matmul=strength)
    with quiet():
        model: onnx.ModelProto = nncf.quantize(
            traced,
            nncf.Dataset(feeds),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(feeds),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=widest, smooth_quant_alphas=smooth
            ),
            ignored_scope=nncf.IgnoredScope(names=[*_attention_products(traced), *keep], validate=False),
        )
        if calibration.method != "minmax":
            _new_ranges(model, file, feeds, calibration.method)
    return model


def activation_pairs(model: onnx.ModelProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """QuantizeLinear and DequantizeLinear of every quantised activation; weights have only the second."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    ends = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in made_by]
    return [(made_by[node.input[0]], node) for node in ends]


def unquantized(model: onnx.ModelProto, keep: Collection[str]) -> list[Kept]:
    """Matrix products that read no quantised value; of a stored matrix it is enough that the matrix is quantised."""
    pairs = {output for node in model.graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    kept = list[Kept]()
    for node in model.graph.node:
        if node.op_type in MATRICES and not pairs & set(node.input[:2]):
            why = "the quantiser found no place for it"
            if node.name in keep:
                why = ASKED
            elif not constants & set(node.input):
                why = "a product of two computed tensors: INT8 costs accuracy there and gains nothing"
            kept.append(Kept(node.name, node.op_type, "fp32", why))
    return kept


def require_symmetric(model: onnx.ModelProto, name: str) -> None:
    """Every zero point is int8 and 0; CheckFailed naming the first node where it is not."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"} or len(node.input) < 3:
            continue
        zero_point = numpy_helper.to_array(constants[node.input[2]])
        if zero_point.dtype != np.int8 or zero_point.any():
            raise CheckFailed(
                f"graph '{name}': expected symmetric INT8 (zero point 0), found {zero_point.dtype} "
                f"{np.unique(zero_point)[:3].tolist()} at {node.name}; TensorRT would refuse it"
            )


def one_pair_per_reader(model: onnx.ModelProto) -> None:
    """Give every node that reads a quantised activation a Q/DQ pair of its own.

    onnxruntime 1.31 computes a MatMul in INT8 only when nobody else reads its input's pair; query, key and value share
    theirs, so half of a tower stays in fp32. It also merges equal pairs again, hence scales one float32 step apart
    (1e-7 of the value). A ViT-B tower: 1.7 times as fast as fp32 without this, 2.9 times with it.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    made_by = {output: node for node in model.graph.node for output in node.output}
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, place))
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear" or node.input[0] in constants:
            continue
        scale = numpy_helper.to_array(constants[node.input[1]])
        for copy, (reader, place) in enumerate(readers.get(node.output[0], [])[1:], start=1):
            scale = np.nextafter(scale, np.float32(np.inf))
            scale_name = f"{node.input[1]}_{copy}"
            model.graph.initializer.append(numpy_helper.from_array(scale, scale_name))
            pair = [onnx.NodeProto(), onnx.NodeProto()]
            for twin, original in zip(pair, (made_by[node.input[0]], node), strict=True):
                twin.CopyFrom(original)
                twin.name, twin.output[0], twin.input[1] = f"{twin.name}_{copy}", f"{twin.output[0]}_{copy}", scale_name
            pair[1].input[0] = pair[0].output[0]
            nodes += pair
            reader.input[place] = pair[1].output[0]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _new_ranges(model: onnx.ModelProto, file: Path, feeds: Sequence[Arrays], method: RangeMethod) -> None:
    """Measure the quantised tensors again, in the graph without its activations' pairs, and set their scales."""
    pairs = activation_pairs(model)
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    source = {pair[1].output[0]: pair[0].input[0] for pair in pairs}
    gone = {node.name for pair in pairs for node in pair}
    nodes = [node for node in plain.graph.node if node.name not in gone]
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = source.get(name, name)
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    beside = file.with_name(f"{file.stem}.smooth.onnx")
    save(plain, beside)
    try:
        found = observe(beside, feeds, method, list(dict.fromkeys(source.values())))
    finally:
        for path in (beside, beside.with_name(beside.name + ".data")):
            path.unlink(missing_ok=True)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for first, second in pairs:
        low, high = found[first.input[0]]
        if (largest := max(-low, high)) > 0:
            scale = np.float32(largest / INT8_MAX)
            for name in {first.input[1], second.input[1]}:
                constants[name].CopyFrom(numpy_helper.from_array(np.asarray(scale), name))


def _nncf() -> Any:
    """nncf without its telemetry, which would write to the home folder and reach for the network."""
    telemetry = "openvino_telemetry"
    if "nncf" not in sys.modules and telemetry not in sys.modules:
        sys.modules[telemetry] = None  # type: ignore[assignment]  # makes its import fail; nncf then takes a stub
        try:
            return require("nncf", extra="export", why="INT8 calibration")
        finally:
            del sys.modules[telemetry]
    return require("nncf", extra="export", why="INT8 calibration")


def _attention_products(model: onnx.ModelProto) -> list[str]:
    """MatMuls of two computed tensors: in INT8 they cost accuracy and gain nothing on a CPU (reference/export.md §3.4).

    NNCF knows them in plain attention, not where the exporter guards a masked softmax against empty rows.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "MatMul" and not constants & set(node.input)]
