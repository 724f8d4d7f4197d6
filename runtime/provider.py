"""Names of what computes under ONNX Runtime; apart from the engines, so that reading a recipe loads nothing."""

from typing import Literal

Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]
"""Execution provider; `runtime.backends.providers` knows each one's package."""
