"""The whole comparison, top to bottom: bundles beside eager PyTorch, same items, same threads, same run.

Leaves in `out`: result.json (everything measured, each latency sample, the machine, settings and hashes),
answers.jsonl (what every pipeline said, item by item), report.md (written from result.json alone), answers.png and
latency.png.

    qforge bench BUNDLE --against CHECKPOINT --out DIR
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.accuracy import answer_tasks, compare_answers, swap_images
from benchmarks.config import BenchConfig
from benchmarks.contestants import Contestant, common_token_limit, contestants_of, torch_threads
from benchmarks.fresh_process import run_fresh
from benchmarks.gate import check
from benchmarks.items import Task, Tasks, answer_lines, fitting
from benchmarks.latency import batches_of, time_tasks
from benchmarks.machine import cpu_seconds, describe_machine
from benchmarks.picture import draw_answers, draw_latency
from benchmarks.report import render
from benchmarks.results import json_lines, json_text
from benchmarks.sizes import rows_digest
from benchmarks.swap import image_hashes
from runtime.backends import Device
from runtime.cores import physical_cores
from runtime.dataset import Row
from runtime.errors import CheckFailed, DataError
from runtime.estimates import percentile
from runtime.files import atomic_folder
from runtime.progress import Progress

RESULT = "result.json"
FORMAT = 1
"""Of result.json."""


def bench(
    bundles: Sequence[Path],
    checkpoint: Path,
    config: BenchConfig,
    *,
    caption_rows: Sequence[Row],
    vqa_rows: Sequence[Row],
    prior_rows: Sequence[Row],
    out: Path,
    progress: Progress,
) -> Path:
    """Measure every bundle beside the checkpoint it came from; returns `out`, which then holds the files named above.

    Args:
        bundles: Folders that `qforge export` made.
        checkpoint: The folder they were made from; eager PyTorch answers with it.
        config: How much is measured.
        caption_rows: Test rows with captions; none leaves the task out.
        vqa_rows: Test questions; none leaves the task out.
        prior_rows: Training questions that the best question-only answerer learns from; none leaves it out.
        out: Folder of the results; an older one is replaced.
        progress: Where bars are shown.

    Raises:
        CheckFailed: the files are written, and a bundle does not hold what `benchmarks.gate` asks.
        InputError: no bundle, a batch size beyond a bundle's limit, or `out` holds other files.
        DataError: no test row for either task.
        BundleError, CheckpointError, MissingFile, ImageError: what was given cannot be used.
    """
    with atomic_folder(out, replaces=RESULT) as folder:  # first, so that a wrong `out` is refused before the work
        machine = describe_machine()  # first, so that the load seen is not our own
        started_s, used_s = time.monotonic(), cpu_seconds()
        threads = physical_cores() if config.threads is None else config.threads
        device = Device(provider=config.provider, threads=threads)
        tasks = _tasks(caption_rows, vqa_rows, config)
        hashes = image_hashes([row for rows in tasks.values() for row in rows])
        with torch_threads(threads):
            contestants = contestants_of(bundles, checkpoint, device)
            limit = common_token_limit(contestants, config)
            fresh = start_fresh(contestants, tasks, config, device, limit, progress)
            timed = time_tasks(contestants, tasks, config, limit, progress)
            answered = partial(
                answer_tasks, contestants, batch_size=config.scoring_batch, max_new_tokens=limit, progress=progress
            )
            scored = answered(tasks, remark="")
            swapped = answered(swap_images(tasks, hashes, config.seed), remark=", images swapped")
        seconds = time.monotonic() - started_s
        by_all_s, by_us_s = (now - then for now, then in zip(cpu_seconds(), used_s, strict=True))
        result: dict[str, Any] = {
            "format": FORMAT,
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "machine": {**machine, "cores_used_by_others": max(0.0, (by_all_s - by_us_s) / seconds)},
            "settings": {**config.model_dump(mode="json"), "threads": threads, "max_new_tokens": limit},
            "data": {
                task: {
                    "rows": len(rows),
                    "images": len({row.image for row in rows}),
                    "sha256": rows_digest(rows, hashes),
                }
                for task, rows in tasks.items()
            },
            "pipelines": {one.name: {"kind": one.kind, **one.facts} for one in contestants},
            "accuracy": compare_answers(tasks, scored, swapped, prior_rows, config.seed),
            "latency": timed,
            "fresh_processes": fresh,
        }
        result["failures"] = check(result, config.max_drop)
        lines = chain.from_iterable(
            answer_lines(task, rows, scored[task], swapped.get(task, {})) for task, rows in tasks.items()
        )
        (folder / RESULT).write_text(json_text(result), encoding="utf-8")
        (folder / "answers.jsonl").write_text(json_lines(list(lines)), encoding="utf-8")
        draw_answers(tasks, scored, config.picture_items, folder / "answers.png")
        draw_latency(result, folder / "latency.png")
        (folder / "report.md").write_text(render(result), encoding="utf-8")
    if result["failures"]:
        raise CheckFailed(f"{'; '.join(result['failures'])}. All that was measured: {out / 'report.md'}")
    return out


def start_fresh(
    contestants: Sequence[Contestant],
    tasks: Tasks,
    config: BenchConfig,
    device: Device,
    max_new_tokens: int,
    progress: Progress,
) -> dict[str, Any]:
    """Cold start and peak memory by pipeline: p50 over the starts, and every start; empty when none is asked for."""
    asked = [batches_of(rows, task, 1, config.fresh_items) for task, rows in tasks.items()]
    requests = [batch[0] for batch in chain.from_iterable(zip(*asked, strict=True))][: config.fresh_items]
    starts: dict[str, list[dict[str, float]]] = {one.name: [] for one in contestants} if config.fresh_starts else {}
    with progress.bar("cold start and memory", config.fresh_starts * len(contestants)) as bar:
        for _ in range(config.fresh_starts):
            for one in contestants:
                found = run_fresh(one.kind, one.path, requests, device=device, max_new_tokens=max_new_tokens)
                starts[one.name].append(found)
                bar.advance()
    return {
        name: {"p50": {key: percentile([one[key] for one in found], 50) for key in found[0]}, "starts": found}
        for name, found in starts.items()
    }


def _tasks(caption_rows: Sequence[Row], vqa_rows: Sequence[Row], config: BenchConfig) -> Tasks:
    given: dict[Task, Sequence[Row]] = {"vqa": vqa_rows, "caption": caption_rows}
    found: Tasks = {task: rows for task, of in given.items() if (rows := fitting(task, of, config.items))}
    if not found:
        raise DataError("expected test rows with captions, or with questions and answers, found neither")
    return found
