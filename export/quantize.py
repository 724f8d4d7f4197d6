"""ONNX → ONNX with INT8 written into the graph; the word "precision" ends here.

vision, qformer   weights and activations: NNCF's ONNX backend, TRANSFORMER (SmoothQuant included) + PERFORMANCE. One
                  symmetric Q/DQ graph, zero points 0, that ONNX Runtime runs fastest and the TensorRT parser accepts
                  (reference/export.md §3.4).
language          weights only, in blocks: decoding one token reads every weight once and computes little. Measured
                  against W8A8, plain weight-only Q/DQ and dynamic quantisation; see LOG.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.graphs import Arrays
from export.quiet import quiet
from export.trace import DATA_SUFFIX, LARGEST_SINGLE_FILE_BYTES, check
from runtime.errors import CheckFailed, require

BLOCK = 32
"""Weights that share one scale in the language model."""
INT8_ARITHMETIC = 4
"""onnxruntime's name for computing MatMulNBits in int8 (`accuracy_level`)."""


def quantize_activations(file: Path, feeds: Sequence[Arrays]) -> None:
    """Rewrite a graph in place: INT8 weights per channel, INT8 activations with ranges measured on `feeds`.

    A range holds every value seen. NNCF's own choice, the mean of each run's largest, clips the larger half of the
    runs: on the demo's halves its largest error was 1.3 times that of this one (see LOG.md).

    Raises:
        CheckFailed: the result is not symmetric, or not valid ONNX.
    """
    nncf, traced = _nncf(), onnx.load(str(file))
    widest = nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
    with quiet():
        model: onnx.ModelProto = nncf.quantize(
            traced,
            nncf.Dataset(list(feeds)),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(feeds),
            advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=widest),
            ignored_scope=nncf.IgnoredScope(names=_attention_products(traced), validate=False),
        )
    _one_pair_per_reader(model)
    require_symmetric(model, file.stem)
    _save(model, file)


def quantize_weights(file: Path) -> None:
    """Rewrite a graph in place: every matrix that is multiplied with becomes INT8 in blocks of 32.

    Raises:
        CheckFailed: the result is not valid ONNX.
    """
    quantizer: Any = require(
        "onnxruntime.quantization.matmul_nbits_quantizer", extra="cpu", why="INT8 weights of the language model"
    )
    model = onnx.load(str(file))
    _gemm_to_matmul(model)
    with quiet():
        work = quantizer.MatMulNBitsQuantizer(
            model, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_ARITHMETIC
        )
        work.process()
    _save(work.model.model, file)


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


def _one_pair_per_reader(model: onnx.ModelProto) -> None:
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


def _gemm_to_matmul(model: onnx.ModelProto) -> None:
    """Gemm with a constant matrix → MatMul and Add, which is all that the weight quantiser looks at."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        settings = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        settings |= {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = settings["alpha"] == 1.0 and settings["beta"] == 1.0 and not settings["transA"]
        if node.op_type != "Gemm" or node.input[1] not in constants or not plain:
            nodes.append(node)
            continue
        matrix, product = node.input[1], node.output[0]
        if settings["transB"]:
            matrix = f"{matrix}_transposed"
            if matrix not in constants:
                turned = np.ascontiguousarray(numpy_helper.to_array(constants[node.input[1]]).T)
                constants[matrix] = numpy_helper.from_array(turned, matrix)
                model.graph.initializer.append(constants[matrix])
        if len(node.input) == 3:
            product = f"{product}_product"
            nodes.append(helper.make_node("MatMul", [node.input[0], matrix], [product], name=node.name))
            nodes.append(helper.make_node("Add", [product, node.input[2]], node.output, name=f"{node.name}_bias"))
        else:
            nodes.append(helper.make_node("MatMul", [node.input[0], matrix], [product], name=node.name))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)


def _save(model: onnx.ModelProto, file: Path) -> None:
    """One file up to the limit of `trace`, beyond it the weights in a plain file beside it."""
    data = file.with_name(file.name + DATA_SUFFIX)
    data.unlink(missing_ok=True)  # of the fp32 graph
    weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)  # ByteSize() fails beyond 2 GiB
    large = weights_bytes > LARGEST_SINGLE_FILE_BYTES
    onnx.save(model, str(file), save_as_external_data=large, location=data.name if large else None)
    check(file)
