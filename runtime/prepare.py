"""Prepare a bundle's graphs for this processor once, so that later openings map them; see runtime/prepared.py."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from runtime.backends.ort import OrtEngine, ort_version
from runtime.bundle import PREPARED, Bundle
from runtime.checks import relative_error
from runtime.cores import cpu_fingerprint
from runtime.errors import InputError
from runtime.files import atomic_folder, sha256_of, write_text_atomic
from runtime.manifest import FileEntry
from runtime.prepared import FORMAT, RECORD, Prepared, PreparedGraph
from runtime.progress import Progress
from runtime.reference import REFERENCE, read_reference

SAME = 1e-5
"""Largest error, as a fraction of the largest value, between a graph and the prepared one: the same kernels run."""


def prepare(bundle: Bundle, progress: Progress) -> Prepared:
    """Write `prepared/` into the bundle's folder; one that is there is replaced when the new one is complete.

    Raises:
        InputError: no graph of the bundle runs on a CPU.
        BackendUnavailable: onnxruntime is not installed.
        OutOfSpace: the disk ran full; the bundle is as it was.
    """
    runnable = [name for name, graph in bundle.manifest.graphs.items() if graph.on_cpu]
    if not runnable:
        raise InputError(f"{bundle.path}: none of its graphs runs on a CPU, so there is nothing to prepare")
    with atomic_folder(bundle.path / PREPARED, replaces=RECORD) as folder:
        left_out = dict[str, str]()
        with progress.bar("preparing graphs", len(runnable)) as bar:
            for name in runnable:
                why = _prepare(bundle, name, folder / f"{name}.onnx")
                if why is not None:
                    left_out[name] = why
                    _remove(folder, name)
                bar.advance()
        names = [name for name in runnable if name not in left_out]
        prepared = Prepared(
            format=FORMAT,
            bundle_digest=bundle.manifest.digest,
            onnxruntime=str(ort_version()),
            processor=cpu_fingerprint(),
            unprepared_ms=_opening_ms(
                names, lambda name: OrtEngine(bundle.graph(name), fuse_int8=bundle.manifest.fuses_int8)
            ),
            opened_ms=_opening_ms(names, lambda name: OrtEngine(folder / f"{name}.onnx", prepared=True)),
            graphs={name: _files(folder, name) for name in names},
            left_out=left_out,
        )
        write_text_atomic(folder / RECORD, prepared.model_dump_json(indent=1) + "\n")
    return prepared


def _prepare(bundle: Bundle, name: str, file: Path) -> str | None:
    """Write one graph and replay what was recorded of it; the reason if it cannot be used.

    onnxruntime 1.31 reads some packed weights of MatMulNBits back from a place that is not theirs (431 columns in
    blocks of 32): the answer is another one. Where a file is mapped does not change, so one replay tells for good.
    """
    cases = [case for case in read_reference(bundle.file(REFERENCE)).cases if case.graph == name]
    with OrtEngine(bundle.graph(name), prepare_as=file, fuse_int8=bundle.manifest.fuses_int8) as exported:
        expected = [exported.run(case.inputs) for case in cases]
    with OrtEngine(file, prepared=True) as prepared:
        found = [prepared.run(case.inputs) for case in cases]
    if not cases:
        return "nothing was recorded of it to compare with"
    worst = max(
        relative_error(mine[output], array)
        for mine, theirs in zip(found, expected, strict=True)
        for output, array in theirs.items()
    )
    return None if worst <= SAME else f"prepared, it computes other numbers (error {worst:.2g}, {SAME:.2g} allowed)"


def _opening_ms(names: list[str], opened: Callable[[str], OrtEngine]) -> float:
    start = time.perf_counter()
    with ExitStack() as together:
        for name in names:
            together.enter_context(opened(name))
        return 1000 * (time.perf_counter() - start)


def _files(folder: Path, name: str) -> PreparedGraph:
    graph, data = folder / f"{name}.onnx", folder / f"{name}.onnx.data"
    return PreparedGraph(graph=_entry(graph), data=_entry(data) if data.exists() else None)


def _remove(folder: Path, name: str) -> None:
    for file in (folder / f"{name}.onnx", folder / f"{name}.onnx.data"):
        file.unlink(missing_ok=True)


def _entry(file: Path) -> FileEntry:
    return FileEntry(file=file.name, sha256=sha256_of(file), bytes=file.stat().st_size)
