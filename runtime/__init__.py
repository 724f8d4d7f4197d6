"""Runs a bundle: numpy and one engine backend, never torch.

Opening one is all there is to know; `runtime.pipeline` tells what happens then:

    import runtime
    with runtime.load("runs/demo/bundle-fp32") as pipeline:
        print(pipeline.caption("photo.jpg")[0].text)
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline
    from runtime.provider import Provider
    from runtime.retrieval import Retrieval


def load(
    bundle: str | Path,
    backend: str = "ort",
    threads: int | None = None,
    cache_bytes: int = 256 * 1024**2,
    provider: "Provider" = "cpu",
) -> "Pipeline":
    """Read a bundle, check it and open its graphs.

    Args:
        bundle: The folder that `qforge export` made.
        backend: Engine to run the graphs with; see `runtime.backends.available_backends`.
        threads: CPU threads per graph; None takes the physical cores this process may use.
        cache_bytes: Bound of the query cache (bytes); 0 turns it off.
        provider: What computes under backend 'ort': cpu, cuda, tensorrt or openvino; never another one silently.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the package of the backend or provider is not installed, or the provider cannot start.
        InputError: an unknown backend or provider, or a bad number.
    """
    from runtime.backends import Device  # here, so that `import runtime` alone stays light
    from runtime.bundle import read_bundle
    from runtime.pipeline import Pipeline

    return Pipeline(read_bundle(bundle), device=Device(backend, provider, threads), cache_bytes=cache_bytes)


def load_retrieval(
    bundle: str | Path, backend: str = "ort", threads: int | None = None, provider: "Provider" = "cpu"
) -> "Retrieval":
    """Read a bundle, check it and open the graphs it searches with.

    Args:
        bundle: The folder that `qforge export --heads retrieval` (or `both`) made.
        backend: Engine to run the graphs with; see `runtime.backends.available_backends`.
        threads: CPU threads per graph; None takes the physical cores this process may use.
        provider: What computes under backend 'ort': cpu, cuda, tensorrt or openvino; never another one silently.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the package of the backend or provider is not installed, or the provider cannot start.
        InputError: a bundle that cannot search, an unknown backend or provider, or a bad number.
    """
    from runtime.backends import Device
    from runtime.bundle import read_bundle
    from runtime.retrieval import Retrieval

    return Retrieval(read_bundle(bundle), device=Device(backend, provider, threads))
