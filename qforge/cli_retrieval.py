"""The verbs that search: index and search.

As in qforge/cli.py, nothing heavy is imported here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qforge.console import Outcome, verb
from qforge.devices import device_for
from qforge.options import Backend, BundleFolder, CacheDir, Candidates, Dtype, ProviderName, Threads, app

if TYPE_CHECKING:
    from runtime.backends import Device


@verb(app, "index", "qforge index bundle-retrieval photos/ more.jsonl --out photos.index")
def index(
    bundle: BundleFolder,
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Images, folders of images, manifests; with --texts also .txt files."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="INDEX", help="Folder to write; an older index is replaced.")],
    texts: Annotated[
        bool, typer.Option("--texts", help="Index captions (of manifests, or a .txt with one a line), not images.")
    ] = False,
    small: Annotated[
        bool,
        typer.Option("--small", help="Keep no embeddings: a far smaller index, but a search reads its images again."),
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="Of what is stored; float32 takes twice the disk and is searched faster.")
    ] = "float16",
    cache_dir: CacheDir = None,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
) -> Outcome:
    """Make images, or texts, ready to be searched.

    Images that cannot be read are left out and named.
    """
    from qforge import verbs_retrieval

    return verbs_retrieval.index(
        bundle, sources, out, texts, small, dtype, cache_dir, device_for(bundle, backend, provider, threads)
    )


@verb(app, "search", 'qforge search photos.index "a red circle left of a blue square" --top 3 --picture hits.png')
def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="Folder that `qforge index` made.")],
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="What to look for in images.")] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="Image to find texts for; repeatable.")
    ] = None,
    top: Annotated[int, typer.Option(help="Results per query.")] = 5,
    candidates: Candidates = 128,
    picture: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Save the results as one picture, with their scores.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the bundle is now, if it was moved after indexing.")
    ] = None,
    cache_dir: CacheDir = None,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
) -> Outcome:
    """Find images by text, or texts by image.

    Contrast picks the candidates, matching ranks them.
    """
    from qforge import verbs_retrieval

    def device(its: Path) -> "Device":
        return device_for(its, backend, provider, threads)

    return verbs_retrieval.search(
        folder, texts or [], images or [], top, candidates, picture, bundle, cache_dir, device
    )
