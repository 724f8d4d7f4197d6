"""config.pbtxt, the description by which Triton serves a model: one of a graph, one of the step that chains them.

Names, types and sizes are those of the bundle's manifest. Where `max_batch_size` is above 0 Triton itself adds the
batch axis in front, so it is left out of `dims`.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

from runtime.manifest import TensorSpec

EngineName = Literal["onnxruntime", "tensorrt"]
PLATFORM: dict[EngineName, tuple[str, str]] = {
    "onnxruntime": ("onnxruntime_onnx", "model.onnx"),
    "tensorrt": ("tensorrt_plan", "model.plan"),
}
"""Who runs the graphs → Triton's platform, and the name of the file that it looks for."""
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}
BATCH = "batch"
"""The exporter's name of the batch axis."""


class Served(Protocol):
    """A graph as it is served: the bundle's, or the plan built from it."""

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """By name, in order."""
        ...

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """By name, in order."""
        ...


def graph_config(
    model_name: str, entry: Served, engine: EngineName, *, max_batch: int, instances: int, profiles: int = 0
) -> str:
    """Text of one graph's config.pbtxt; Triton uses none but the first of a plan's `profiles` unless all are named.

    Requests are batched dynamically where every tensor begins with the batch axis. A graph that reads a KV cache is
    left out: its callers are at different positions, so there is nothing to join.
    """
    joined = can_be_batched(entry)
    numbers = ", ".join(f'"{number}"' for number in range(profiles))
    kind = f"KIND_GPU profile: [ {numbers} ]" if engine == "tensorrt" else "KIND_AUTO"
    lines = [
        f'name: "{model_name}"',
        f'platform: "{PLATFORM[engine][0]}"',
        f"max_batch_size: {max_batch if joined else 0}",
        *_tensors("input", entry.inputs, joined),
        *_tensors("output", entry.outputs, joined),
        f"instance_group [ {{ count: {instances} kind: {kind} }} ]",
    ]
    return "\n".join([*lines, *(["dynamic_batching { }"] if joined else [])]) + "\n"


def can_be_batched(entry: Served) -> bool:
    """Whether Triton may join requests: a batch axis in front of every tensor, and no KV cache read."""
    tensors = [*entry.inputs.values(), *entry.outputs.values()]
    cached = any(name.startswith("past_") for name in entry.inputs)
    return not cached and all(tensor.shape[:1] == (BATCH,) for tensor in tensors)


def chain_config(model_name: str, *, max_batch: int, instances: int, cache_bytes: int) -> str:
    """Text of the chaining model's config.pbtxt; its tensors are those that export/triton/model.py reads."""
    optional = [
        _tensor("IMAGE", "TYPE_STRING", [1], optional=True),
        _tensor("PIXELS", "TYPE_UINT8", [-1, -1, 3], optional=True),
        _tensor("QUESTION", "TYPE_STRING", [1], optional=True),
        _tensor("PROMPT", "TYPE_STRING", [1], optional=True),
    ]
    lines = [
        f'name: "{model_name}"',
        'backend: "python"',
        f"max_batch_size: {max_batch}",
        *_block("input", optional),
        *_block("output", [_tensor("TEXT", "TYPE_STRING", [1])]),
        f'parameters {{ key: "cache_bytes" value: {{ string_value: "{cache_bytes}" }} }}',
        f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]",
        "dynamic_batching { }",
    ]
    return "\n".join(lines) + "\n"


def _tensors(kind: str, specs: Mapping[str, TensorSpec], joined: bool) -> list[str]:
    tensors = []
    for name, spec in specs.items():
        sizes = [size if isinstance(size, int) else -1 for size in spec.shape]
        tensors.append(_tensor(name, TYPES[spec.dtype], sizes[1:] if joined else sizes))
    return _block(kind, tensors)


def _tensor(name: str, type_name: str, sizes: list[int], optional: bool = False) -> str:
    dims = ", ".join(map(str, sizes))
    return f'{{ name: "{name}" data_type: {type_name} dims: [ {dims} ]{" optional: true" if optional else ""} }}'


def _block(kind: str, tensors: list[str]) -> list[str]:
    return [f"{kind} [", *(f"  {tensor}," for tensor in tensors[:-1]), f"  {tensors[-1]}", "]"]
