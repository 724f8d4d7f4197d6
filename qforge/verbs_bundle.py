"""The verbs around bundles and checkpoints: export, verify, inspect, evaluate, bench."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import runtime
from qforge.actions import manifests_of, measure
from qforge.console import Outcome, must_be_ours
from qforge.evaluation import evaluate_rows, kind_of, open_answerer
from qforge.recipe import Recipe, load_recipe
from qforge.verbs_build import engines_of, prepared_of
from qforge.verbs_cache import warned
from runtime.backends import Device
from runtime.bundle import read_bundle
from runtime.decoding import Decoding
from runtime.errors import InputError, require
from runtime.precision import CALIBRATED, Precision
from runtime.progress import Progress
from runtime.provider import Provider
from runtime.replay import replay
from trainer.sources.convert import read_rows


def export(
    checkpoint: Path,
    out: Path,
    precision: Precision,
    calibration: Sequence[Path],
    reuse: Path | None,
    options: Mapping[str, object],
    overrides: Sequence[str],
) -> Outcome:
    """A verified bundle at `out`, and the size and latency of its graphs.

    `options` are settings of the export section, None where they were not given.
    """
    must_be_ours(out, "manifest.json")
    if options["range_method"] is not None and precision not in CALIBRATED:
        raise InputError(
            f"--range-method: expected --precision {' or '.join(CALIBRATED)} beside it, found {precision}, which has "
            f"no ranges to find; leave it out"
        )
    recipe = _recipe_of(checkpoint, _overriding(overrides, options))
    require("onnx", extra="export", why="Exporting")
    from export.calibrate import source_of
    from export.latency import read_latency, table
    from export.pipeline import export_bundle

    gated = [name for name, value in options.items() if name.startswith("gate.") and value is not None]
    if gated and recipe.export.gate.max_drop is None:
        flag = f"--{gated[0].replace('.', '-').replace('_', '-')}"
        raise InputError(f"{flag}: expected --max-drop beside it, found none; without it nothing is measured.")
    fixed = [name for name in ("calibration_images", "range_method") if options[name] is not None]
    if fixed and source_of(calibration).record:
        flag = f"--{fixed[0].replace('_', '-')}"
        raise InputError(f"{flag}: expected none beside a calibration record, which states it; leave out one of them.")

    export_bundle(
        checkpoint,
        out,
        recipe.export,
        precision=precision,
        calibration=calibration,
        recipe_yaml=recipe.to_yaml(),
        reuse=reuse,
        progress=Progress(),
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    manifest, timings = read_bundle(out, check_hashes=False).manifest, read_latency(out)
    text = f"Bundle: {out} ({_mib(size)})\n{table(manifest, timings)}\nLatency: medians on this machine's CPU."
    data = {"bundle": str(out), "precision": precision, "bytes": size, "latency": [asdict(t) for t in timings]}
    return Outcome(data, text)


def export_triton(
    bundle: Path, out: Path, engine: Literal["onnxruntime", "tensorrt"], max_batch: int | None, instances: int
) -> Outcome:
    """A model repository at `out`."""
    from export.triton.repository import CHAIN, write_repository

    write_repository(read_bundle(bundle), out, engine=engine, max_batch=max_batch, instances=instances)
    models = sorted(path.parent.name for path in out.glob("*/config.pbtxt"))
    text = f"Triton repository: {out} ({', '.join(models)}). Ask the model '{CHAIN}'; {out / 'README.md'} says how."
    return Outcome({"repository": str(out), "models": models, "engine": engine}, text)


def calibrate(
    checkpoint: Path, data: Sequence[Path], out: Path, options: Mapping[str, object], overrides: Sequence[str]
) -> Outcome:
    """A calibration record at `out`."""
    recipe = _recipe_of(checkpoint, _overriding(overrides, options))
    require("onnx", extra="export", why="Calibrating")
    from export.calibrate import calibrate

    found = calibrate(checkpoint, out, recipe.export, data=data, progress=Progress())
    tensors = {name: len(of_graph) for name, of_graph in found.ranges.items()}
    facts = {"count": found.count, "seed": found.seed, "method": found.method, "data_sha256": found.data_sha256}
    text = f"Calibration: {out} ({found.count} images, {sum(tensors.values())} ranges, {found.method})"
    return Outcome({"calibration": str(out), **facts, "ranges": tensors}, text)


def verify(bundle: Path, device: Device, polygraphy: Path | None) -> Outcome:
    """A line per recorded output; exit 1 when one is missed. `polygraphy` names a folder for the recording."""
    opened = read_bundle(bundle)
    commands = list[str]()
    if polygraphy is not None:
        from export.polygraphy_files import write_polygraphy_files

        commands = write_polygraphy_files(opened, polygraphy)
    checks = replay(opened, device)
    lines = [
        f"{'ok    ' if check.ok else 'FAILED'} {check.graph} {check.output}: "
        f"error {check.max_error:.2e}, {check.tolerance:.2e} allowed"
        for check in checks
    ]
    failed = sum(not check.ok for check in checks)
    verdict = (
        f"{len(checks) - failed} of {len(checks)} checks hold on backend {device.backend}, provider {device.provider}."
    )
    # JSON has no infinity, which is the error of a NaN or of a wrong shape.
    errors = [check.max_error if math.isfinite(check.max_error) else None for check in checks]
    found = [asdict(c) | {"max_error": error, "ok": c.ok} for c, error in zip(checks, errors, strict=True)]
    data: dict[str, Any] = {"ok": not failed, "backend": device.backend, "provider": device.provider, "checks": found}
    if polygraphy is not None:
        verdict += "\n" + "\n".join([f"Recorded inputs and outputs for Polygraphy: {polygraphy}", *commands])
        data["polygraphy"] = commands
    return Outcome(data, "\n".join([*lines, verdict]), 1 if failed else 0)


def inspect(path: Path) -> Outcome:
    """The manifest of a bundle, or the configuration and metrics of a checkpoint."""
    return _inspect_bundle(path) if kind_of(path) == "bundle" else _inspect_checkpoint(path)


def evaluate(
    path: Path,
    manifest: Path,
    task: Literal["caption", "vqa"],
    batch_size: int,
    image_size: int | None,
    device: Device,
    cache_dir: Path | None,
    decoding: Decoding,
) -> Outcome:
    """Metrics of one data set; with `cache_dir` also what that cache counted."""
    rows, counted = read_rows(manifest), dict[str, Any]()
    if cache_dir is None:
        with open_answerer(path, device) as answerer:
            evaluation = evaluate_rows(answerer, rows, task, batch_size, manifest.name, image_size, decoding)
    elif kind_of(path) != "bundle":
        raise InputError(f"{path}: --cache-dir is for bundles; a checkpoint runs as eager PyTorch and keeps no cache")
    else:
        with runtime.load(
            path, device.backend, device.threads, provider=device.provider, cache_dir=cache_dir
        ) as pipeline:
            evaluation = evaluate_rows(pipeline, rows, task, batch_size, manifest.name, image_size, decoding)
            counted["cache"] = warned(pipeline.cache.statistics())
    lines = [f"{name}: {100 * value:.2f} % of {evaluation.n}" for name, value in evaluation.metrics.items()]
    return Outcome(evaluation.as_json() | counted, "\n".join(lines))


def bench(
    bundles: Sequence[Path],
    against: Path,
    out: Path,
    root: Path | None,
    provider: Provider | None,
    overrides: Sequence[str],
) -> Outcome:
    """result.json, report.md and answers.png in `out`."""
    must_be_ours(out, "result.json")
    if provider is not None:
        overrides = [*overrides, f"bench.provider={provider}"]
    recipe = _recipe_of(against, overrides)
    config = recipe.data if root is None else recipe.data.model_copy(update={"root": root})
    if config.root is None:
        raise InputError(
            "Expected --data with the folder of the manifests: the checkpoint was trained on the demo world."
        )
    measure(recipe, bundles, against, manifests_of(recipe.model_copy(update={"data": config}), out), out)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return Outcome({"out": str(out), "result": result}, (out / "report.md").read_text(encoding="utf-8"))


def _recipe_of(checkpoint: Path, overrides: Sequence[str]) -> Recipe:
    if kind_of(checkpoint) != "checkpoint":
        raise InputError(f"{checkpoint}: expected a checkpoint, found a bundle.")
    return load_recipe(checkpoint / "recipe.yaml", overrides)


def _overriding(overrides: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """Options of the command line as overrides of the recipe's export section."""
    given = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return [*overrides, *(f"export.{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]


def _inspect_bundle(path: Path) -> Outcome:
    bundle = read_bundle(path)
    manifest, (engines, engine_lines) = bundle.manifest, engines_of(bundle)
    prepared, prepared_lines = prepared_of(bundle)
    model, limits = manifest.model, manifest.limits
    lines = [
        f"bundle, format {manifest.format}, {manifest.precision}",
        f"model: {model.queries} queries of width {model.qformer_width}",
        f"pixels: {manifest.preprocess.height} x {manifest.preprocess.width}, {manifest.preprocess.resample}"
        + "".join(f", or {side} x {side}" for side in limits.image_sizes),
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
    lines += prepared_lines + engine_lines
    lines.append("made by " + ", ".join(f"{name} {version}" for name, version in manifest.made_by.items()))
    data = {"kind": "bundle", "manifest": manifest.model_dump(mode="json"), "prepared": prepared, "engines": engines}
    return Outcome(data, "\n".join(lines))


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
