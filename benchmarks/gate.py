"""What a bundle must hold to be shipped, read from a benchmark's result.

A bundle that is FP32 throughout must give eager's greedy tokens on every item. A quantised one may lose `max_drop`
points of each task's headline score, no more.
"""

from collections.abc import Mapping
from typing import Any


def check(result: Mapping[str, Any], max_drop: float) -> list[str]:
    """One sentence per broken promise, none when all hold; `max_drop` is in points (percent)."""
    failures = []
    for name, facts in result["pipelines"].items():
        if facts["kind"] != "bundle":
            continue
        exact = facts["precision"] == facts["language_precision"] == "fp32"
        for task, found in result["accuracy"].items():
            against = found["pipelines"][name]["against_eager"]
            tokens = against["tokens"]
            if exact and tokens["equal"] < tokens["n"]:
                failures.append(
                    f"{name}: {task}: expected eager's token ids on all {tokens['n']} items, "
                    f"found them on {tokens['equal']}"
                )
            headline, difference = next(iter(against["difference"].items()))
            drop = -100 * difference["value"]
            if not exact and round(drop, 6) > max_drop:  # 0.01 of 400 items is not exact in binary
                failures.append(
                    f"{name}: {task}: expected at most {max_drop:g} points of {headline} lost against eager, "
                    f"found {drop:.2f}"
                )
    return failures
