"""The bundle, defined by its reader: what is accepted, and what is refused.

A bundle is a folder that runs without us: graphs, tokenizer, settings, recorded answers. `manifest.json` states all of
it; its own digest and the SHA-256 of every file make one changed byte a clear error instead of a wrong answer.

    bundle = read_bundle("runs/demo/bundle-fp32")
    bundle.manifest.graphs["vision"].inputs
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from runtime.errors import BundleError
from runtime.files import sha256_of, sha256s_of, write_text_atomic
from runtime.manifest import (
    FORMAT,
    READABLE,
    FileEntry,
    Generation,
    GraphEntry,
    Limits,
    Manifest,
    ModelFacts,
    Prompts,
    TensorSpec,
)
from runtime.precision import LanguagePrecision, Precision, Target
from runtime.preprocess import PreprocessSettings
from runtime.settings import first_problem

MANIFEST = "manifest.json"
ENGINES = "engines"
"""Folder of plans built on a device after export; a manifest does not list them."""
PREPARED = "prepared"
"""Folder of graphs rewritten and packed for a device's processor after export; not listed either."""
LATENCY = "latency.json"
"""What the exporting machine measured."""
UNLISTED = ("README.md", LATENCY)
"""Words and measurements for people, which no reader of the bundle relies on: not listed, so that two exports of one
checkpoint have one digest, and that a card may be annotated."""
REPAIR = "copy or export it again"
"""What helps when a file of a bundle is not as its manifest says."""


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked."""

    path: Path
    """Its folder."""
    manifest: Manifest

    def file(self, relative: str) -> Path:
        """Absolute path of a file in the bundle; BundleError when that leads outside or is not there."""
        return _inside(self.path, relative)

    def graph(self, name: str) -> Path:
        """Absolute path of a graph; BundleError when the bundle has no such graph."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.path}: expected a graph '{name}', found {sorted(self.manifest.graphs)}")
        return self.file(self.manifest.graphs[name].file)

    def check_graph(self, name: str) -> None:
        """Hash a graph's files once more: what opens later than the bundle was read asks whether it is the same.

        Raises:
            BundleError: no such graph, or a file of it is missing or was changed.
        """
        self.graph(name)
        entry = self.manifest.graphs[name]
        parts = [part for part in (entry, entry.data) if part]
        require_hashes({self.file(part.file): part.sha256 for part in parts}, REPAIR)


def read_bundle(path: Path | str, check_hashes: bool = True) -> Bundle:
    """Read `manifest.json` and check that the folder is exactly what it says.

    `check_hashes=False` skips reading the big files again when the caller has just done so; presence is still checked.

    Raises:
        BundleError: no bundle, unknown format, or a file that is missing, changed, unlisted or outside.
    """
    path = Path(path)
    record = _read_manifest_json(path)
    try:
        manifest = Manifest.model_validate(record)
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST}: {first_problem(error)}; export the bundle again") from error
    listed = {MANIFEST, *_listed_hashes(manifest)}
    expected = {_inside(path, relative): sha256 for relative, sha256 in _listed_hashes(manifest).items()}
    if check_hashes:
        require_hashes(expected, REPAIR)
    for relative in _files_under(path):
        if relative not in {*listed, *UNLISTED} and not relative.startswith((f"{ENGINES}/", f"{PREPARED}/")):
            raise BundleError(f"{path / relative}: expected only files that {MANIFEST} lists, found this; remove it")
    return Bundle(path, manifest)


def require_hashes(expected: Mapping[Path, str], repair: str) -> None:
    """Each file has its SHA-256; BundleError names the first that has not, and what repairs it."""
    for file, found in zip(expected, sha256s_of(list(expected)), strict=True):
        if found != expected[file]:
            raise BundleError(
                f"{file}: the file was changed: expected SHA-256 {expected[file]}, found {found}; {repair}"
            )


@dataclass(frozen=True)
class GraphFiles:
    """What the exporter states of one graph; hashes and sizes are filled in by `write_manifest`."""

    file: str
    """ONNX file, path inside the bundle."""
    inputs: dict[str, TensorSpec]
    """By name, in the graph's order."""
    outputs: dict[str, TensorSpec]
    """By name, in the graph's order."""
    data: str | None
    """External weights, path inside the bundle; None when they are in the graph file."""
    made_from: str | None = None
    """See `GraphEntry`."""
    on_cpu: bool = True
    """Whether ONNX Runtime's CPU can compute it."""

    def entry(self, folder: Path) -> GraphEntry:
        """With hash and size of the files under `folder`."""
        graph = _measured(folder, self.file)
        data = None if self.data is None else _measured(folder, self.data)
        return GraphEntry(
            **graph.model_dump(),
            data=data,
            inputs=self.inputs,
            outputs=self.outputs,
            made_from=self.made_from,
            on_cpu=self.on_cpu,
        )


def write_manifest(
    folder: Path,
    *,
    model: ModelFacts,
    precision: Precision,
    language_precision: LanguagePrecision,
    target: Target,
    limits: Limits,
    preprocess: PreprocessSettings,
    prompts: Prompts,
    generation: Generation,
    graphs: Mapping[str, GraphFiles],
    made_by: Mapping[str, str],
) -> Manifest:
    """Hash every file in `folder`, which is otherwise complete, and write `manifest.json`; the exporter's last step."""
    entries = {name: graph.entry(folder) for name, graph in graphs.items()}
    of_graphs = {entry.file for graph in entries.values() for entry in (graph, graph.data) if entry}
    unsigned = Manifest(
        format=FORMAT,
        digest="",
        model=model,
        precision=precision,
        language_precision=language_precision,
        target=target,
        limits=limits,
        preprocess=preprocess,
        prompts=prompts,
        generation=generation,
        graphs=entries,
        files={
            name: sha256_of(folder / name)
            for name in _files_under(folder)
            if name not in {MANIFEST, *UNLISTED, *of_graphs}
        },
        made_by=dict(made_by),
    )
    record = unsigned.model_dump(mode="json")
    record["digest"] = _digest(record)
    write_text_atomic(folder / MANIFEST, _render(record))
    return Manifest.model_validate(record)


def _measured(folder: Path, relative: str) -> FileEntry:
    file = folder / relative
    return FileEntry(file=relative, sha256=sha256_of(file), bytes=file.stat().st_size)


def _listed_hashes(manifest: Manifest) -> dict[str, str]:
    """Path inside the bundle → SHA-256, of every file the manifest lists."""
    entries = [entry for graph in manifest.graphs.values() for entry in (graph, graph.data) if entry]
    return {entry.file: entry.sha256 for entry in entries} | manifest.files


def _files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _inside(root: Path, relative: str) -> Path:
    """Absolute path of a listed file; a link that leads out of the bundle counts as outside."""
    file = (root / relative).resolve()
    if PurePosixPath(relative).is_absolute() or not file.is_relative_to(root.resolve()):
        raise BundleError(f"{root / MANIFEST}: expected paths inside the bundle, found {relative!r}; do not load it")
    if not file.is_file():
        raise BundleError(f"{root / relative}: {MANIFEST} lists this file, found none; copy or export it again")
    return file


def _read_manifest_json(folder: Path) -> dict[str, Any]:
    """The manifest as written, its format known and not a byte changed."""
    file = folder / MANIFEST
    if not file.is_file():
        raise BundleError(f"{folder}: expected a bundle with {MANIFEST}, found none; make one: qforge export")
    try:
        text = file.read_bytes().decode("utf-8")
        record = json.loads(text)
    except ValueError as error:
        raise BundleError(f"{file}: expected JSON, found other data; copy or export the bundle again") from error
    if not isinstance(record, dict):
        raise BundleError(f"{file}: expected a JSON object, found {type(record).__name__}; export the bundle again")
    if record.get("format") not in READABLE:
        known, found = " or ".join(map(str, READABLE)), record.get("format")
        raise BundleError(f"{file}: expected format {known}, found {found!r}; upgrade qforge or export again")
    expected = _digest(record)
    if record.get("digest") != expected or text != _render(record):
        raise BundleError(
            f"{file}: the manifest was changed: its content has digest {expected}, it states {record.get('digest')}; "
            f"copy or export the bundle again"
        )
    return record


def _digest(record: Mapping[str, Any]) -> str:
    unsigned = {key: value for key, value in record.items() if key != "digest"}
    canonical = json.dumps(unsigned, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def _render(record: Mapping[str, Any]) -> str:
    """The one way a manifest is written, so that not even a space can change unseen."""
    return json.dumps(record, indent=1) + "\n"
