"""The verbs that make things from a recipe: run, train, data check, data demo."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast, get_args

import yaml

from qforge.actions import failures_of
from qforge.console import Outcome, must_be_ours
from qforge.evaluation import reporting
from qforge.peers import is_follower
from qforge.recipe import Recipe, load_recipe, parse_recipe
from qforge.run import Finished, Start, stage_folder, stages_to
from qforge.run import run as run_recipe
from runtime.errors import InputError, require
from runtime.progress import Progress
from trainer.config import Format, StageName
from trainer.sources.check import check_source
from trainer.sources.detect import format_of
from trainer.sources.source import ALL, Source


def run(recipe: Path, out: Path, init: Path | None, overrides: Sequence[str]) -> Outcome:
    """Every step of the recipe; exit 1 when a bundle does not hold its gates (the report is written all the same)."""
    loaded, start = _begin(recipe, init, overrides)
    finished = run_recipe(loaded, out, start=start)
    if is_follower():
        return Outcome(_as_data(finished), "")
    report, failures = out / "report" / "report.md", failures_of(out)
    data = _as_data(finished) | {"report": str(report), "failures": failures}
    return Outcome(data, "\n".join([*failures, f"Report: {report}"]), 1 if failures else 0)


def train(recipe: Path, out: Path, stage: StageName | None, init: Path | None, overrides: Sequence[str]) -> Outcome:
    """The stage `stage` and those of the recipe that it goes on from; all of the recipe when None."""
    loaded, start = _begin(recipe, init, overrides)
    stages = loaded.stages if stage is None else stages_to(loaded.stages, stage)
    finished = run_recipe(loaded, out, only=stages, start=start)
    checkpoint = out / stage_folder(loaded, stages[-1])
    return Outcome(_as_data(finished) | {"checkpoint": str(checkpoint)}, f"Checkpoint: {checkpoint}")


def data_check(path: Path, form: str | None, split: str | None, images: Path | None, answers: Path | None) -> Outcome:
    """Counts and problems of one data set."""
    if form is not None and form not in get_args(Format):
        raise InputError(f"--format: expected one of {', '.join(get_args(Format))}, found {form}")
    kind = cast(Format, form) if form is not None else format_of(path)
    source = Source(path, kind, split or ALL, images, answers)
    with reporting(f"checking {path.name}") as progress:
        report = check_source(source, progress)
    facts = report.as_json() | {"format": kind}
    counted = ("rows", "images", "captions", "questions", "answers", "turns", "cut")
    counts = [f"{name}: {facts[name]:,}" for name in counted]
    modes = "image modes: " + (", ".join(f"{mode} {count:,}" for mode, count in report.modes.items()) or "none")
    verdict = "No problems." if report.ok else f"{len(report.problems)} problems:"
    lines = [f"format: {kind}", *counts, modes, verdict, *report.problems]
    return Outcome(facts, "\n".join(lines), 0 if report.ok else 1)


def data_demo(out: Path, overrides: Sequence[str]) -> Outcome:
    """The demo world of a recipe that says nothing but the overrides."""
    from trainer.demo_world import write_demo_world

    must_be_ours(out, "captions_train.jsonl")
    config = parse_recipe("", overrides, source="the default recipe").data.demo
    write_demo_world(config, out, Progress())
    return Outcome({"out": str(out), "settings": config.model_dump(mode="json")}, f"Demo world: {out}")


def _begin(recipe: Path, init: Path | None, overrides: Sequence[str]) -> tuple[Recipe, Start | None]:
    """The recipe, and where to begin with it.

    A checkpoint brings its own model section, which `--set model.KEY=VALUE` may still change: its bridge fits no
    other. Training goes on with the stages behind its own.
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
    return loaded, Start(init, config.stage)


def _as_data(finished: Finished) -> dict[str, object]:
    return {"out": str(finished.out), "steps": [asdict(step) for step in finished.steps]}
