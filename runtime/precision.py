"""The numeric types that graphs are written in, and whom they are written for; named once for exporter and readers."""

from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""Of the vision graph, the Q-Former and the retrieval heads. int8 and fp8: weights and activations."""
LanguagePrecision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
"""Of the language model's graphs. int8 and int4: weights only, in blocks."""
Target = Literal["onnxruntime", "tensorrt"]
"""Who runs the graphs: ONNX Runtime as they are, or a TensorRT engine that is built from them; the two differ in how
quantised weights are written, and in the type of what is not quantised (fp32 or fp16)."""
NOT_ON_CPU = ("bf16",)
"""What ONNX Runtime's CPU cannot compute in; such graphs are verified by an exact emulation and run on a GPU."""
CALIBRATED: tuple[Precision, ...] = ("int8", "fp8")
"""Whose activations are quantised, so that their ranges must be found."""
FLOATING = ("fp32", "fp16", "bf16")
"""Whose weights are numbers as they stand, without scales."""
RangeMethod = Literal["minmax", "percentile", "entropy"]
"""How the range of a quantised activation is found: all values seen, 99.99 % of them, or the least loss of
information."""


def carried(dtype: str) -> str:
    """numpy's type that carries an element type between host and engine; it has no bfloat16."""
    return "float32" if dtype == "bfloat16" else dtype
