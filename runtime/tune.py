"""Measures the ways in which bundles can run on this machine, and keeps the fastest that answers as well as it must.

All are opened, and every request is answered by each of them before the next one comes, in an order that changes: what
disturbs the machine for a second disturbs them alike. One pass gives latency and accuracy of the very same answers.
"""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from runtime.backends import Device, available_backends
from runtime.backends.ort import providers_here
from runtime.bundle import Bundle
from runtime.cores import physical_cores
from runtime.dataset import Row
from runtime.errors import InputError, QforgeError
from runtime.evaluate import METRICS, rows_for, score_of
from runtime.machine import describe
from runtime.pipeline import Pipeline
from runtime.progress import Progress
from runtime.reference import REFERENCE, ChainCase, read_reference
from runtime.stopwatch import Stopwatch
from runtime.tuned import Measurement, Tuned, write_tuned

WARM_UP = 2
"""Requests that are answered before measuring."""
LEAST = 3
"""Requests below which a median says nothing."""


class Workload(Protocol):
    """Requests with what is right."""

    @property
    def metric(self) -> str:
        """What a score is."""
        ...

    @property
    def items(self) -> int:
        """How many requests."""
        ...

    def ask(self, pipeline: Pipeline, item: int) -> float:
        """Answer one; its score from 0 to 1."""
        ...


class Rows:
    """The rows of a data set, one at a time from file to text; satisfies `Workload`."""

    def __init__(self, rows: Sequence[Row], task: Literal["caption", "vqa"], limit: int | None = None) -> None:
        """The first `limit` rows that fit the task, None for all; DataError when none does."""
        self._rows, self._task = rows_for(rows, task)[:limit], task
        self.metric, self.items = METRICS[task], len(self._rows)

    def ask(self, pipeline: Pipeline, item: int) -> float:
        """See `Workload`."""
        return score_of(pipeline, self._rows[item], self._task)


class Recorded:
    """The answers that the exporter recorded of eager PyTorch, from pixels to tokens; satisfies `Workload`."""

    metric = "tokens equal to PyTorch's"

    def __init__(self, chain: ChainCase, repeats: int) -> None:
        """Each of the few recorded requests comes `repeats` times."""
        self._chain = chain
        self.items = len(chain.prompts) * repeats

    def ask(self, pipeline: Pipeline, item: int) -> float:
        """See `Workload`."""
        chain, row = self._chain, item % len(self._chain.prompts)
        one = slice(row, row + 1)
        (ids,) = pipeline.generate(
            chain.pixels_BCHW[one], chain.questions[one], chain.prompts[one], chain.max_new_tokens, Stopwatch()
        )
        return float(ids == chain.token_ids[row])


def recorded_of(bundle: Bundle, repeats: int) -> Recorded:
    """The recorded requests of a bundle; InputError for one that records none."""
    chain = read_reference(bundle.file(REFERENCE)).chain
    if chain is None:
        raise InputError(f"{bundle.path}: expected a bundle that answers, found one that only searches")
    return Recorded(chain, repeats)


def devices_here() -> list[Device]:
    """Every way of running a graph that this machine has: the CPU by 1, 2, 4 … threads, each provider, plans."""
    cores = physical_cores()
    counts = sorted({1 << power for power in range(cores.bit_length())} | {cores})
    providers = providers_here()
    devices = [Device("ort", "cpu", threads) for threads in counts] if "cpu" in providers else []
    devices += [Device("ort", provider) for provider in providers if provider != "cpu"]
    others = [backend for backend in available_backends() if backend != "ort"]
    return devices + [Device(backend) for backend in others]


@dataclass
class _Candidate:
    bundle: Bundle
    device: Device
    pipeline: Pipeline | None = None
    why: str | None = None
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def measurement(self, reference: float, max_drop: float) -> Measurement:
        manifest = self.bundle.manifest
        accuracy = statistics.fmean(self.scores) if self.scores else None
        return Measurement(
            bundle=self.bundle.path.name,
            precision=f"{manifest.precision}, {manifest.language_precision}",
            backend=self.device.backend,
            provider=self.device.provider,
            threads=self.device.threads,
            ms=round(1e3 * statistics.median(self.seconds), 3) if self.seconds else None,
            accuracy=accuracy,
            # points of both are compared, so that 0.3 points are not missed by a last bit
            held=accuracy is not None and round(100 * (reference - accuracy), 6) <= max_drop,
            why=self.why,
        )


def tune(
    bundles: Sequence[Bundle],
    workload: Workload,
    *,
    max_drop: float,
    devices: Sequence[Device] | None = None,
    progress: Progress,
) -> dict[Path, Tuned]:
    """Measure every bundle on every device and write each bundle's choice into it; path → what was written.

    Accuracy is compared with the first bundle in FP32, or else the first of all, on the first device that runs it. A
    bundle of which nothing held is left as it is and is not in the result.

    Args:
        bundles: Forms of one checkpoint.
        workload: What is asked.
        max_drop: Points (percent) of its metric that may be lost.
        devices: Where; None: every way that this machine has.
        progress: Where the bar is shown.

    Raises:
        InputError: a negative `max_drop`, too few requests, or nothing runs the reference here.
    """
    if max_drop < 0:
        raise InputError(f"--max-drop: expected at least 0 points, found {max_drop:g}")
    if workload.items < LEAST:
        raise InputError(f"--data: expected at least {LEAST} rows to measure on, found {workload.items}")
    candidates = [_Candidate(bundle, device) for bundle in bundles for device in devices or devices_here()]
    with ExitStack() as opened:
        for candidate in candidates:
            try:
                pipeline = Pipeline(candidate.bundle, device=candidate.device, cache_bytes=0)
            except QforgeError as error:
                candidate.why = str(error)
            else:
                candidate.pipeline = opened.enter_context(pipeline)
        _measure([candidate for candidate in candidates if candidate.pipeline is not None], workload, progress)
    standard = _reference(candidates)
    best = statistics.fmean(standard.scores)
    measured = tuple(candidate.measurement(best, max_drop) for candidate in candidates)
    results = dict[Path, Tuned]()
    for bundle in bundles:
        own = [m for c, m in zip(candidates, measured, strict=True) if c.bundle is bundle and m.held]
        if not own:
            continue
        results[bundle.path] = Tuned(
            bundle_digest=bundle.manifest.digest,
            machine=describe(),
            choice=min(own, key=_ms),
            reference=standard.measurement(best, max_drop),
            measured=measured,
            metric=workload.metric,
            items=workload.items,
            max_drop=max_drop,
        )
        write_tuned(bundle.path, results[bundle.path])
    return results


def _ms(measurement: Measurement) -> float:
    assert measurement.ms is not None, "what held was measured"
    return measurement.ms


def _reference(candidates: Sequence[_Candidate]) -> _Candidate:
    """What accuracy is compared with."""
    full = [c for c in candidates if c.bundle.manifest.precision == c.bundle.manifest.language_precision == "fp32"]
    of = (full or candidates)[0].bundle
    for candidate in candidates:
        if candidate.bundle is of and candidate.pipeline is not None:
            return candidate
    raise InputError(f"{of.path}: accuracy is compared with this bundle, and nothing here runs it: {candidates[0].why}")


def _measure(candidates: Sequence[_Candidate], workload: Workload, progress: Progress) -> None:
    """Every request by every candidate, each time another one first."""
    for candidate in candidates:
        for item in range(WARM_UP):
            _ask(candidate, workload, item)
    with progress.bar("measuring", workload.items) as bar:
        for item in range(workload.items):
            for place in range(len(candidates)):
                candidate = candidates[(item + place) % len(candidates)]
                start = time.perf_counter()
                score = _ask(candidate, workload, item)
                candidate.seconds.append(time.perf_counter() - start)
                candidate.scores.append(score)
            bar.advance()


def _ask(candidate: _Candidate, workload: Workload, item: int) -> float:
    assert candidate.pipeline is not None, "only what was opened is asked"
    return workload.ask(candidate.pipeline, item)
