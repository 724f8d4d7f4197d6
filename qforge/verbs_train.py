"""The verbs that make things from a recipe: run, train, data check, data demo."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from qforge.actions import failures_of
from qforge.console import Outcome, must_be_ours
from qforge.evaluation import reporting
from qforge.peers import is_follower
from qforge.recipe import Recipe, load_recipe, parse_recipe
from qforge.run import STAGE_FOLDERS, STAGES, Finished, Stage, Start
from qforge.run import run as run_recipe
from runtime.dataset import check_manifest
from runtime.errors import require
from runtime.progress import Progress


def run(recipe: Path, out: Path, init: Path | None, overrides: Sequence[str]) -> Outcome:
    """Every step of the recipe; exit 1 when a bundle does not hold its gates (the report is written all the same)."""
    loaded, start = _begin(recipe, init, "vqa", overrides)
    finished = run_recipe(loaded, out, start=start)
    if is_follower():
        return Outcome(_as_data(finished), "")
    report, failures = out / "report" / "report.md", failures_of(out)
    data = _as_data(finished) | {"report": str(report), "failures": failures}
    return Outcome(data, "\n".join([*failures, f"Report: {report}"]), 1 if failures else 0)


def train(recipe: Path, out: Path, stage: Stage, init: Path | None, overrides: Sequence[str]) -> Outcome:
    """The steps up to and with `stage`."""
    loaded, start = _begin(recipe, init, stage, overrides)
    finished = run_recipe(loaded, out, until=stage, start=start)
    checkpoint = out / STAGE_FOLDERS[stage]
    return Outcome(_as_data(finished) | {"checkpoint": str(checkpoint)}, f"Checkpoint: {checkpoint}")


def data_check(manifest: Path) -> Outcome:
    """Counts and problems of one manifest."""
    with reporting(f"checking {manifest.name}") as progress:
        report = check_manifest(manifest, progress)
    facts = report.as_json()
    counts = [f"{name}: {facts[name]:,}" for name in ("rows", "images", "captions", "questions", "answers")]
    modes = "image modes: " + (", ".join(f"{mode} {count:,}" for mode, count in report.modes.items()) or "none")
    verdict = "No problems." if report.ok else f"{len(report.problems)} problems:"
    return Outcome(facts, "\n".join([*counts, modes, verdict, *report.problems]), 0 if report.ok else 1)


def data_demo(out: Path, overrides: Sequence[str]) -> Outcome:
    """The demo world of a recipe that says nothing but the overrides."""
    from trainer.demo_world import write_demo_world

    must_be_ours(out, "captions_train.jsonl")
    config = parse_recipe("", overrides, source="the default recipe").data.demo
    write_demo_world(config, out, Progress())
    return Outcome({"out": str(out), "settings": config.model_dump(mode="json")}, f"Demo world: {out}")


def _begin(recipe: Path, init: Path | None, last: Stage, overrides: Sequence[str]) -> tuple[Recipe, Start | None]:
    """The recipe, and where to begin with it.

    A checkpoint brings its own model section, which `--set model.KEY=VALUE` may still change: its bridge fits no
    other. Training goes on with the stage after its own, or with `last` when that is not behind it.
    """
    if init is None:
        return load_recipe(recipe, overrides), None
    init = init.resolve()
    require("torch", extra="train", why="Training")
    from trainer.checkpoint import read_config

    config = read_config(init)
    of_model = [override for override in overrides if override.startswith("model.")]
    loaded = load_recipe(recipe, [override for override in overrides if override not in of_model])
    made = config.model.demo_halves.model_copy(update={"rebuild": False})  # they are there: the checkpoint names them
    model = config.model.model_copy(update={"demo_halves": made})
    tree = loaded.model_dump(mode="json") | {"model": model.model_dump(mode="json")}
    loaded = parse_recipe(yaml.safe_dump(tree), of_model, source=f"{recipe} with the model of {init}")
    done = STAGES.index(config.stage) if config.stage in STAGES else -1
    return loaded, Start(init, STAGES[min(done + 1, STAGES.index(last))])


def _as_data(finished: Finished) -> dict[str, object]:
    return {"out": str(finished.out), "steps": [asdict(step) for step in finished.steps]}
