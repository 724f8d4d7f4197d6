"""What a reader must know to judge the numbers, said by the result itself: also where eager wins."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.items import PLURAL

BUSY = 0.1
"""Share of the usable cores that others may use before the report calls the latencies doubtful."""

NOISY = 0.5
"""Share by which p90 may exceed p50 before the report says that the machine was restless."""


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """One sentence or two each."""
    machine, settings = result["machine"], result["settings"]
    yield from _about_the_machine(result)
    yield (
        f"Eager is the checkpoint in PyTorch, decoded by transformers' `generate`; both answer greedily with at most "
        f"{settings['max_new_tokens']} new tokens. Items were scored in batches of {settings['scoring_batch']}, which "
        f"a bundle cuts to its own largest batch."
    )
    yield (
        "Time / eager is the ratio of median total times of the same calls, in brackets its 95 % bootstrap interval; "
        "below 1 the bundle is faster. Calls alternate between the pipelines and the first one rotates; before each "
        "timed call the same pipeline answers another request. Preprocessing includes reading the file."
    )
    yield from _slower(result)
    if any(case["cache"] == "hit" for case in result["latency"]):
        yield (
            "Rows without `query cache hit` ran with the cache off. In the others every image and question had been "
            "asked before; eager has no cache and does all its work again."
        )
    yield from _cache_misses(result)
    if result["fresh_processes"]:
        yield (
            f"Start and memory: each in {settings['fresh_starts']} new processes with the files already in the page "
            f"cache, median shown; peak after {settings['fresh_items']} requests, one at a time."
        )
    yield "Eager's files are the bridge, training heads included, and both frozen halves; tokenizers are not counted."
    if any("swapped_images" in one for found in result["accuracy"].values() for one in found["pipelines"].values()):
        yield "With images swapped, a model that looks falls to the level of the answerer that sees only the question."
    if "caption" in result["accuracy"]:
        yield (
            "CIDEr, BLEU-4 and ROUGE-L are pycocoevalcap's, on lower-case text without punctuation instead of its Java "
            "tokenizer's; CIDEr counts word rarity in this very set. Compare them within this table only."
        )
    if not machine["gpus"]:
        known = "no GPU was found" if machine["gpus"] == [] else "GPUs were not looked for (nvidia-ml-py is missing)"
        yield f"Everything ran on the CPU; {known}."
    else:
        yield f"Everything ran on the CPU; the machine's {', '.join(machine['gpus'])} stood idle."


def _about_the_machine(result: Mapping[str, Any]) -> Iterator[str]:
    machine = result["machine"]
    cores, others = machine["physical_cores_usable"], machine["cores_used_by_others"]
    yield f"Processor features that matter here: {', '.join(machine['cpu_features']) or 'none of those looked for'}."
    busy = (
        f"Other programs used {others:.2f} of {cores} cores on average during the run (load average at the start "
        f"{machine['load_average_1min']:.2f})."
    )
    if others > BUSY * cores:
        busy += " **Take the latencies with care: PyTorch suffers more from neighbours than the engines do.**"
    yield busy
    restless = [
        f"{name} on {PLURAL[case['task']]}, batch {case['batch']}"
        for case in result["latency"]
        for name, one in case["pipelines"].items()
        if case["cache"] == "off" and one["p90_ms"]["total"] > (1 + NOISY) * one["p50_ms"]["total"]
    ]
    if restless:
        yield f"p90 is far above p50 ({'; '.join(restless)}): a restless machine, or answers of different length."


def _slower(result: Mapping[str, Any]) -> Iterator[str]:
    """Where a bundle lost; a ratio whose interval holds 1 is no verdict either way."""
    slower = [
        f"{name} on {PLURAL[case['task']]}, batch {case['batch']}, cache {case['cache']}"
        for case in result["latency"]
        for name, one in case["pipelines"].items()
        if one["time_over_eager"] is not None and one["time_over_eager"]["low"] > 1
    ]
    if slower:
        yield f"Slower than eager: {'; '.join(slower)}."


def _cache_misses(result: Mapping[str, Any]) -> Iterator[str]:
    for case in result["latency"]:
        for name, one in case["pipelines"].items():
            if one.get("cache", {}).get("misses"):
                hits, misses = one["cache"]["hits"], one["cache"]["misses"]
                yield (
                    f"{name}: {misses} of {hits + misses} look-ups in its `query cache hit` row for "
                    f"{PLURAL[case['task']]} were misses; the cache is too small for these items."
                )
