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
    from runtime.retrieval import Retrieval


def load(
    bundle: str | Path, backend: str = "ort", threads: int | None = None, cache_bytes: int = 256 * 1024**2
) -> "Pipeline":
    """Read a bundle, check it and open its graphs.

    Args:
        bundle: The folder that `qforge export` made.
        backend: Engine to run the graphs with; see `runtime.backends.available_backends`.
        threads: CPU threads per graph; None takes the physical cores this process may use.
        cache_bytes: Bound of the query cache (bytes); 0 turns it off.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the backend's package is not installed.
        InputError: an unknown backend or a bad number.
    """
    from runtime.bundle import read_bundle  # here, so that `import runtime` alone stays light
    from runtime.pipeline import Pipeline

    return Pipeline(read_bundle(bundle), backend=backend, threads=threads, cache_bytes=cache_bytes)


def load_retrieval(bundle: str | Path, backend: str = "ort", threads: int | None = None) -> "Retrieval":
    """Read a bundle, check it and open the graphs it searches with.

    Args:
        bundle: The folder that `qforge export --heads retrieval` (or `both`) made.
        backend: Engine to run the graphs with; see `runtime.backends.available_backends`.
        threads: CPU threads per graph; None takes the physical cores this process may use.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the backend's package is not installed.
        InputError: a bundle that cannot search, an unknown backend or a bad number.
    """
    from runtime.bundle import read_bundle
    from runtime.retrieval import Retrieval

    return Retrieval(read_bundle(bundle), backend=backend, threads=threads)
