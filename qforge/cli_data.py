"""The verbs that make a data set better or faster: data features, data filter.

As in qforge/cli.py, nothing heavy is imported here.
"""

from pathlib import Path
from typing import Annotated

import typer

from qforge.console import Outcome, verb
from qforge.devices import device_for
from qforge.options import Backend, EitherFolder, MaxNewTokens, Overrides, ProviderName, RecipeFile, Threads, data


@verb(
    data,
    "features",
    "qforge data features recipes/easy-vqa.yaml --set data.root=easy-vqa --set data.features.folder=features",
)
def data_features(recipe: RecipeFile, overrides: Overrides = None) -> Outcome:
    """Make the features of the frozen image encoder ahead.

    For all images that the recipe trains on and watches, into its data.features.folder; what is there is left. Several
    processes may share the work. Images that cannot be read are left out and named.
    """
    from qforge import verbs_data

    return verbs_data.features(recipe, overrides or [])


@verb(
    data,
    "filter",
    "qforge data filter runs/demo/checkpoint --data runs/demo/data/captions_train.jsonl --out filtered.jsonl",
)
def data_filter(
    generator: EitherFolder,
    manifest: Annotated[Path, typer.Option("--data", metavar="FILE", help="Data set whose captions are filtered.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Manifest to write; the same command goes on.")],
    scorer: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE|CKPT", help="Who ranks captions by contrast; without it, who describes."),
    ] = None,
    captions: Annotated[int, typer.Option(help="Captions made for each image.")] = 10,
    keep: Annotated[int, typer.Option(help="Captions kept of each image, original and made ones together.")] = 2,
    top_p: Annotated[float, typer.Option(help="Draw words among the likeliest of this total probability.")] = 0.9,
    temperature: Annotated[float, typer.Option(help="Below 1 sharpens the odds.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same captions.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images described together.")] = 16,
    max_new_tokens: MaxNewTokens = None,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
) -> Outcome:
    """Describe images anew and keep the captions that fit best.

    Old and new captions are ranked by the similarity of image and text; the result is a manifest with the best of each
    image, and the score and origin of each (CapFilt). Images that cannot be read are left out and named.
    """
    from qforge import verbs_data
    from runtime.caption_filter import How

    how = How(captions, keep, top_p, temperature, seed, max_new_tokens, verbs_data.at_once(generator, captions))
    device = device_for(generator, backend, provider, threads)
    return verbs_data.filter_captions(generator, scorer or generator, manifest, out, how, batch_size, device)
