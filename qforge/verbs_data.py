"""The verbs that make a data set better or faster: features ahead, captions filtered."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from qforge.console import Outcome
from qforge.evaluation import kind_of, open_filter, reporting
from qforge.recipe import Recipe, load_recipe
from runtime.backends import Device
from runtime.bundle import read_bundle
from runtime.caption_filter import How
from runtime.dataset import Row
from runtime.errors import DataError, InputError, require
from runtime.files import sha256_of
from runtime.filter_job import SCORES, Job, filter_manifest
from runtime.progress import Progress
from trainer.sources.convert import as_manifest
from trainer.sources.source import Source

NAMED = 10
"""Images left out that are told by name; `--json` names all."""
IDENTITY = {"bundle": "manifest.json", "checkpoint": "model.safetensors"}
"""The file whose content tells one from all others: a manifest has the hashes of all graphs."""


def features(recipe: Path, overrides: Sequence[str]) -> Outcome:
    """Fill the feature cache that the recipe names, for every image encoder that its stages train with."""
    loaded = load_recipe(recipe, overrides)
    if loaded.data.root is None:
        raise InputError(
            "data.root: expected a folder of data sets, found null: the demo world is drawn beside each run. Draw one: "
            "qforge data demo --out world, then add --set data.root=world"
        )
    require("torch", extra="train", why="The image encoder")
    from trainer.data import resolve
    from trainer.features import cached_features
    from trainer.towers import load_vision

    store, data, wrong = cached_features(loaded.data.features), resolve(loaded.data, loaded.data.root), dict[str, str]()
    sets = [*data.captions(), *(data.questions() if "vqa" in loaded.stages else ())]
    for source, layer, size in _towers(loaded):
        images = (image for rows in sets for image in _images(rows, wrong))
        store.fill(load_vision(source, layer, size), images, sum(map(len, sets)), Progress())
    facts = store.statistics()
    broken = {str(path): why for path, why in store.broken.items()} | wrong
    lines = [
        f"{facts['hits']:,} features were there, {facts['stored']:,} stored, {facts['misses'] - facts['stored']:,} "
        f"found no room; {loaded.data.features.folder} holds {facts['bytes'] / 1e9:.3f} GB",
        *_left_out(broken, "cannot be read"),
    ]
    return Outcome({"folder": str(loaded.data.features.folder), **facts, "broken": broken}, "\n".join(lines))


def _towers(recipe: Recipe) -> list[tuple[str, int, int | None]]:
    """Image encoders (source, layer, image size) that the stages of a recipe read features of."""
    models = [getattr(recipe, stage).adapted(recipe.model) for stage in recipe.stages]
    return list(dict.fromkeys((model.vision, model.vision_layer, model.image_size) for model in models))


def _images(rows: Sequence[Row], wrong: dict[str, str]) -> Iterator[Path]:
    """The image of each row, once where rows of one image follow each other; lines that are wrong are noted."""
    last = None
    for place in range(len(rows)):
        try:
            image = rows[place].image
        except DataError as error:
            wrong[str(error).partition(": ")[0]] = str(error)
            continue
        if image != last:
            yield image
        last = image


def filter_captions(
    generator: Path, scorer: Path, manifest: Path, out: Path, how: How, batch_size: int, device: Device
) -> Outcome:
    """A filtered manifest at `out`."""
    if batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, found {batch_size}")
    made_by = {
        name: sha256_of(path / IDENTITY[kind_of(path)]) for name, path in (("generator", generator), ("scorer", scorer))
    }
    job = Job(as_manifest([Source(manifest)]), out, how, batch_size, made_by)
    with open_filter(generator, scorer, device) as (describes, scores), reporting("captions") as progress:
        summary = filter_manifest(job, describes, scores, progress)
    facts = summary.as_json()
    mean = facts["mean_similarity"]
    lines = [
        f"{out}: {facts['images']:,} images; kept {facts['kept']['original']:,} of {facts['captions']['original']:,} "
        f"original captions and {facts['kept']['synthetic']:,} of {facts['captions']['synthetic']:,} made ones",
        f"mean similarity of image and caption: {_number(mean['before'])} before, {_number(mean['after'])} after; "
        f"each is under '{SCORES}'",
        *_left_out(summary.broken, "cannot be read"),
        *_left_out({image: image for image in summary.wordless}, "have no caption with a word in it"),
    ]
    return Outcome({"out": str(out), **facts}, "\n".join(lines))


def at_once(generator: Path, captions: int) -> int:
    """How many captions of an image are drawn together: a bundle has a limit, a checkpoint none."""
    return captions if kind_of(generator) == "checkpoint" else read_bundle(generator).manifest.limits.max_batch


def _left_out(why: dict[str, str], what: str) -> list[str]:
    """Lines that name the first images that are not in the result."""
    if not why:
        return []
    more = [f"… and {len(why) - NAMED} more; --json names all"] if len(why) > NAMED else []
    return [f"{len(why)} images {what} and are left out:", *list(why.values())[:NAMED], *more]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
