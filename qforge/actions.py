"""What each step of `qforge run` does: one function per step, handed to the room that knows how.

Each writes into the folder it is given, and imports its room inside itself: a run that skips a step does not pay
for it.
"""

import contextlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from export.config import ExportConfig
from qforge.recipe import Recipe
from qforge.report import CURVES, report_text
from runtime.errors import CheckFailed, MissingFile, require
from runtime.files import sha256_of, write_json_atomic
from runtime.packed import piece_of
from runtime.precision import Precision
from runtime.preprocess import load_image
from runtime.progress import Progress
from trainer.config import DEMO_FOLDERS, ModelConfig, StageName
from trainer.data_config import FeaturesConfig
from trainer.sources.check import LOOKED_THROUGH, look_at, sampled
from trainer.sources.convert import as_manifest, files_behind
from trainer.sources.rows import ManifestRows
from trainer.sources.source import Source, resolve_source
from trainer.stage_config import StageConfig

if TYPE_CHECKING:
    from trainer.data import FeatureSource

DATA_SETS = ("captions_train", "captions_val", "captions_test", "vqa_train", "vqa_val", "vqa_test")
"""Settings of the data section that name data sets."""
TESTS = ("captions_test", "vqa_test")
HASHED_BYTES = 64 * 2**20
"""Largest data file that counts by its content; a larger one counts by size and time, as images do."""


def sources_of(recipe: Recipe, out: Path) -> dict[str, tuple[Source, ...]]:
    """Data sets by setting, as `trainer.data.resolve` has them, but without loading torch.

    Questions are for a recipe that trains on them; without, none need be there.
    """
    data, asks = recipe.data, "vqa" in recipe.stages
    root = out / "data" if data.root is None else data.root
    named = {setting: getattr(data, setting) for setting in DATA_SETS if asks or not setting.startswith("vqa_")}
    return {
        setting: tuple(resolve_source(config, root) for config in configs)
        for setting, configs in named.items()
        if configs is not None
    }


def manifests_of(recipe: Recipe, out: Path) -> dict[str, Path]:
    """A manifest for each setting, for what reads all rows of it alike."""
    return {setting: as_manifest(sources) for setting, sources in sources_of(recipe, out).items()}


def fingerprint_data(recipe: Recipe, out: Path) -> dict[str, str]:
    """What tells that the user's own data changed: content of the manifests, size and time of the images.

    Files of more than 64 MiB count by size and time, and of a set of more than 65,536 rows 2,000 images, evenly
    spaced, stand for all.
    """
    if recipe.data.root is None:
        return {}
    found: dict[str, str] = {}
    for source in {source for sources in sources_of(recipe, out).values() for source in sources}:
        found |= {str(file): _content(file) for file in files_behind(source)}
        rows = ManifestRows(as_manifest([source]))
        places = range(len(rows)) if len(rows) <= LOOKED_THROUGH else sampled(len(rows))
        for image in {rows[place].image for place in places}:
            if piece_of(image) is None:  # the file it is packed in is there already
                found[str(image)] = _size_and_time(image) if image.is_file() else "missing"
    return found


def fingerprint_sources(model: ModelConfig) -> dict[str, str]:
    """Size and time of every file of halves that are local folders; the shipped ones count as code."""
    sources = (model.vision, model.language, model.text_tokenizer, model.qformer_init)
    shipped = {source for _, source in DEMO_FOLDERS}
    folders = [Path(source) for source in sources if source is not None and source not in shipped]
    files = [file for folder in folders if folder.is_dir() for file in folder.rglob("*") if file.is_file()]
    return {str(file): _size_and_time(file) for file in files}


def fingerprint_init(init: Path | None) -> dict[str, str]:
    """What tells that the checkpoint a run starts from changed."""
    if init is None:
        return {}
    return {str(init / name): sha256_of(init / name) for name in ("config.json", "model.safetensors")}


def fingerprint_gate(recipe: Recipe) -> dict[str, str]:
    """What tells that the held-out items of an export's accuracy gate changed, where they are no part of the run."""
    data = recipe.export.gate.data
    return {} if data is None else {str(data): sha256_of(data)}


def prepare_data(recipe: Recipe, out: Path, folder: Path) -> None:
    """Draw the demo world; or look through the user's manifests, so that a wrong one stops the run here.

    An unreadable image is refused where it would be tested on. In training it is replaced and counted, so here it is
    a warning.
    """
    if recipe.data.root is None:
        from trainer.demo_world import write_demo_world

        write_demo_world(recipe.data.demo, folder, Progress())
        return
    reports: dict[str, list[dict[str, object]]] = {}
    for setting, sources in sources_of(recipe, out).items():
        reports[setting] = []
        for source in sources:
            report = look_at(source)
            reports[setting].append({"path": str(source.path), **report.as_json()})
            if report.ok:
                continue
            if setting in TESTS:
                for row in ManifestRows(as_manifest([source])):
                    load_image(row.image)
            print(
                f"warning: {source.path}: {len(report.problems)} problems, the first is: {report.problems[0]}. "
                f"All of them: qforge data check {source.path}",
                file=sys.stderr,
            )
    write_json_atomic(folder / "check.json", {"manifests": reports, "files": fingerprint_data(recipe, out)})


def build_halves(recipe: Recipe, folder: Path) -> None:
    """Pre-train the small frozen halves."""
    require("torch", extra="train", why="Pre-training the halves")
    from trainer.demo_world.halves import build_halves

    made = recipe.model.shipped_halves().values()
    build_halves(recipe.model.demo_halves, recipe.model.vqa_prompt, made, folder, Progress())


def train_stage(
    stage: StageName, recipe: Recipe, model: ModelConfig, out: Path, init: Path | None, folder: Path
) -> None:
    """Train one stage from the checkpoint `init`, or go on with what an interrupted call left in `folder`.

    An image encoder that an earlier stage of this run trained takes the place of the recipe's. Its
    curves are drawn beside it where matplotlib is installed.
    """
    require("torch", extra="train", why="Training")
    from trainer.checkpoint import with_trained_halves
    from trainer.data import resolve
    from trainer.ranks import join
    from trainer.train import run_stage

    ranks = join()
    config: StageConfig = getattr(recipe, stage)
    if init is not None and out in init.parents:
        model = with_trained_halves(model, init)
    size = config.adapted(model).image_size
    progress = Progress(quiet=not ranks.is_main)
    run_stage(
        stage,
        model=model,
        data=resolve(recipe.data, out / "data"),
        config=config,
        seed=recipe.seed,
        init=init,
        out=folder,
        recipe_yaml=recipe.to_yaml(),
        store=_features(model.vision, model.vision_layer, size, out, recipe.data.features),
        progress=progress,
        ranks=ranks,
    )
    if not ranks.is_main:
        return
    if importlib.util.find_spec("matplotlib") is None:
        progress.note(f"{stage}: {CURVES} is left out: matplotlib is not installed (pip install 'qforge[bench]')")
        return
    from benchmarks.curves import draw_training

    draw_training([folder], folder / CURVES)


@lru_cache(maxsize=1)
def _features(vision: str, layer: int, image_size: int | None, out: Path, settings: FeaturesConfig) -> "FeatureSource":
    """One store for the stages of a run, so that an image passes its frozen tower once."""
    from trainer.data import FeatureStore
    from trainer.features import cached_features

    return FeatureStore() if settings.folder is None else cached_features(settings)


def export_bundle(recipe: Recipe, precision: Precision, reuse: Path | None, out: Path, folder: Path) -> None:
    """One bundle, calibrated on training images and verified against PyTorch; `reuse` holds graphs already traced."""
    require("onnx", extra="export", why="Exporting")
    from export.pipeline import export_bundle

    manifests = manifests_of(recipe, out)
    export_bundle(
        out / "checkpoint",
        folder,
        _gated(recipe.export, manifests),
        precision=precision,
        calibration=[manifests[name] for name in ("vqa_train", "captions_train") if name in manifests],
        recipe_yaml=recipe.to_yaml(),
        reuse=reuse,
        progress=Progress(),
    )


def _gated(config: ExportConfig, manifests: Mapping[str, Path]) -> ExportConfig:
    """An accuracy gate without data of its own is measured on the run's validation split."""
    gate = config.gate
    if gate.max_drop is None or gate.task is None or gate.data is not None:
        return config
    split = "captions_val" if gate.task in ("caption", "retrieval") else "vqa_val"
    return config.model_copy(update={"gate": gate.model_copy(update={"data": manifests.get(split)})})


def verify_bundles(bundles: Sequence[Path], folder: Path) -> None:
    """Replay what PyTorch answered when each bundle was made; CheckFailed when this machine answers otherwise."""
    from runtime.bundle import read_bundle
    from runtime.replay import replay

    checks = {str(bundle): replay(read_bundle(bundle)) for bundle in bundles}
    for bundle, of_bundle in checks.items():
        failed = [check for check in of_bundle if not check.ok]
        if failed:
            raise CheckFailed(
                f"{bundle}: {len(failed)} of {len(of_bundle)} recorded outputs are not met on this machine, the first "
                f"is {failed[0].graph} {failed[0].output} (error {failed[0].max_error:.2g}, "
                f"{failed[0].tolerance:.2g} allowed). "
                f"All of them: qforge verify {bundle}"
            )
    write_json_atomic(
        folder / "verification.json", {name: [asdict(c) for c in found] for name, found in checks.items()}
    )


def bench(recipe: Recipe, bundles: Sequence[Path], out: Path, folder: Path) -> None:
    """Bundles beside eager PyTorch, same inputs, same run."""
    # A broken gate is written in result.json, where `failures_of` finds it: the report that shows it is made first.
    with contextlib.suppress(CheckFailed):
        measure(recipe, bundles, out / "checkpoint", manifests_of(recipe, out), folder)


def measure(
    recipe: Recipe, bundles: Sequence[Path], checkpoint: Path, manifests: Mapping[str, Path], folder: Path
) -> None:
    """The benchmark on the test split of `manifests`; CheckFailed when its gate does not hold."""
    require("torch", extra="bench", why="The benchmark")
    from benchmarks.bench import bench

    bench(
        bundles,
        checkpoint,
        recipe.bench,
        caption_rows=ManifestRows(manifests["captions_test"]),
        vqa_rows=ManifestRows(manifests["vqa_test"]) if "vqa_test" in manifests else [],
        prior_rows=ManifestRows(manifests["vqa_train"]) if "vqa_train" in manifests else [],
        out=folder,
        progress=Progress(),
    )


def write_report(bundles: Sequence[Path], checkpoints: Sequence[Path], out: Path, folder: Path) -> None:
    """The benchmark's files, with the way on in front; `checkpoints` are those of the stages, in order."""
    from benchmarks.curves import draw_training

    shutil.copytree(out / "steps/bench", folder, dirs_exist_ok=True)
    draw_training(checkpoints, folder / CURVES)
    measured = (folder / "report.md").read_text(encoding="utf-8")
    (folder / "report.md").write_text(report_text(measured, bundles, checkpoints, out), encoding="utf-8")


def failures_of(out: Path) -> list[str]:
    """One sentence per gate that the bundles of a finished run do not hold; none when all is well."""
    result = json.loads((out / "report/result.json").read_text(encoding="utf-8"))
    failures: list[str] = result["failures"]
    return failures


def _content(file: Path) -> str:
    if not file.is_file():
        raise MissingFile(f"{file}: expected a data set, found nothing under that name")
    return sha256_of(file) if file.stat().st_size <= HASHED_BYTES else _size_and_time(file)


def _size_and_time(file: Path) -> str:
    facts = file.stat()
    return f"{facts.st_size} bytes, {facts.st_mtime_ns}"
