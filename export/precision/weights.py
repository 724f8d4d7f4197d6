"""INT8 and INT4 weights of the language model, the head included: decoding reads every weight once and computes little.

onnxruntime   MatMulNBits of com.microsoft, computed in int8 (accuracy level 4). Measured against W8A8, plain
              weight-only Q/DQ and dynamic quantisation; see LOG.md.
tensorrt      standard DequantizeLinear on the stored weights, in blocks (INT4) or per channel (INT8); TensorRT fuses
              it with the product. Symmetric, so without zero points.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from export.precision.files import require_opset, save
from export.precision.kept import ASKED, Kept
from export.quiet import quiet
from runtime.errors import require

NBITS_BLOCKS = {8: (256, 128, 64), 4: (128, 64)}
"""Bits → weights (and inputs) that share one scale in MatMulNBits, the first that divides the rows of every matrix:
larger is faster and rounds more (LOG.md)."""
SMALL_BLOCK = 32
"""Where none of them does."""
INT8_ARITHMETIC = 4
"""onnxruntime's name for computing MatMulNBits in int8 (`accuracy_level`)."""
BLOCKS = (64, 32, 16)
"""Sizes of a block of INT4 weights for TensorRT, the first that divides a matrix's rows."""
SHARES = {8: (1.0,), 4: (1.0, 0.9, 0.8, 0.7)}
"""Bits → shares of a block's largest weight that its range may end at: with 15 values, cutting the largest few is
cheaper than rounding all others more coarsely."""
OPSET = 21
"""DequantizeLinear takes blocks, and INT4, from here on."""


def write_nbits(file: Path, keep: Collection[str], *, bits: int) -> list[Kept]:
    """Rewrite a graph in place for onnxruntime: every matrix that is multiplied with, in blocks.

    Raises:
        CheckFailed: the result is not valid ONNX.
    """
    quantizer: Any = require(
        "onnxruntime.quantization.matmul_nbits_quantizer", extra="cpu", why="Quantising the language model's weights"
    )
    model = onnx.load(str(file))
    gemm_to_matmul(model)
    block = _nbits_block(model, bits)
    # before the matrices are let go of, and narrow, so that a large model is not in memory twice
    better = _best_ranges(model, bits, block) if len(SHARES[bits]) > 1 else {}
    with quiet():
        work = quantizer.MatMulNBitsQuantizer(
            model,
            bits=bits,
            block_size=block,
            is_symmetric=True,
            accuracy_level=INT8_ARITHMETIC,
            nodes_to_exclude=list(keep),
        )
        work.process()
    written = work.model.model
    for tensor in written.graph.initializer:
        if tensor.name in better:
            tensor.CopyFrom(numpy_helper.from_array(better[tensor.name], tensor.name))
    save(written, file)
    return _whole(written, keep)


def _best_ranges(model: onnx.ModelProto, bits: int, block: int) -> dict[str, npt.NDArray[Any]]:
    """Tensors of MatMulNBits by their names in onnxruntime's quantiser, whose ranges end at a block's largest weight.

    Here they are those of `_narrowed`.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in _multiplied(model).items():
        if tensor.dims[0] % block:
            continue  # onnxruntime fills the last block up
        whole_KN, scale = _narrowed(numpy_helper.to_array(tensor), bits, block)
        found[f"{name}_Q{bits}"] = _packed(whole_KN, block)
        found[f"{name}_scales"] = np.ascontiguousarray(scale.T)
    return found


def _multiplied(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The matrices that something is multiplied with, by name."""
    products = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    return {name: stored[name] for name in products & stored.keys() if len(stored[name].dims) == 2}


def _packed(whole_KN: npt.NDArray[Any], block: int) -> npt.NDArray[np.uint8]:
    """[N, K / block, bytes] as MatMulNBits stores 4 bits: from 0, the first of two in the lower half of a byte."""
    rows, columns = whole_KN.shape
    values = (whole_KN.T.astype(np.int8) + 8).astype(np.uint8).reshape(columns, rows // block, block)
    return np.bitwise_or(values[..., ::2], np.left_shift(values[..., 1::2], 4), dtype=np.uint8)


def _nbits_block(model: onnx.ModelProto, bits: int) -> int:
    rows = [int(tensor.dims[0]) for tensor in _multiplied(model).values()]
    return next((block for block in NBITS_BLOCKS[bits] if not any(count % block for count in rows)), SMALL_BLOCK)


def write_dequantized(file: Path, keep: Collection[str], *, bits: int) -> list[Kept]:
    """Rewrite a graph in place for TensorRT: stored INT8 or INT4, a DequantizeLinear in front of each product.

    Raises:
        CheckFailed: the result is not valid ONNX.
    """
    model = onnx.load(str(file))
    gemm_to_matmul(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    done, nodes = dict[str, str](), list[onnx.NodeProto]()
    for node in model.graph.node:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.op_type == "MatMul" and name in constants and node.name not in keep:
            if name not in done:
                matrix = numpy_helper.to_array(constants[name])
                block = next((size for size in BLOCKS if matrix.shape[0] % size == 0), None)
                if matrix.ndim == 2 and (bits == 8 or block is not None):
                    narrow, scale = _narrowed(matrix, bits, matrix.shape[0] if bits == 8 else int(block or 0))
                    done[name] = f"{name}_dequantized"
                    model.graph.initializer.append(numpy_helper.from_array(narrow, f"{name}_int{bits}"))
                    model.graph.initializer.append(
                        numpy_helper.from_array(scale[0] if bits == 8 else scale, f"{name}_scale")
                    )
                    nodes.append(_dequantize(name, bits, block))
            node.input[1] = done.get(name, name)
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    stored = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(stored)
    require_opset(model, OPSET)
    save(model, file)
    return _whole(model, keep)


def _dequantize(name: str, bits: int, block: int | None) -> onnx.NodeProto:
    settings = {"axis": 1} if bits == 8 else {"axis": 0, "block_size": block}
    inputs = [f"{name}_int{bits}", f"{name}_scale"]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], name=f"dequantize_{name}", **settings)


def _narrowed(
    matrix_KN: npt.NDArray[np.float32], bits: int, block: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """(integers [K, N], scales [K / block, N]), each block with the scale of `SHARES` that loses least (squares)."""
    rows, columns = matrix_KN.shape
    blocks = matrix_KN.reshape(rows // block, block, columns)
    most = float(2 ** (bits - 1) - 1)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    full = np.where(largest > 0, largest / np.float32(most), np.float32(1)).astype(np.float32)
    whole, scale, least = blocks, full, np.full_like(full, np.inf)
    for share in SHARES[bits]:
        tried_scale = full * np.float32(share)
        tried = np.clip(np.rint(blocks / tried_scale), -most, most)
        lost = ((tried * tried_scale - blocks) ** 2).sum(axis=1, keepdims=True)
        better = lost < least
        whole, scale = np.where(better, tried, whole), np.where(better, tried_scale, scale)
        least = np.minimum(lost, least)
    return whole.reshape(rows, columns).astype(np.int8 if bits == 8 else ml_dtypes.int4), scale[:, 0]


def _whole(model: onnx.ModelProto, keep: Collection[str]) -> list[Kept]:
    """Products with a stored matrix that was left as it was."""
    constants = {tensor.name for tensor in model.graph.initializer}
    left = [node for node in model.graph.node if node.op_type in {"MatMul", "Gemm"} and constants & set(node.input[:2])]
    no_place = "its matrix is not one that the quantiser splits into blocks"
    return [Kept(node.name, node.op_type, "fp32", ASKED if node.name in keep else no_place) for node in left]


def gemm_to_matmul(model: onnx.ModelProto) -> None:
    """Gemm with a constant matrix → MatMul and Add, which is all that the weight quantisers look at."""
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
