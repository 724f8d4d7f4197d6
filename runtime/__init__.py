"""Runs a bundle: numpy and one engine backend, never torch.

`qforge.load` opens a bundle for all it can do (`runtime.model`). Here are its two halves, each on its own:

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
    backend: str | None = None,
    threads: int | None = None,
    cache_bytes: int = 256 * 1024**2,
    provider: "Provider | None" = None,
    cache_dir: str | Path | None = None,
    cache_dir_bytes: int | None = None,
    batch_wait_ms: float | None = None,
) -> "Pipeline":
    """Read a bundle, check it and open the graphs it answers with.

    Args:
        bundle: The folder that `qforge export` made.
        backend: Engine to run the graphs with, 'ort' or 'trt'; see `runtime.backends.available_backends`. None is
            'ort', or with neither `threads` nor `provider` what `qforge tune` found fastest for this bundle here.
        threads: CPU threads per graph; None takes the physical cores this process may use.
        cache_bytes: Bound of what is remembered in memory (bytes): query vectors of images and, a quarter of it where
            the language model is decoder-only, keys and values of prompts; 0 remembers neither.
        provider: What computes under backend 'ort': cpu (None), cuda, tensorrt or openvino; never another one silently.
        cache_dir: Folder of a query cache on the disk, which processes share; made when missing. None for none.
        cache_dir_bytes: Bound of that folder (bytes), for all who use it from now on; None leaves its own (at first
            4 GiB).
        batch_wait_ms: A number runs the calls of several threads as one batch, in a thread that `close` ends; a first
            call then waits at most so long (milliseconds) for others that are reading their image, and never when it
            is the only one. 0 never waits; 5 is a good start for a server. None: every call runs by itself.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the package of the backend or provider is not installed, or the provider cannot start.
        InputError: an unknown backend or provider, a bad number, or a `cache_dir` that is not a cache's.
    """
    from runtime.batching.pipeline import open_pipeline  # here, so that `import runtime` alone stays light
    from runtime.bundle import read_bundle
    from runtime.disk_cache import DiskCache
    from runtime.tuned import device_of

    opened, device = read_bundle(bundle), device_of(bundle, backend, provider, threads)
    disk = None if cache_dir is None else DiskCache(cache_dir, opened.manifest.digest, device, cache_dir_bytes)
    return open_pipeline(opened, device, cache_bytes=cache_bytes, disk=disk, batch_wait_ms=batch_wait_ms)


def load_retrieval(
    bundle: str | Path,
    backend: str | None = None,
    threads: int | None = None,
    provider: "Provider | None" = None,
    cache_dir: str | Path | None = None,
    cache_dir_bytes: int | None = None,
) -> "Retrieval":
    """Read a bundle, check it and open the graphs it searches with.

    Args:
        bundle: The folder that `qforge export --heads retrieval` (or `both`) made.
        backend, threads, provider: As in `load`.
        cache_dir: Folder of a query cache on the disk: images that are in it cost no vision. None remembers nothing;
            `qforge.load` also remembers in memory.
        cache_dir_bytes: Bound of that folder (bytes), as in `load`.

    Raises:
        BundleError: the bundle is damaged, incomplete or of another format.
        BackendUnavailable: the package of the backend or provider is not installed, or the provider cannot start.
        InputError: a bundle that cannot search, an unknown backend or provider, a bad number, or a `cache_dir` that is
            not a cache's.
    """
    from runtime.bundle import read_bundle
    from runtime.disk_cache import DiskCache
    from runtime.retrieval import Retrieval
    from runtime.tuned import device_of

    opened, device = read_bundle(bundle), device_of(bundle, backend, provider, threads)
    disk = None if cache_dir is None else DiskCache(cache_dir, opened.manifest.digest, device, cache_dir_bytes)
    return Retrieval(opened, device=device, cache=disk)
