"""Execution providers of ONNX Runtime: which are here, what brings the others, and what each may leave to the CPU.

ONNX Runtime falls back by itself, in three places: a provider that is not built in is passed over with a warning, one
whose libraries do not load is dropped, and nodes that a provider cannot run go to the CPU. Here each of them is an
error, because an answer that comes twenty times slower is not what `--provider cuda` asked for.
"""

from typing import Any

from runtime.errors import BackendUnavailable, BundleError, InputError
from runtime.provider import Provider

PROVIDERS: dict[Provider, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
"""Name → ONNX Runtime's name, and the packages to install."""

DEVICES: dict[Provider, str] = {"cuda": "cuda", "tensorrt": "cuda"}
"""Name → ONNX Runtime's name of the memory it computes in; the others compute in the host's."""

HEAVY = frozenset(
    {
        *("MatMul", "Gemm", "Conv", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "FusedMatMul", "FusedGemm"),
        *("Softmax", "LayerNormalization", "SkipLayerNormalization", "Attention", "MultiHeadAttention"),
        *("Gelu", "BiasGelu", "FastGelu", "Erf", "Tanh", "Sigmoid"),
    }
)
"""Work on activations. Sizes and indices are computed on the CPU by design (`Shape`, `Gather` …), which costs nothing
and is allowed; a provider that leaves one of these behind has not taken the graph."""


def execution_provider(ort: Any, provider: str) -> str:
    """ONNX Runtime's name of a provider that is built into the one installed here.

    Raises:
        InputError: there is no such provider.
        BackendUnavailable: this onnxruntime was built without it.
    """
    if provider not in PROVIDERS:
        raise InputError(f"provider: expected one of {', '.join(PROVIDERS)}, found {provider!r}")
    name, packages = PROVIDERS[provider]
    found = available_providers(ort)
    if provider not in found:
        raise BackendUnavailable(
            f"provider '{provider}' needs an onnxruntime with {name}; the one installed here ({ort.__version__}) has "
            f"{', '.join(found) or 'none that we use'}. Install it in its place: pip uninstall onnxruntime && "
            f"pip install {packages}"
        )
    return name


def available_providers(ort: Any) -> tuple[Provider, ...]:
    """Providers that are built into the installed onnxruntime; whether their driver works is found when one opens."""
    built_in = ort.get_available_providers()
    return tuple(name for name, (theirs, _) in PROVIDERS.items() if theirs in built_in)


def require_taken(session: Any, provider: Provider, graph: str) -> None:
    """The session runs where it was asked to, none of its work on another provider.

    Raises:
        BackendUnavailable: the provider was dropped when its libraries were loaded.
        BundleError: nodes that do the graph's work went to the CPU.
    """
    wanted, packages = PROVIDERS[provider]
    if session.get_providers()[0] != wanted:
        raise BackendUnavailable(
            f"provider '{provider}' did not start: onnxruntime gave {', '.join(session.get_providers())} instead; "
            f"check the driver, and that the CUDA, TensorRT or OpenVINO libraries can be loaded, in the version that "
            f"{packages} was built for"
        )
    if provider == "cpu":
        return
    left = [
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if part.ep_name != wanted and node.op_type in HEAVY
    ]
    if left:
        raise BundleError(
            f"{graph}: provider '{provider}' leaves {len(left)} computing nodes to the CPU, the first is {left[0]}; "
            f"export this graph in a precision it runs, or choose --provider cpu"
        )
