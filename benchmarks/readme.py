"""The README's figures, written from a committed result so that nobody types them.

python -m benchmarks.readme benchmarks/results/NAME.json README.md
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import MIB

BLOCK = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.S)
SOURCE = re.compile(r"from `(benchmarks/results/[^`]+)`")
TITLES = (
    "pipeline",
    "questions right",
    "captions with every attribute right",
    "answers equal to eager, token for token",
    "one new question p50",
    "time / eager",
    "peak memory",
)


def with_results(readme: str, source: Path) -> str:
    """The README's text with the figures of the result file `source` (path from the repository's root) in its block."""
    result = json.loads(source.read_text(encoding="utf-8"))
    return BLOCK.sub(lambda match: match[1] + summary(result, source) + match[2], readme)


def summary(result: Mapping[str, Any], source: Path) -> str:
    """One table, and where it comes from."""
    vqa, caption = result["accuracy"]["vqa"], result["accuracy"]["caption"]
    case = next(c for c in result["latency"] if c["task"] == "vqa" and c["batch"] == 1 and c["cache"] == "off")
    rows = [TITLES, ["---"] + ["---:"] * (len(TITLES) - 1)]
    for name in result["pipelines"]:
        asked, said, timed = vqa["pipelines"][name], caption["pipelines"][name], case["pipelines"][name]
        equal = [found["against_eager"]["tokens"] for found in (asked, said) if "against_eager" in found]
        ratio = timed["time_over_eager"]
        rows.append(
            [
                name,
                f"{100 * asked['metrics']['accuracy']['value']:.1f} %",
                f"{100 * said['metrics']['attributes_right']['value']:.1f} %",
                f"{sum(t['equal'] for t in equal)} of {sum(t['n'] for t in equal)}" if equal else "",
                f"{timed['p50_ms']['total']:.1f} ms",
                "1" if ratio is None else f"{ratio['value']:.2f}",
                f"{result['fresh_processes'][name]['p50']['peak_bytes'] / MIB:.0f} MiB",
            ]
        )
    swapped = next(iter(vqa["pipelines"].values()))["swapped_images"]["value"]
    machine = result["machine"]
    return "\n".join(
        [
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            f"The demo's test split: {vqa['n']} questions, {caption['n']} captions of scenes whose content is in no "
            f"other split. The best answerer that sees only the question reaches {100 * vqa['question_prior']:.1f} %; "
            f"with images swapped between questions eager falls to {100 * swapped:.1f} %. Measured in one run on "
            f"{machine['cpu']}, {result['settings']['threads']} threads, {result['made_at'][:10]}; compare ratios, "
            f"not times. Read from `{source.as_posix()}`, where every sample is.",
            "",
        ]
    )


if __name__ == "__main__":
    page = Path(sys.argv[2])
    page.write_text(with_results(page.read_text(encoding="utf-8"), Path(sys.argv[1])), encoding="utf-8")
