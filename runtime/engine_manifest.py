"""What lies beside every plan: `engines/NAME/engine.json`, written by `qforge build` and read before a plan is loaded.

A plan is machine code for one builder version and a few GPUs, made from the graphs of one bundle. TensorRT has no call
that says beforehand whether it can load one, so this file says what it is; a foreign plan is refused by one sentence.

    for folder in engine_folders(bundle):
        read_engine(bundle, folder).plan("vision")
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator

from runtime.bundle import ENGINES, Bundle
from runtime.errors import BundleError
from runtime.files import sha256_of
from runtime.manifest import FileEntry, TensorSpec
from runtime.records import read_record
from runtime.settings import Settings

ENGINE_MANIFEST = "engine.json"
ENGINE_FORMAT = 1
"""The only format of engine.json so far."""

EngineName = Literal["tensorrt", "tensorrt-rtx"]
"""Who builds a plan, and who alone can load it."""
Hardware = Literal["none", "ampere-plus", "same-compute-capability"]
"""GPUs a TensorRT plan may run on besides the one it was built on."""

Sizes = tuple[NonNegativeInt, ...]
"""A shape with every size fixed; 0 is a cache without positions."""


class EngineOptions(Settings):
    """What the builder was asked for; numeric types are no option, they are written in the graphs."""

    optimization_level: NonNegativeInt | None = None
    """0 (fastest build) to 5 (fastest plan); null: the builder's own choice."""
    weight_streaming: bool = False
    """Weights may stay in host memory and be streamed to a GPU that is too small for them."""
    version_compatible: bool = False
    """The plan also loads with newer runtimes of the same major version; it then carries code, so load trusted plans
    only."""
    hardware_compatibility: Hardware = "none"
    """GPUs besides the one built on."""
    workspace_mib: PositiveInt | None = None
    """Scratch memory that a layer may take on the GPU (MiB); null: all that the GPU has."""

    @field_validator("optimization_level")
    @classmethod
    def _known_level(cls, level: int | None) -> int | None:
        if level is not None and level > 5:
            raise ValueError(f"expected an optimization level from 0 to 5, found {level}")
        return level


class EngineProfile(Settings):
    """Shapes that kernels were chosen for; at run time every input must fit one of these."""

    name: str
    """batch-4, batch-4-prefill, batch-4-step, range …"""
    shapes: dict[str, tuple[Sizes, Sizes, Sizes]]
    """Input with a varying size → smallest, usual and largest shape."""

    def holds(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether inputs of these shapes can run in this profile."""
        return all(
            len(shapes[name]) == len(least)
            and all(low <= size <= high for low, size, high in zip(least, shapes[name], most, strict=True))
            for name, (least, _, most) in self.shapes.items()
        )


class EngineGraph(Settings):
    """One plan."""

    plan: FileEntry
    """Its file; the path is inside the engine's own folder."""
    onnx_sha256: str
    """Of the ONNX file it was built from."""
    data_sha256: str | None
    """Of that file's external weights."""
    inputs: dict[str, TensorSpec]
    """As the builder sees them, by name, in the graph's order."""
    outputs: dict[str, TensorSpec]
    """As the builder sees them, by name, in the graph's order."""
    profiles: tuple[EngineProfile, ...]
    """In the plan's order: their place is the number that TensorRT knows them by."""
    build_s: NonNegativeFloat
    """Seconds of parsing and building."""
    peak_rss_bytes: NonNegativeInt
    """Largest memory of the building process until this plan was finished."""


class EngineManifest(Settings):
    """Everything in `engine.json`."""

    format: Literal[1]
    """Version of this layout."""
    bundle_digest: str
    """Of the bundle that the plans belong to."""
    engine: EngineName
    """Who built them."""
    builder_version: str
    """Of the builder; TensorRT loads plans of its own version, unless they are version-compatible."""
    platform: str
    """Operating system and processor of the building machine; plans do not move from Linux to Windows."""
    compute_capabilities: tuple[str, ...]
    """GPUs they run on, as "8.6"."""
    options: EngineOptions
    """What the builder was asked for."""
    graphs: dict[str, EngineGraph]
    """By name, as in the bundle."""


@dataclass(frozen=True)
class BuiltEngine:
    """Plans that belong to a bundle and are what they were."""

    path: Path
    """Their folder."""
    manifest: EngineManifest

    def plan(self, graph: str) -> Path:
        """Absolute path of a graph's plan; BundleError when it was not built."""
        if graph not in self.manifest.graphs:
            raise BundleError(
                f"{self.path}: expected a plan of graph '{graph}', found {sorted(self.manifest.graphs)}; build it: "
                f"qforge build --engine {self.manifest.engine}"
            )
        return self.path / self.manifest.graphs[graph].plan.file

    def checked_plan(self, graph: str) -> Path:
        """Absolute path of a graph's plan, after its bytes were hashed; BundleError when they were changed."""
        file, expected = self.plan(graph), self.manifest.graphs[graph].plan.sha256
        if (found := sha256_of(file)) != expected:
            raise BundleError(
                f"{file}: the plan was changed: expected SHA-256 {expected}, found {found}; build it again: "
                f"qforge build"
            )
        return file


def engine_folders(bundle: Bundle) -> list[Path]:
    """Folders under the bundle's `engines/`, by name; those of a build under way or killed are not among them."""
    root = bundle.path / ENGINES
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_engine(bundle: Bundle, folder: Path, check_hashes: bool = True) -> BuiltEngine:
    """Read and check one engine of a bundle; `check_hashes=False` looks at the plans' sizes alone.

    Raises:
        BundleError: no engine manifest, another format, another bundle's, or a plan that is missing or was changed.
    """
    file = folder / ENGINE_MANIFEST
    again = "build it again: qforge build"
    if not file.is_file():
        raise BundleError(f"{folder}: expected an engine with {ENGINE_MANIFEST}, found none; remove it or {again}")
    manifest = read_record(file, EngineManifest, ENGINE_FORMAT, again)
    if manifest.bundle_digest != bundle.manifest.digest:
        raise BundleError(
            f"{folder}: expected plans of this bundle ({bundle.manifest.digest[:12]}), found those of another "
            f"({manifest.bundle_digest[:12]}); {again}"
        )
    for name, graph in manifest.graphs.items():
        _check_plan(bundle, folder, name, graph, check_hashes)
    return BuiltEngine(folder, manifest)


def _check_plan(bundle: Bundle, folder: Path, name: str, graph: EngineGraph, check_hashes: bool) -> None:
    entry, plan = bundle.manifest.graphs.get(name), folder / graph.plan.file
    if entry is None or entry.sha256 != graph.onnx_sha256:
        raise BundleError(f"{folder}: graph '{name}' was built from another ONNX file; build it again: qforge build")
    if plan.resolve().parent != folder.resolve():
        raise BundleError(f"{folder}: expected plans in this folder, found {graph.plan.file!r}; do not load it")
    if not plan.is_file():
        raise BundleError(f"{plan}: {ENGINE_MANIFEST} lists this plan, found none; build it again: qforge build")
    found = sha256_of(plan) if check_hashes else plan.stat().st_size
    expected = graph.plan.sha256 if check_hashes else graph.plan.bytes
    if found != expected:
        raise BundleError(
            f"{plan}: the plan was changed: expected {'SHA-256' if check_hashes else 'bytes'} {expected}, found "
            f"{found}; build it again: qforge build"
        )
