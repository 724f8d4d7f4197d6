"""The page shows what result.json holds, and only that."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.report import render


def estimate(value: float, n: int = 1234) -> dict[str, Any]:
    return {"value": value, "low": value - 0.0317, "high": value + 0.0123, "n": n, "method": "wilson"}


def pipeline_latency(scale: float, ratio: dict[str, float] | None) -> dict[str, Any]:
    phases = ("preprocess", "vision", "qformer", "prefill", "decode", "total", "per_token")
    p50_ms = {phase: scale * (number + 1.37) for number, phase in enumerate(phases)}
    p90_ms = {phase: value * 1.21 for phase, value in p50_ms.items()}
    return {"p50_ms": p50_ms, "p90_ms": p90_ms, "time_over_eager": ratio, "samples_ms": {}, "further_tokens": []}


def accuracy(value: float, against: bool, metric: str) -> dict[str, Any]:
    found: dict[str, Any] = {"metrics": {metric: estimate(value)}}
    if against:
        difference = {"value": -0.0042, "low": -0.0099, "high": 0.0011}
        found["against_eager"] = {"tokens": {"equal": 1227, "n": 1234}, "difference": {metric: difference}}
    return found


@pytest.fixture
def result() -> dict[str, Any]:
    vqa = {name: accuracy(0.9317 - 0.0042 * (name != "eager"), name != "eager", "accuracy") for name in ("eager", "b")}
    for number, one in enumerate(vqa.values()):
        one["by_kind"] = {"colour": estimate(0.871 + number / 100, n=617), "count": estimate(0.992, n=613)}
        one["swapped_images"] = estimate(0.463 + number / 1000)
    caption = {name: accuracy(0.8123, name != "eager", "exact_match") for name in ("eager", "b")}
    for one in caption.values():
        one["corpus"] = {"CIDEr": 7.321, "BLEU-4": 0.871, "ROUGE-L": 0.913}
    cases = [
        {"task": "vqa", "batch": 1, "cache": cache, "calls": 40, "pipelines": {
            "eager": pipeline_latency(3.1, None),
            "b": pipeline_latency(scale, {"value": scale / 3.1, "low": scale / 3.3, "high": scale / 2.9}),
        }}
        for cache, scale in (("off", 1.7), ("hit", 0.43))
    ]  # fmt: skip
    p50 = {"python_ms": 51.0, "imported_ms": 3_111.0, "loaded_ms": 3_652.0, "first_answer_ms": 4_283.0}
    memory = {"imported_bytes": 311 * 1024**2, "loaded_bytes": 399 * 1024**2, "peak_bytes": 517 * 1024**2}
    fresh = {"p50": p50 | memory, "starts": []}
    graph_bytes = {"vision": 3_670_000, "language": 1_990_000}
    bundle = {"kind": "bundle", "digest": "d", "precision": "int8", "language_precision": "fp32"}
    eager = {"kind": "eager", "precision": "fp32", "sha256": {}}
    return {
        "made_at": "2026-11-20T21:23:33+00:00",
        "seconds": 73.0,
        "machine": {
            "cpu": "Some CPU", "physical_cores_usable": 4, "memory_bytes": 17 * 1024**3, "system": "Linux",
            "python": "3.11.7", "packages": {"torch": "2.13.0"}, "cpu_features": ["avx2"], "gpus": [],
            "load_average_1min": 0.13, "cores_used_by_others": 0.07,
        },
        "settings": {"threads": 4, "max_new_tokens": 24, "scoring_batch": 64, "fresh_starts": 3, "fresh_items": 8,
                     "max_drop": 1.0},
        "pipelines": {
            "eager": {**eager, "bytes": 29_000_000, "part_bytes": {"bridge": 21_000_000, "vision": 8_000_000},
                      "parameters": {"bridge": 5_430_000, "vision": 1_980_000}},
            "b": {**bundle, "bytes": 6_100_000, "graph_bytes": graph_bytes},
        },
        "accuracy": {
            "vqa": {"n": 1234, "question_prior": 0.4871, "pipelines": vqa},
            "caption": {"n": 389, "question_prior": None, "pipelines": caption},
        },
        "latency": cases,
        "fresh_processes": {"eager": fresh, "b": copy.deepcopy(fresh)},
        "failures": [],
    }  # fmt: skip


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif isinstance(value, int | float):
        yield value


def spellings(result: dict[str, Any]) -> set[str]:
    """Every way a number of the result may be written: as it is, percent, MiB, seconds, millions, load time."""
    numbers = list(leaves(result))
    fresh = [one["p50"] for one in result["fresh_processes"].values()]
    numbers += [one["loaded_ms"] - one["imported_ms"] for one in fresh]
    units = (1, 100, 1 / 1024**2, 1e-3, 1e-6)
    return {f"{number * unit:{form}}" for number in numbers for unit in units for form in (".0f", ".1f", ".2f", ".3f")}


def test_every_number_in_a_table_is_in_the_result(result: dict[str, Any]) -> None:
    known = spellings(result)
    cells = [line for line in render(result).splitlines() if line.startswith("| ") and "---" not in line]
    found = [number for line in cells for number in re.findall(r"(?<![\w.-])-?\d+\.?\d*", re.sub(r"p50|p90", "", line))]
    assert len(found) > 80
    assert [number for number in found if number not in known] == []


def test_a_changed_number_changes_its_cell_only(result: dict[str, Any]) -> None:
    before = render(result).splitlines()
    result["accuracy"]["vqa"]["pipelines"]["b"]["by_kind"]["count"]["value"] = 0.123
    changed = [(old, new) for old, new in zip(before, render(result).splitlines(), strict=True) if old != new]
    assert changed == [("| … count (613) | 99.2 | 99.2 |", "| … count (613) | 99.2 | 12.3 |")]


def test_cells(result: dict[str, Any]) -> None:
    page = render(result)
    for line in (
        "| questions: right answers, % | 93.2 [90.0, 94.4] | 92.8 [89.6, 94.0] |",
        "| … change against eager, points |  | -0.42 [-0.99, +0.11] |",
        "| … best answerer that sees only the question | 48.7 | 48.7 |",
        "| questions: token ids equal to eager's |  | 1227 of 1234 |",
        "| captions: CIDEr | 7.321 | 7.321 |",
        "| questions, batch 1, query cache hit | eager | 4.25 | 7.35 | 10.4 | 13.5 | 22.8 | 19.7 | 23.9 | 1 |",
        "|  | b | 0.59 | 1.02 | 1.45 | 1.88 | 3.17 | 2.74 | 3.31 | 0.14 [0.13, 0.15] |",
        "| b | 4.28 | 3.11 | 0.54 | 517 | 311 | 5.82 |",
        "- b (int8, language fp32): vision 3.50, language 1.90 MiB",
    ):
        assert line in page


def test_failures_come_first(result: dict[str, Any]) -> None:
    assert "The gate holds for b" in render(result)
    result["failures"] = ["b: vqa: expected eager's token ids on all 1234 items, found them on 1227"]
    page = render(result)
    assert "The gate holds" not in page
    assert page.index("found them on 1227") < page.index("## Accuracy")


def test_notes_say_what_speaks_against_us(result: dict[str, Any]) -> None:
    assert not re.search(r"Slower than eager|with care|restless|were misses", render(result))
    result["machine"]["cores_used_by_others"] = 0.93
    slow, hit = (case["pipelines"]["b"] for case in result["latency"])
    slow["time_over_eager"] = {"value": 1.2, "low": 1.1, "high": 1.3}
    slow["p90_ms"]["total"] = 5 * slow["p50_ms"]["total"]
    hit["cache"] = {"hits": 30, "misses": 13}
    page = render(result)
    assert "Slower than eager: b on questions, batch 1, cache off." in page
    assert "Other programs used 0.93 of 4 cores" in page
    assert "Take the latencies with care" in page
    assert "p90 is far above p50 (b on questions, batch 1)" in page
    assert "13 of 43 look-ups" in page


def test_what_was_not_measured_is_left_out(result: dict[str, Any]) -> None:
    del result["accuracy"]["caption"]
    result["fresh_processes"] = {}
    result["latency"] = result["latency"][:1]
    result["pipelines"]["eager"] |= {"bytes": None, "part_bytes": {"bridge": 21_000_000, "vision": None}}
    del result["latency"][0]["pipelines"]["b"]["p50_ms"]["per_token"]
    page = render(result)
    assert "captions" not in page
    assert "new processes" not in page
    assert "cache hit" not in page
    assert "| b |  |  |  |  |  | 5.82 |" in page
    assert "vision at its hub" in page
    assert "|  | b | 2.33 | 4.03 | 5.73 | 7.43 |  | 10.8 | 13.1 |" in page
