"""The verbs that make a data set better or faster: features ahead, captions filtered."""

from collections.abc import Sequence
from pathlib import Path

from qforge.console import Outcome
from qforge.evaluation import kind_of, open_filter, reporting
from qforge.recipe import load_recipe
from runtime.backends import Device
from runtime.caption_filter import How
from runtime.errors import InputError, require
from runtime.files import sha256_of
from runtime.filter_job import SCORES, Job, filter_manifest
from runtime.progress import Progress

NAMED = 10
"""Images left out that are told by name; `--json` names all."""
IDENTITY = {"bundle": "manifest.json", "checkpoint": "model.safetensors"}
"""The file whose content tells one from all others: a manifest has the hashes of all graphs."""


def features(recipe: Path, overrides: Sequence[str]) -> Outcome:
    """Fill the feature cache that the recipe names."""
    loaded = load_recipe(recipe, overrides)
    if loaded.data.root is None:
        raise InputError(
            "data.root: expected a folder of manifests, found null: the demo world is drawn beside each run. Draw one: "
            "qforge data demo --out world, then add --set data.root=world"
        )
    require("torch", extra="train", why="The image encoder")
    from trainer.data import resolve
    from trainer.features import cached_features
    from trainer.towers import load_vision

    store, model = cached_features(loaded.data.features), loaded.model
    data = resolve(loaded.data, loaded.data.root)
    images = [row.image for rows in (*data.captions(), *data.questions()) for row in rows]
    store.fill(load_vision(model.vision, model.vision_layer, model.image_size), images, Progress())
    facts = store.statistics()
    facts["images"] = len(set(images))
    broken = {str(path): why for path, why in store.broken.items()}
    lines = [
        f"{facts['images']:,} images: {facts['hits']:,} were there, {facts['stored']:,} stored; "
        f"{loaded.data.features.folder} holds {facts['bytes'] / 1e9:.3f} GB",
        *_left_out(broken, "cannot be read"),
    ]
    return Outcome({"folder": str(loaded.data.features.folder), **facts, "broken": broken}, "\n".join(lines))


def filter_captions(
    generator: Path, scorer: Path, manifest: Path, out: Path, how: How, batch_size: int, device: Device
) -> Outcome:
    """A filtered manifest at `out`."""
    if batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, found {batch_size}")
    made_by = {
        name: sha256_of(path / IDENTITY[kind_of(path)]) for name, path in (("generator", generator), ("scorer", scorer))
    }
    job = Job(manifest, out, how, batch_size, made_by)
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


def _left_out(why: dict[str, str], what: str) -> list[str]:
    """Lines that name the first images that are not in the result."""
    if not why:
        return []
    more = [f"… and {len(why) - NAMED} more; --json names all"] if len(why) > NAMED else []
    return [f"{len(why)} images {what} and are left out:", *list(why.values())[:NAMED], *more]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
