"""Time by phase, fairly: the same request goes to every pipeline in turn, and who is first rotates.

What disturbs a machine (clock changes, neighbours) then hits all pipelines alike, and each call has its partner: the
ratio to eager is taken over pairs. Nothing is averaged away: every sample is kept.

Before each timed call the same pipeline answers another request, untimed. Without it whoever follows PyTorch pays for
cold processor caches and for OpenMP threads that still spin: a bundle that takes 7 ms took 8 to 15, and a pause did not
help (2 cores).

Phases: preprocess (file to pixels), vision, qformer (with projection), prefill (first token), decode (all further
tokens), per_token (decode / further tokens), total (around the whole call, by one clock for all).
"""

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from benchmarks.config import BenchConfig
from benchmarks.contestants import EAGER, Contestant
from benchmarks.items import PLURAL, Task, Tasks, spread
from runtime.answers import Answer, Answerer, Request
from runtime.dataset import Row
from runtime.estimates import percentile, ratio_of_medians
from runtime.pipeline import Pipeline
from runtime.progress import Bar, Progress
from runtime.stopwatch import PHASES

TOTAL = "total"
PER_TOKEN = "per_token"


@dataclass
class Samples:
    """What one pipeline took, call by call."""

    phases_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in (*PHASES, TOTAL)})
    """Phase → milliseconds of every call."""
    further_tokens: list[int] = field(default_factory=list)
    """Decoding steps of every call after the one that gave the first token."""

    def add(self, answers: Sequence[Answer], total_ms: float, max_new_tokens: int) -> None:
        """Keep one call."""
        for name in PHASES:
            self.phases_ms[name].append(answers[0].timings_ms[name])
        self.phases_ms[TOTAL].append(total_ms)
        self.further_tokens.append(further_tokens(answers, max_new_tokens))

    def per_token_ms(self) -> list[float]:
        """Decode time per further token, of the calls that had any."""
        pairs = zip(self.phases_ms["decode"], self.further_tokens, strict=True)
        return [decode_ms / count for decode_ms, count in pairs if count]


def time_tasks(
    contestants: Sequence[Contestant], tasks: Tasks, config: BenchConfig, max_new_tokens: int, progress: Progress
) -> list[dict[str, Any]]:
    """Every task and batch size with the query cache off; the smallest batch also when the cache knows every item.

    Returns one JSON-able case each: task, batch, cache ("off" or "hit"), calls, pipelines. A `hit` case also counts
    the look-ups of each bundle's cache.
    """
    smallest = min(config.batch_sizes)
    cases = {False: sorted(set(config.batch_sizes)), True: [smallest]}
    timed: list[dict[str, Any]] = []
    for cached, sizes in cases.items():
        with ExitStack() as stack:
            pipelines = {one.name: stack.enter_context(one.open(cached)) for one in contestants}
            for task, size in ((task, size) for task in tasks for size in sizes):
                batches = batches_of(tasks[task], task, size, config.latency_calls)
                cache = "hit" if cached else "off"
                before = _prime(pipelines, batches, max_new_tokens) if cached else {}
                with progress.bar(f"latency: {PLURAL[task]}, batch {size}, cache {cache}", len(batches)) as bar:
                    samples = measure(pipelines, batches, warmup=config.warmup, max_new_tokens=max_new_tokens, bar=bar)
                found = summarise(samples, config.seed)
                for name, counts in before.items():
                    now = _look_ups(pipelines[name])
                    found[name]["cache"] = {kind: now[kind] - counts[kind] for kind in now}
                timed.append({"task": task, "batch": size, "cache": cache, "calls": len(batches), "pipelines": found})
    return timed


def batches_of(rows: Sequence[Row], task: Task, size: int, calls: int) -> list[list[Request]]:
    """`calls` batches of `size` requests from rows spread over the set; rows come again when there are too few."""
    chosen = islice(cycle(spread(rows, size * calls)), size * calls)
    requests = [Request(row.image, question=row.question if task == "vqa" else None) for row in chosen]
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def measure(
    pipelines: Mapping[str, Answerer],
    batches: Sequence[Sequence[Request]],
    *,
    warmup: int,
    max_new_tokens: int,
    bar: Bar,
) -> dict[str, Samples]:
    """Time every pipeline on every batch; from batch to batch the next one goes first. `bar` advances per batch."""
    names = list(pipelines)
    samples = {name: Samples() for name in names}
    for number in range(warmup):
        for name in names:
            pipelines[name].answer(batches[number % len(batches)], max_new_tokens=max_new_tokens)
    gc.collect()
    for number, requests in enumerate(batches):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pipelines[name].answer(batches[number - 1], max_new_tokens=max_new_tokens)
            start_s = time.perf_counter()
            answers = pipelines[name].answer(requests, max_new_tokens=max_new_tokens)
            samples[name].add(answers, (time.perf_counter() - start_s) * 1e3, max_new_tokens)
        bar.advance()
    return samples


def further_tokens(answers: Sequence[Answer], max_new_tokens: int) -> int:
    """Decoding steps a batch took after prefill: the longest row decides, and its end token is a step too."""
    return max(min(answer.new_tokens + 1, max_new_tokens) - 1 for answer in answers)


def summarise(samples: Mapping[str, Samples], seed: int) -> dict[str, Any]:
    """Per pipeline p50 and p90 of every phase, the ratio of total time to eager's with its interval, all samples."""
    reference_ms = samples[EAGER].phases_ms[TOTAL]
    result: dict[str, Any] = {}
    for name, one in samples.items():
        measured = {**one.phases_ms, PER_TOKEN: one.per_token_ms()}
        result[name] = {
            "p50_ms": {phase: percentile(values, 50) for phase, values in measured.items() if values},
            "p90_ms": {phase: percentile(values, 90) for phase, values in measured.items() if values},
            "time_over_eager": None if name == EAGER else ratio_of_medians(one.phases_ms[TOTAL], reference_ms, seed),
            "samples_ms": one.phases_ms,
            "further_tokens": one.further_tokens,
        }
    return result


def _prime(
    pipelines: Mapping[str, Answerer], batches: Sequence[Sequence[Request]], max_new_tokens: int
) -> dict[str, dict[str, int]]:
    """Let every bundle see all items once; returns the look-ups each cache has counted by then."""
    bundles = {name: pipeline for name, pipeline in pipelines.items() if isinstance(pipeline, Pipeline)}
    for pipeline in bundles.values():
        for requests in batches:
            pipeline.answer(requests, max_new_tokens=max_new_tokens)
    return {name: _look_ups(pipeline) for name, pipeline in bundles.items()}


def _look_ups(pipeline: Answerer) -> dict[str, int]:
    if not isinstance(pipeline, Pipeline):
        raise TypeError(f"{type(pipeline).__name__} has no query cache")
    return {"hits": pipeline.cache.hits, "misses": pipeline.cache.misses}
