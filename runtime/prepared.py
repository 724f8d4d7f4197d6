"""Graphs as ONNX Runtime's CPU wants them: `prepared/` in a bundle, written by `qforge prepare` on the device.

To open a graph, ONNX Runtime rewrites it and packs a second copy of its weights for this processor, in memory of its
own. Prepared, both are done once and kept in files: opening maps them, several processes share them, and what is never
used takes no memory. Answers are the same numbers.

A prepared graph is for one bundle, one version of ONNX Runtime and one kind of processor. `prepared.json` says which;
elsewhere it is left alone, and the graphs are opened from `onnx/` as ever. Every byte is checked before it is used.
"""

from pathlib import Path

from pydantic import NonNegativeFloat

from runtime.backends.ort import ort_version
from runtime.bundle import PREPARED, Bundle, require_hashes
from runtime.cores import cpu_fingerprint
from runtime.errors import BundleError
from runtime.manifest import FileEntry
from runtime.records import read_record
from runtime.settings import Settings

RECORD = "prepared.json"
FORMAT = 1
"""The only format of prepared.json so far."""
REPAIR = "prepare it again: qforge prepare"


class PreparedGraph(Settings):
    """One graph and its packed weights; paths inside the folder."""

    graph: FileEntry
    """ONNX, rewritten."""
    data: FileEntry | None = None
    """Weights; null where the graph has none worth a file."""


class Prepared(Settings):
    """What `prepared.json` states."""

    format: int
    """See `FORMAT`."""
    bundle_digest: str
    """`manifest.json` of the bundle whose graphs they are."""
    onnxruntime: str
    """The version that wrote them, and alone reads them."""
    processor: str
    """`cpu_fingerprint()` of the machine that wrote them."""
    opened_ms: NonNegativeFloat
    """Time to open all graphs here, prepared."""
    unprepared_ms: NonNegativeFloat
    """Time to open all graphs here from `onnx/`."""
    graphs: dict[str, PreparedGraph]
    """Graph name → its files."""
    left_out: dict[str, str]
    """Graph name → why it is opened from `onnx/` as ever."""


def read_prepared(bundle: Bundle) -> Prepared | None:
    """What the bundle's folder of prepared graphs states; None without one.

    Raises:
        BundleError: a record that cannot be read.
    """
    file = bundle.path / PREPARED / RECORD
    if not file.is_file():
        return None
    return read_record(file, Prepared, FORMAT, f"{REPAIR} {bundle.path}")


def fits_here(prepared: Prepared, bundle: Bundle) -> bool:
    """Whether these graphs are of this bundle and for this machine."""
    here = (bundle.manifest.digest, ort_version(), cpu_fingerprint())
    return (prepared.bundle_digest, prepared.onnxruntime, prepared.processor) == here


def prepared_graph(bundle: Bundle, graph_name: str) -> Path | None:
    """The prepared file of a graph; None where there is none for this machine.

    Raises:
        BundleError: a prepared file is missing or was changed.
    """
    prepared = read_prepared(bundle)
    if prepared is None or graph_name not in prepared.graphs or not fits_here(prepared, bundle):
        return None
    files, root = prepared.graphs[graph_name], bundle.path / PREPARED
    expected = {root / entry.file: entry.sha256 for entry in (files.graph, files.data) if entry}
    for file in expected:
        if file.resolve().parent != root.resolve() or not file.is_file():
            raise BundleError(f"{file}: {RECORD} lists this file, found none in its folder; {REPAIR} {bundle.path}")
    require_hashes(expected, f"{REPAIR} {bundle.path}")
    return root / files.graph.file
