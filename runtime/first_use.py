"""The first time an engine runs on a device, it is asked what the bundle recorded, before it answers anyone.

A plan that a driver compiles, or kernels that another GPU chooses, can be wrong without an error. So the recorded cases
of the graph are run and compared at the tolerances that the exporter wrote beside them. That it held is remembered in
the user's cache folder, by plan, device and library, so that it is asked once.

    check_first_use(engine, bundle, "vision", Place(model=sha256, device="NVIDIA L4, …", library="tensorrt 11.4"))
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from runtime.backends import Arrays, Engine
from runtime.bundle import Bundle
from runtime.checks import Check, relative_error
from runtime.errors import CheckFailed
from runtime.files import write_json_atomic
from runtime.precision import carried
from runtime.reference import REFERENCE, GraphCase, read_reference
from runtime.speaker import STATIC
from runtime.static_cache import PortableFace
from runtime.user_cache import user_cache


@dataclass(frozen=True)
class Place:
    """An engine on a device: what must be the same for an old check to count."""

    model: str
    """SHA-256 of what runs: the plan, or the graph."""
    device: str
    """What it runs on, its driver included."""
    library: str
    """What runs it, with its version."""

    @property
    def key(self) -> str:
        """Names it in the cache folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def check_first_use(engine: Engine, bundle: Bundle, graph: str, place: Place, folder: Path | None = None) -> bool:
    """Replay the recorded cases of a graph unless that was done here before; True when it was done now.

    `folder` is where it is remembered; None for the user's cache. A graph without recorded cases is not remembered.

    Raises:
        CheckFailed: an output is further from eager's than the exporter allows.
        BundleError: the bundle has no usable recording.
    """
    note = (folder or user_cache("checked")) / f"{place.key}.json"
    if _holds(note, place, bundle.manifest.digest):
        return False
    cases = [case for case in read_reference(bundle.file(REFERENCE)).cases if case.graph == graph.removesuffix(STATIC)]
    if graph.endswith(STATIC):  # the portable decoder's cases, which know no fixed size
        held = bundle.manifest.graphs[graph].inputs["past_key_0"].dtype
        engine = PortableFace(engine, np.dtype(carried(held)))
    checks = compare(engine, cases, bundle.manifest.limits.max_batch)
    for check in checks:
        if not check.ok:
            raise CheckFailed(
                f"{bundle.path}: {check.graph} on {place.device} by {place.library}: output '{check.output}' is off by "
                f"{check.max_error:.2e} of its largest value, {check.tolerance:.2e} is allowed; it answers nothing "
                f"here: choose another --provider or --backend, or build its engine again"
            )
    if checks:
        record = {"bundle": bundle.manifest.digest, "graph": graph, "place": asdict(place)}
        write_json_atomic(note, record | {"checks": [asdict(check) for check in checks]})
    return bool(checks)


def compare(engine: Engine, cases: Sequence[GraphCase], max_batch: int) -> list[Check]:
    """Every output of every case against eager's; no more rows at once than `max_batch`."""
    checks = list[Check]()
    for case in cases:
        outputs = _run(engine, case.inputs, max_batch)
        checks += [
            Check(f"{case.graph}/{case.case}", name, relative_error(outputs[name], expected), case.tolerances[name])
            for name, expected in case.outputs.items()
        ]
    return checks


def _run(engine: Engine, inputs: Arrays, max_batch: int) -> Arrays:
    """One run, or several where there are more rows than the bundle runs at once."""
    rows = max(len(array) for array in inputs.values())
    if rows <= max_batch:
        return engine.run(inputs)
    starts = range(0, rows, max_batch)
    parts = [engine.run({name: array[at : at + max_batch] for name, array in inputs.items()}) for at in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _holds(note: Path, place: Place, digest: str) -> bool:
    """Whether a note says that this was checked; what cannot be read says nothing."""
    try:
        record = json.loads(note.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("place") == asdict(place) and record.get("bundle") == digest
