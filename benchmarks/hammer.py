"""Many threads on one pipeline: are the answers those of one thread alone, does memory stay, and is it faster?

Seeded pictures of many sizes; captions, questions, streams, beams, draws, several texts, and requests that must be
refused. A pipeline that nobody shares says first what is right. The cache is small on purpose, so that images come and
go. Memory is a straight line through what was resident in the second half: bytes a second, with its 95 % interval.
The first half is warm-up: onnxruntime keeps the memory of the largest batch that it has met, and such are rare.

    python -m benchmarks.hammer BUNDLE --seconds 120 --threads 8 --out benchmarks/results/hammer.json

Exit 1 when an answer differs.
"""

import argparse
import gc
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

import runtime
from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from runtime.answers import Answer, Request
from runtime.bundle import read_bundle
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from runtime.files import write_text_atomic
from runtime.pipeline import Pipeline

QUESTIONS = (
    "what colour is the circle?",
    "how many shapes are there?",
    "is there a red square?",
    "what is on the left",
)
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
CACHE_BYTES = 1024**2
WAIT_MS = 5.0
SAMPLE_S = 0.25
LATEST = 100_000
STATM = Path("/proc/self/statm")
Said = tuple[tuple[int, ...], ...] | str
"""The token ids of every text; or the sentence of a refusal."""


@dataclass(frozen=True)
class Ask:
    """One request, and how it is asked."""

    kind: str
    request: Request
    decoding: Decoding = GREEDY
    streamed: bool = False

    def said_by(self, pipeline: Pipeline) -> Said:
        """What the pipeline says to it."""
        try:
            if self.streamed:
                *_, last = pipeline.stream(self.request, decoding=self.decoding)
                assert last.answer is not None
                return _ids(last.answer)
            return _ids(pipeline.answer([self.request], decoding=self.decoding)[0])
        except InputError as refusal:
            return str(refusal)


@dataclass
class _Found:
    """What the threads saw; the lock guards all of it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    by_kind: Counter[str] = field(default_factory=Counter)
    different: list[dict[str, Any]] = field(default_factory=list)
    latency_ms: np.ndarray = field(default_factory=lambda: np.full(LATEST, -1.0))
    """Of the latest answers: all its memory is taken before the first sample, lest it look like a leak."""


def make_asks(bundle: Path, count: int, seed: int) -> list[Ask]:
    """At least 24 requests of all kinds, the same for the same seed."""
    rng, most = np.random.default_rng(seed), read_bundle(bundle).manifest.limits.max_batch
    beams = min(3, most)
    kinds: dict[str, Decoding] = {
        "greedy": GREEDY,
        "drawn": Decoding(do_sample=True, seed=seed, temperature=0.8, num_return_sequences=min(2, most)),
        "beams": Decoding(num_beams=beams, num_return_sequences=beams, length_penalty=0.6) if beams > 1 else GREEDY,
        "penalties": Decoding(repetition_penalty=1.2, no_repeat_ngram_size=3),
        "streamed": GREEDY,
    }
    asks = [Ask("refused", Request(b"no image")), Ask("refused", Request(_picture(rng), " . "))]
    for kind in itertools.islice(itertools.cycle(kinds), max(count, 24) - len(asks)):
        question = None if rng.random() < 0.4 else str(rng.choice(QUESTIONS))
        asks.append(Ask(kind, Request(_picture(rng), question), kinds[kind], kind == "streamed"))
    return asks


def hammer(bundle: Path, asks: Sequence[Ask], seconds: float, threads: int, warm_up_s: float) -> dict[str, Any]:
    """Ask from all threads at once, each in an order of its own, and compare; JSON-able."""
    with runtime.load(bundle, cache_bytes=CACHE_BYTES) as single:
        expected = [ask.said_by(single) for ask in asks]
    found, stop = _Found(), threading.Event()
    gc.collect()
    with runtime.load(bundle, cache_bytes=CACHE_BYTES, batch_wait_ms=WAIT_MS) as shared:

        def caller(number: int) -> None:
            order = np.random.default_rng(number)
            while not stop.is_set():
                place = int(order.integers(len(asks)))
                begin = time.perf_counter()
                said = asks[place].said_by(shared)
                _note(found, asks[place], expected[place], said, (time.perf_counter() - begin) * 1e3)

        callers = [threading.Thread(target=caller, args=(number,)) for number in range(threads)]
        for one in callers:
            one.start()
        times_s, resident = _sampled(seconds)
        stop.set()
        for one in callers:
            one.join()
    counted = np.array(times_s) >= warm_up_s
    latency_ms = found.latency_ms[found.latency_ms >= 0]
    slope, margin = slope_of(np.array(times_s)[counted], np.array(resident, float)[counted])
    return {
        "seconds": seconds,
        "threads": threads,
        "answers": sum(found.by_kind.values()),
        "answers_by_kind": dict(sorted(found.by_kind.items())),
        "different": found.different,
        "latency_p50_ms": float(np.percentile(latency_ms, 50)),
        "latency_p99_ms": float(np.percentile(latency_ms, 99)),
        "warm_up_s": warm_up_s,
        "memory_slope_bytes_per_s": slope,
        "memory_slope_margin_95": margin,
        "memory_growth_after_warm_up": slope * (seconds - warm_up_s) / float(np.median(resident)),
        "resident_bytes": resident,
        "sample_every_s": SAMPLE_S,
    }


def throughput(bundle: Path, asks: Sequence[Ask], threads: int, rounds: int) -> dict[str, Any]:
    """As many questions as threads: one after the other, by threads each for itself, and batched; milliseconds.

    Interleaved; the query cache is off, so that every round pays for vision.
    """
    some = [ask for ask in asks if ask.kind == "greedy"][:threads]
    took: dict[str, list[float]] = {"one_after_the_other": [], "threads_unbatched": [], "threads_batched": []}
    with (
        runtime.load(bundle, cache_bytes=0) as single,
        runtime.load(bundle, cache_bytes=0, batch_wait_ms=WAIT_MS) as shared,
    ):
        ways: dict[str, Callable[[], None]] = {
            "one_after_the_other": lambda: _in_turn(single, some),
            "threads_unbatched": lambda: _at_once(single, some),
            "threads_batched": lambda: _at_once(shared, some),
        }
        for number in range(rounds + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                if number:  # the first is warm-up
                    took[name].append((time.perf_counter() - begin) * 1e3)
    medians = {name: float(np.median(each)) for name, each in took.items()}
    return {
        "requests": len(some),
        "rounds": rounds,
        "median_ms": medians,
        "speedup_over_one_after_the_other": medians["one_after_the_other"] / medians["threads_batched"],
        "samples_ms": took,
    }


def slope_of(times_s: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """(slope of the line of least squares, half of its 95 % interval), from at least three samples."""
    if len(times_s) < 3:
        raise InputError(f"seconds: expected at least three samples after warm-up, found {len(times_s)}; run longer")
    centred = times_s - times_s.mean()
    slope = float(centred @ values / (centred @ centred))
    rest = values - values.mean() - slope * centred
    return slope, float(1.96 * np.sqrt(rest @ rest / (len(values) - 2) / (centred @ centred)))


def _note(found: _Found, ask: Ask, expected: Said, said: Said, took_ms: float) -> None:
    with found.lock:
        found.latency_ms[found.by_kind.total() % LATEST] = took_ms
        found.by_kind[ask.kind] += 1
        if said != expected and len(found.different) < 100:
            found.different.append(
                {"kind": ask.kind, "question": ask.request.question, "expected": expected, "found": said}
            )


def _sampled(seconds: float) -> tuple[list[float], list[int]]:
    """Seconds since now and resident bytes, until the time is over."""
    begin, page = time.perf_counter(), os.sysconf("SC_PAGE_SIZE")
    times_s, resident = list[float](), list[int]()
    while (now_s := time.perf_counter() - begin) < seconds:
        times_s.append(now_s)
        resident.append(int(STATM.read_text().split()[1]) * page)
        time.sleep(min(SAMPLE_S, seconds / 8))
    return times_s, resident


def _in_turn(pipeline: Pipeline, asks: Sequence[Ask]) -> None:
    for ask in asks:
        ask.said_by(pipeline)


def _at_once(pipeline: Pipeline, asks: Sequence[Ask]) -> None:
    threads = [threading.Thread(target=ask.said_by, args=(pipeline,)) for ask in asks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ids(answer: Answer) -> tuple[tuple[int, ...], ...]:
    return (answer.token_ids, *(other.token_ids for other in answer.alternatives))


def _picture(rng: np.random.Generator) -> np.ndarray:
    """A few shapes on a coloured ground, of any size."""
    width, height = (int(side) for side in rng.integers(40, 400, 2))
    image = Image.new("RGB", (width, height), str(rng.choice(COLOURS)))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 5))):
        x, y, side = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(10, 120))
        draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        draw((x, y, x + side, y + side), fill=str(rng.choice(COLOURS)))
    return np.asarray(image)


def main() -> int:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--requests", type=int, default=96, help="different ones, at least 24")
    parser.add_argument("--rounds", type=int, default=20, help="of the throughput figure")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args()
    asks = make_asks(arguments.bundle, arguments.requests, seed=0)
    found = hammer(arguments.bundle, asks, arguments.seconds, arguments.threads, arguments.seconds / 2)
    manifest = read_bundle(arguments.bundle).manifest
    result = {
        "what": "many threads on one pipeline, beside one thread alone",
        "command": "python -m benchmarks.hammer BUNDLE --seconds N --threads N --out FILE",
        "bundle": {"digest": manifest.digest, "precision": manifest.precision, "model": manifest.model.model_dump()},
        "max_batch": manifest.limits.max_batch,
        "batch_wait_ms": WAIT_MS,
        "cache_bytes": CACHE_BYTES,
        "different_requests": len(asks),
        "hammer": found,
        "throughput": throughput(arguments.bundle, asks, arguments.threads, arguments.rounds),
        "machine": describe_machine(),
    }
    text = json_text(result)
    if arguments.out is not None:
        write_text_atomic(arguments.out, text)
    print(text)
    return 1 if found["different"] else 0


if __name__ == "__main__":
    sys.exit(main())
