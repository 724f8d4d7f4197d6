"""Fewer nodes in the graphs of a language model that ONNX Runtime decodes with: attention as one, and its products.

The exporter takes attention apart into twenty nodes, which cost a step of one position more than they compute. The
patterns are those of onnxscript's rewriter; what comes of them is com.microsoft's MultiHeadAttention, beside
MatMulNBits, which such a graph has already (LOG.md has the measurements). Node names change, so this comes last: after
accuracy has been held, which knows nodes by their tensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from onnxscript.optimizer import optimize
from onnxscript.rewriter.ort_fusions.mha import fuse_mha1, fuse_mha2
from onnxscript.rewriter.ort_fusions.sdpa import fuse_sdpa
from onnxscript.rewriter.ort_fusions.sdpa_via_mha import replace_sdpa_by_mha

from export.precision.files import save
from export.precision.products import fold_products
from export.quiet import quiet

Fusion = Callable[..., int]
FUSIONS: tuple[Fusion, ...] = (fuse_mha1, fuse_mha2, replace_sdpa_by_mha)
"""In this order: attention with its cache, without one, and what is left, heads moved to where the operator wants
them."""


def fuse(file: Path) -> int:
    """Rewrite a graph in place; returns how many attentions became one operator, none where no pattern is found.

    Raises:
        CheckFailed: the result is not valid ONNX.
    """
    traced = onnx.load(str(file))
    model = onnx_ir.from_proto(traced)
    with quiet():
        optimize(model)
        fuse_sdpa(model, apply_shape_inference=True)
        found = sum(fusion(model) for fusion in FUSIONS)
        optimize(model)
    fused = onnx_ir.to_proto(model)
    fold_products(fused)
    _same_face(fused, traced)
    save(fused, file)
    return found


def _same_face(fused: onnx.ModelProto, traced: onnx.ModelProto) -> None:
    """Inputs and outputs as they were, names of varying sizes included, which shape inference renames."""
    pairs: tuple[tuple[Any, Any], ...] = (
        (fused.graph.input, traced.graph.input),
        (fused.graph.output, traced.graph.output),
    )
    for found, expected in pairs:
        del found[:]
        found.extend(expected)
