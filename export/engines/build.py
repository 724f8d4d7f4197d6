"""A bundle's graphs become plans: looked at, parsed, built, written beside the bundle with a manifest, or not at all.

    qforge build bundle --engine tensorrt-rtx --compute-capability 8.6 --compute-capability 8.9

The numeric types are those of the graphs (strongly typed networks); the builder is never asked for one.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from export.engines.builder import Builder
from export.engines.plan import Built, build_graph
from export.engines.profiles import patches_of, profiles_of
from export.engines.refusals import require_buildable
from export.engines.targets import ComputeCapability
from export.engines.timing_cache import TimingCache
from runtime.bundle import ENGINES, Bundle
from runtime.engine_manifest import (
    ENGINE_FORMAT,
    ENGINE_MANIFEST,
    BuiltEngine,
    EngineGraph,
    EngineManifest,
    EngineOptions,
    EngineProfile,
    read_engine,
)
from runtime.errors import CheckFailed, InputError
from runtime.files import atomic_folder, write_json_atomic
from runtime.manifest import FileEntry, TensorSpec
from runtime.progress import Progress

PLAN_SUFFIX = ".plan"
BAR_PARTS = 10
"""Steps of the progress bar for each graph."""


def build_bundle(
    bundle: Bundle,
    builder: Builder,
    capabilities: tuple[ComputeCapability, ...],
    *,
    graphs: Sequence[str] = (),
    batches: Sequence[int] | None = None,
    options: EngineOptions,
    timing_cache: Path | None = None,
    progress: Progress,
) -> BuiltEngine:
    """Build plans and write them to `engines/BUILDER-SM…/` of the bundle; an older folder of that name is replaced.

    Args:
        bundle: What to build from.
        builder: Who builds.
        capabilities: GPUs that every plan is to run on; empty: the builder's own choice.
        graphs: Which; empty: all that the builder is of use for.
        batches: Batches with profiles of their own; None: 1, 2, 4 … up to the bundle's limit.
        options: What else the builder is asked for.
        timing_cache: File of kernel timings, read and written again (TensorRT).
        progress: Where the bar is shown.

    Raises:
        InputError: a graph, GPU, option or batch that cannot be; found before anything is built.
        CheckFailed: the builder refused a graph. OutOfSpace: the disk is full. Nothing is left of either.
    """
    builder.require_options(options, timing_cache is not None)
    capabilities = builder.capabilities(capabilities)
    chosen = _chosen(bundle, graphs)
    patches = patches_of(bundle)
    profiles = {name: profiles_of(name, bundle.manifest, batches, patches=patches) for name in chosen}
    for name in chosen:
        require_buildable(bundle.graph(name), name, builder.engine, capabilities)
    title = "-".join((builder.engine, *(capability.sm for capability in capabilities)))
    final = bundle.path / ENGINES / title
    cache = TimingCache.read(timing_cache)
    with atomic_folder(final, replaces=ENGINE_MANIFEST) as folder:
        entries = dict[str, EngineGraph]()
        with progress.bar("building", BAR_PARTS * len(chosen)) as bar:
            for name in chosen:
                done = 0

                def moved(share: float) -> None:
                    nonlocal done
                    while done < round(share * BAR_PARTS):
                        done += 1
                        bar.advance()

                built = build_graph(
                    bundle.graph(name), name, builder, capabilities, profiles[name], options, cache=cache, moved=moved
                )
                moved(1.0)
                entries[name] = _written(bundle, name, built, profiles[name], folder)
        manifest = EngineManifest(
            format=ENGINE_FORMAT,
            bundle_digest=bundle.manifest.digest,
            engine=builder.engine,
            builder_version=builder.version,
            platform=f"{platform.system()}-{platform.machine()}".lower(),
            compute_capabilities=tuple(map(str, capabilities)),
            options=options,
            graphs=entries,
        )
        write_json_atomic(folder / ENGINE_MANIFEST, manifest.model_dump(mode="json"))
    cache.write(timing_cache)
    return read_engine(bundle, final, check_hashes=False)  # hashed while it was written


def _chosen(bundle: Bundle, wanted: Sequence[str]) -> tuple[str, ...]:
    known = bundle.manifest.graphs
    if unknown := [name for name in wanted if name not in known]:
        raise InputError(f"--graph: expected some of {', '.join(known)}, found {unknown[0]!r}")
    return tuple(dict.fromkeys(wanted)) or tuple(known)


def _written(bundle: Bundle, name: str, built: Built, profiles: tuple[EngineProfile, ...], folder: Path) -> EngineGraph:
    """The plan on disk, and what the manifest says of it."""
    entry, plan = bundle.manifest.graphs[name], memoryview(built.plan)
    file = folder / f"{name}{PLAN_SUFFIX}"
    file.write_bytes(plan)
    return EngineGraph(
        plan=FileEntry(file=file.name, sha256=hashlib.sha256(plan).hexdigest(), bytes=plan.nbytes),
        onnx_sha256=entry.sha256,
        data_sha256=None if entry.data is None else entry.data.sha256,
        inputs=_named(built.inputs, entry.inputs, name),
        outputs=_named(built.outputs, entry.outputs, name),
        profiles=profiles,
        build_s=round(built.build_s, 3),
        peak_rss_bytes=_peak_rss_bytes(),
    )


def _named(found: Mapping[str, TensorSpec], stated: Mapping[str, TensorSpec], graph: str) -> dict[str, TensorSpec]:
    """Types as the builder has them, sizes under the bundle's names."""
    if set(found) != set(stated):
        raise CheckFailed(
            f"graph '{graph}': expected inputs and outputs {sorted(stated)}, the builder found {sorted(found)}; export "
            f"the bundle again"
        )
    return {name: TensorSpec(dtype=found[name].dtype, shape=spec.shape) for name, spec in stated.items()}


def _peak_rss_bytes() -> int:
    """The kernel's high-water mark of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) << 10
