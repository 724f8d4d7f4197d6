"""The verbs around a cache on the disk: cache warm, cache info, cache clear.

As in qforge/cli.py, nothing heavy is imported here.
"""

from pathlib import Path
from typing import Annotated

import typer

from qforge.console import Outcome, verb
from qforge.devices import device_for
from qforge.options import Backend, BundleFolder, ImageSize, ProviderName, Threads, app

cache = typer.Typer(
    help="What seen images became, kept in a folder that processes share: fill it, look into it, empty it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache, name="cache")

CacheFolder = Annotated[Path, typer.Option("--cache-dir", metavar="DIR", help="Folder of the cache.")]


@verb(cache, "warm", "qforge cache warm runs/demo/bundle-int8 photos/ more.jsonl --cache-dir seen")
def warm(
    bundle: BundleFolder,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Images, folders of images, manifests.")],
    cache_dir: Annotated[
        Path, typer.Option("--cache-dir", metavar="DIR", help="Folder of the cache; made when it is missing.")
    ],
    max_mib: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", help="Bound of the folder, for all its users; without it, its own (at first 4096)."
        ),
    ] = None,
    image_size: ImageSize = None,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
) -> Outcome:
    """Look at images before anyone asks about them.

    `caption`, `vqa`, `chat` and `evaluate` (or `index` and `search` with a bundle that searches) then spend nothing on
    the image encoder, with the same --cache-dir, backend and provider. Images that cannot be read are left out and
    named.
    """
    from qforge import verbs_cache

    device = device_for(bundle, backend, provider, threads)
    return verbs_cache.warm(bundle, sources, cache_dir, max_mib, image_size, device)


@verb(cache, "info", "qforge cache info --cache-dir seen")
def info(cache_dir: CacheFolder) -> Outcome:
    """Say what a cache holds, bundle by bundle."""
    from qforge import verbs_cache

    return verbs_cache.info(cache_dir)


@verb(cache, "clear", "qforge cache clear --cache-dir seen --bundle runs/demo/bundle-int8")
def clear(
    cache_dir: CacheFolder,
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only what this bundle made; without it, everything.")
    ] = None,
) -> Outcome:
    """Empty a cache.

    Safe while others use it; they compute again.
    """
    from qforge import verbs_cache

    return verbs_cache.clear(cache_dir, bundle)
