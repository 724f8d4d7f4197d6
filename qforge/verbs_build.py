"""The verbs that make plans for GPUs and graphs for this processor, and what `inspect` says of those in a bundle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qforge.console import Outcome
from qforge.gone import GONE
from runtime.bundle import PREPARED, Bundle, read_bundle
from runtime.engine_manifest import BuiltEngine, EngineName, EngineOptions, engine_folders, read_engine
from runtime.errors import BundleError, InputError, require
from runtime.prepared import Prepared, fits_here, read_prepared
from runtime.progress import Progress


def build(
    path: Path,
    engine: EngineName,
    capabilities: Sequence[str],
    graphs: Sequence[str],
    batches: Sequence[int],
    timing_cache: Path | None,
    options: dict[str, Any],
) -> Outcome:
    """Plans under the bundle's `engines/`."""
    require("onnx", extra="export", why="Building engines")
    from export.engines.build import build_bundle
    from export.engines.builder import open_builder
    from export.engines.targets import parse_capability

    wanted = tuple(parse_capability(text) for text in capabilities)
    try:
        chosen = EngineOptions.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        raise InputError(f"{option}: {GONE.get(option, first['msg'])}") from error
    bundle = read_bundle(path)
    built = build_bundle(
        bundle,
        open_builder(engine),
        wanted,
        graphs=graphs,
        batches=batches or None,
        options=chosen,
        timing_cache=timing_cache,
        progress=Progress(),
    )
    data = {"engine": str(built.path), "manifest": built.manifest.model_dump(mode="json")}
    return Outcome(data, "\n".join([f"Engine: {built.path}", *_plan_lines(built)]))


def prepare(path: Path) -> Outcome:
    """Graphs for this processor under the bundle's `prepared/`."""
    from runtime.prepare import prepare

    bundle = read_bundle(path)
    prepared = prepare(bundle, Progress())
    lines = [
        f"Prepared: {bundle.path / PREPARED} (onnxruntime {prepared.onnxruntime}, this processor)",
        _prepared_line(prepared),
    ]
    return Outcome({"prepared": prepared.model_dump(mode="json")}, "\n".join(lines))


def prepared_of(bundle: Bundle) -> tuple[dict[str, Any] | None, list[str]]:
    """What a bundle has under `prepared/`, as data and as lines; None and nothing without it."""
    prepared = read_prepared(bundle)
    if prepared is None:
        return None, []
    used = fits_here(prepared, bundle)
    where = "used here" if used else "not used here: of another processor, onnxruntime or bundle; qforge prepare"
    return prepared.model_dump(mode="json") | {"used": used}, [f"prepared: {_prepared_line(prepared)}; {where}"]


def _prepared_line(prepared: Prepared) -> str:
    nbytes = sum(entry.bytes for graph in prepared.graphs.values() for entry in (graph.graph, graph.data) if entry)
    left_out = "".join(f"; {name} left out: {why}" for name, why in prepared.left_out.items())
    return (
        f"{len(prepared.graphs)} graphs, {nbytes / 2**20:.1f} MiB on disk; opening them took "
        f"{prepared.opened_ms:.0f} ms instead of {prepared.unprepared_ms:.0f} ms{left_out}"
    )


def engines_of(bundle: Bundle) -> tuple[list[dict[str, Any]], list[str]]:
    """What a bundle has under `engines/`, as data and as lines; a foreign one with the reason it is refused."""
    data, lines = list[dict[str, Any]](), list[str]()
    for folder in engine_folders(bundle):
        try:
            engine = read_engine(bundle, folder)
        except BundleError as error:
            data.append({"folder": folder.name, "error": str(error)})
            lines.append(f"engine {folder.name}: refused: {error}")
            continue
        manifest = engine.manifest
        data.append({"folder": folder.name, "manifest": manifest.model_dump(mode="json")})
        lines.append(
            f"engine {folder.name}: {manifest.engine} {manifest.builder_version}, compute capability "
            f"{', '.join(manifest.compute_capabilities)}"
        )
        lines += [f"  {line}" for line in _plan_lines(engine)]
    return data, lines


def _plan_lines(engine: BuiltEngine) -> list[str]:
    return [
        f"{name}: {graph.plan.bytes / 2**20:.1f} MiB, {len(graph.profiles)} profiles, built in {graph.build_s:.1f} s, "
        f"peak memory {graph.peak_rss_bytes / 2**30:.1f} GiB"
        for name, graph in engine.manifest.graphs.items()
    ]
