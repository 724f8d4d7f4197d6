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
