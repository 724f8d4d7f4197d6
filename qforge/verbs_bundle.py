"""The verbs around bundles and checkpoints: export, verify, inspect, evaluate, bench."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from export.config import Heads
from qforge.actions import manifests_of, measure
from qforge.console import Outcome, must_be_ours
from qforge.evaluation import evaluate_rows, kind_of, open_answerer
from qforge.recipe import Recipe, load_recipe
from runtime.bundle import read_bundle
from runtime.dataset import read_manifest
from runtime.errors import InputError, require
from runtime.precision import LanguagePrecision, Precision
from runtime.progress import Progress
from runtime.replay import replay


def export(
    checkpoint: Path,
    out: Path,
    precision: Precision,
    language_precision: LanguagePrecision | None,
    heads: Heads | None,
    calibration: Sequence[Path],
    overrides: Sequence[str],
) -> Outcome:
    """A verified bundle at `out`."""
    must_be_ours(out, "manifest.json")
    if language_precision is not None:
        overrides = [*overrides, f"export.language_precision={language_precision}"]
    if heads is not None:
        overrides = [*overrides, f"export.heads={heads}"]
    recipe = _recipe_of(checkpoint, overrides)
    require("onnx", extra="export", why="Exporting")
    from export.pipeline import export_bundle

    export_bundle(
        checkpoint,
        out,
        recipe.export,
        precision=precision,
        calibration=calibration,
        recipe_yaml=recipe.to_yaml(),
        reuse=None,
        progress=Progress(),
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Outcome({"bundle": str(out), "precision": precision, "bytes": size}, f"Bundle: {out} ({_mib(size)})")


def verify(bundle: Path, backend: str) -> Outcome:
    """A line per recorded output; exit 1 when one is missed."""
    checks = replay(read_bundle(bundle), backend)
    lines = [
        f"{'ok    ' if check.ok else 'FAILED'} {check.graph} {check.output}: "
        f"error {check.max_error:.2e}, {check.tolerance:.2e} allowed"
        for check in checks
    ]
    failed = sum(not check.ok for check in checks)
    verdict = f"{len(checks) - failed} of {len(checks)} checks hold on backend {backend}."
    # JSON has no infinity, which is the error of a NaN or of a wrong shape.
    errors = [check.max_error if math.isfinite(check.max_error) else None for check in checks]
    found = [asdict(c) | {"max_error": error, "ok": c.ok} for c, error in zip(checks, errors, strict=True)]
    data = {"ok": not failed, "backend": backend, "checks": found}
    return Outcome(data, "\n".join([*lines, verdict]), 1 if failed else 0)


def inspect(path: Path) -> Outcome:
    """The manifest of a bundle, or the configuration and metrics of a checkpoint."""
    return _inspect_bundle(path) if kind_of(path) == "bundle" else _inspect_checkpoint(path)


def evaluate(
    path: Path,
    manifest: Path,
    task: Literal["caption", "vqa"],
    batch_size: int,
    backend: str,
    threads: int | None,
) -> Outcome:
    """Metrics of one data set."""
    rows = read_manifest(manifest)
    with open_answerer(path, backend, threads) as answerer:
        evaluation = evaluate_rows(answerer, rows, task, batch_size, manifest.name)
    lines = [f"{name}: {100 * value:.2f} % of {evaluation.n}" for name, value in evaluation.metrics.items()]
    return Outcome(evaluation.as_json(), "\n".join(lines))


def bench(bundles: Sequence[Path], against: Path, out: Path, root: Path | None, overrides: Sequence[str]) -> Outcome:
    """result.json, report.md and answers.png in `out`."""
    must_be_ours(out, "result.json")
    recipe = _recipe_of(against, overrides)
    config = recipe.data if root is None else recipe.data.model_copy(update={"root": root})
    if config.root is None:
        raise InputError(
            "Expected --data with the folder of the manifests: the checkpoint was trained on the demo world."
        )
    measure(recipe, bundles, against, manifests_of(config, out), out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return Outcome({"out": str(out), "result": result}, (out / "report.md").read_text(encoding="utf-8"))


def _recipe_of(checkpoint: Path, overrides: Sequence[str]) -> Recipe:
    if kind_of(checkpoint) != "checkpoint":
        raise InputError(f"{checkpoint}: expected a checkpoint, found a bundle.")
    return load_recipe(checkpoint / "recipe.yaml", overrides)


def _inspect_bundle(path: Path) -> Outcome:
    manifest = read_bundle(path).manifest
    model, limits = manifest.model, manifest.limits
    lines = [
        f"bundle, format {manifest.format}, {manifest.precision}",
        f"model: {model.queries} queries of width {model.qformer_width}",
        f"pixels: {manifest.preprocess.height} x {manifest.preprocess.width}, {manifest.preprocess.resample}",
        f"batch: at most {limits.max_batch}",
    ]
    if model.language_width is not None:
        lines += [
            f"answers: {model.style}, language model {manifest.language_precision}, width {model.language_width}; "
            f"Q-Former {'reads' if model.question_conditioned else 'does not read'} questions",
            f"limits: {limits.max_positions} positions, {limits.max_new_tokens} new tokens",
            f"prompts: caption {manifest.prompts.caption!r}, question {manifest.prompts.vqa!r}",
        ]
    if limits.max_text_tokens:
        lines.append(f"searches: texts of up to {limits.max_text_tokens} tokens")
    for name, graph in manifest.graphs.items():
        size = graph.bytes + (graph.data.bytes if graph.data else 0)
        lines.append(f"graph {name}: {', '.join(graph.inputs)} -> {', '.join(graph.outputs)} ({_mib(size)})")
    lines.append("made by " + ", ".join(f"{name} {version}" for name, version in manifest.made_by.items()))
    return Outcome({"kind": "bundle", "manifest": manifest.model_dump(mode="json")}, "\n".join(lines))


def _inspect_checkpoint(path: Path) -> Outcome:
    config, metrics = (
        json.loads((path / name).read_text(encoding="utf-8")) for name in ("config.json", "metrics.json")
    )
    size = (path / "model.safetensors").stat().st_size
    halves = ", ".join(f"{half} {config['model'][half]}" for half in ("vision", "language"))
    last = metrics["held_out"][-1] if metrics["held_out"] else {}
    lines = [
        f"checkpoint, format {config['format']}, trained up to {config['stage']} ({_mib(size)} trained)",
        f"frozen halves: {halves}",
        f"parts of the bridge: {', '.join(config.get('parts', ['all']))}",  # older checkpoints have no list
        "held out: " + (", ".join(f"{name} {value:g}" for name, value in last.items()) or "not measured"),
    ]
    return Outcome({"kind": "checkpoint", "config": config, "metrics": metrics}, "\n".join(lines))


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
