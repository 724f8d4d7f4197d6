"""One ONNX file becomes one plan in memory: parsed, configured, built."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.engines.builder import Builder
from export.engines.log import interruptible, log_of, monitor_of
from export.engines.targets import ComputeCapability
from export.engines.timing_cache import TimingCache
from runtime.engine_manifest import EngineOptions, EngineProfile, Hardware
from runtime.errors import CheckFailed
from runtime.manifest import TensorSpec

HARDWARE_NAMES: dict[Hardware, str] = {
    "none": "NONE",
    "ampere-plus": "AMPERE_PLUS",
    "same-compute-capability": "SAME_COMPUTE_CAPABILITY",
}


@dataclass(frozen=True)
class Built:
    """A plan in memory."""

    plan: Any
    """The builder's own memory, readable as bytes."""
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    layers: tuple[str, ...]
    """Type of every layer the parser made, as KV_CACHE_UPDATE."""
    build_s: float


def build_graph(
    file: Path,
    name: str,
    builder: Builder,
    capabilities: Sequence[ComputeCapability],
    profiles: Sequence[EngineProfile],
    options: EngineOptions,
    *,
    cache: TimingCache | None = None,
    moved: Callable[[float], None] = lambda share: None,
) -> Built:
    """Parse and build one ONNX file.

    Raises:
        CheckFailed: the parser or the builder refused it; says which node, when the parser does.
    """
    trt, start = builder.trt, time.perf_counter()
    log = log_of(trt)
    log.messages = []
    maker = trt.Builder(log)
    network = maker.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):  # a path, so that weights beside the graph are found
        raise CheckFailed(f"graph '{name}': {_parser_words(parser)}; {builder.engine} {builder.version} cannot read it")
    config = maker.create_builder_config()
    _configure(trt, config, builder, capabilities, options)
    for profile in profiles:
        made = maker.create_optimization_profile()
        for tensor, (least, usual, most) in profile.shapes.items():
            made.set_shape(tensor, least, usual, most)
        config.add_optimization_profile(made)
    if cache is not None:
        cache.lend(config)
    with interruptible() as interrupted:
        config.progress_monitor = monitor_of(trt, moved, interrupted)
        plan = maker.build_serialized_network(network, config)
    if plan is None:
        said = log.messages[-1] if log.messages else "nothing"
        raise CheckFailed(
            f"graph '{name}': {builder.engine} {builder.version} built no plan for compute capability "
            f"{', '.join(map(str, capabilities))}; it says: {said}"
        )
    if cache is not None:
        cache.take_back(config)
    return Built(
        plan=plan,
        inputs=_tensors(trt, [network.get_input(place) for place in range(network.num_inputs)]),
        outputs=_tensors(trt, [network.get_output(place) for place in range(network.num_outputs)]),
        layers=tuple(network.get_layer(place).type.name for place in range(network.num_layers)),
        build_s=time.perf_counter() - start,
    )


def _configure(
    trt: Any, config: Any, builder: Builder, capabilities: Sequence[ComputeCapability], options: EngineOptions
) -> None:
    if builder.engine == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability.sm.upper()), place)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        level = HARDWARE_NAMES[options.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)


def _tensors(trt: Any, tensors: Sequence[Any]) -> dict[str, TensorSpec]:
    names = {
        trt.float32: "float32",
        trt.float16: "float16",
        trt.bfloat16: "bfloat16",
        trt.int64: "int64",
        trt.int32: "int32",
        trt.int8: "int8",
        trt.bool: "bool",
    }
    return {
        tensor.name: TensorSpec(
            dtype=names[tensor.dtype], shape=tuple("?" if size < 0 else size for size in tensor.shape)
        )
        for tensor in tensors
    }


def _parser_words(parser: Any) -> str:
    """The parser's first error: node, operator, reason."""
    if not parser.num_errors:
        return "the parser gives no reason"
    error = parser.get_error(0)
    return f"node '{error.node_name()}' ({error.node_operator()}): {error.desc().strip()}"
