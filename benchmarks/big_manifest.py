"""How long `qforge train` on millions of rows takes to its first batch, and how much memory the rows cost it.

A manifest is generated in a scratch folder, each row with a caption and an id of its own, over a few small pictures.
`qforge train --stage stage1` runs on it in processes of its own: once with nothing in the cache, so that the index of
the manifest is built, and once with the index there. A manifest of a thousand rows says what the process needs for
everything else; what the other has beyond that is the rows'. Time counts from the start of the process, imports
included.

    python -m benchmarks.big_manifest --rows 5000000 --scratch /scratch --out benchmarks/results/big-manifest.json
"""

import argparse
import atexit
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from runtime.files import scratch_folder, write_text_atomic

PICTURES = 64
SMALL_ROWS = 1_000
STEPS, BATCH = 5, 32
WRITTEN_AT_ONCE = 50_000
KIB = 1024
RECIPE = f"""\
model:
  qformer: {{queries: 4, width: 32, layers: 2, heads: 2, ffn_width: 64, dropout: 0.0, contrastive_width: 16}}
data:
  captions_val: watched.jsonl
  captions_test: watched.jsonl
  vqa_train: asked.jsonl
  vqa_val: asked.jsonl
  vqa_test: asked.jsonl
stage1:
  {{steps: {STEPS}, batch_size: {BATCH}, warmup_steps: 1, eval_every: {STEPS}, eval_items: 8, precision: fp32}}
"""


def write_data(folder: Path, rows: Sequence[int]) -> None:
    """Pictures, `rows-N.jsonl` for each N, the small sets that a recipe also names, and the recipe."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
    for count in rows:
        _write_captions(folder / f"rows-{count}.jsonl", count)
    _write_captions(folder / "watched.jsonl", PICTURES)
    asked = [{"image": f"images/{n}.png", "question": "what is it?", "answers": ["noise"]} for n in range(PICTURES)]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)


def _write_captions(path: Path, count: int) -> None:
    with path.open("w") as file:
        for first in range(0, count, WRITTEN_AT_ONCE):
            file.writelines(
                f'{{"image": "images/{row % PICTURES}.png", "image_id": "row {row}", '
                f'"captions": ["a picture of noise, number {row}"]}}\n'
                for row in range(first, min(first + WRITTEN_AT_ONCE, count))
            )


def measure(rows: int, scratch: Path) -> dict[str, Any]:
    """The three runs and what they differ by, JSON-able; everything lies below `scratch`, and goes again."""
    with scratch_folder(scratch / "big-manifest") as folder:
        write_data(folder, (SMALL_ROWS, rows))
        baseline = _train(folder, SMALL_ROWS, "small")
        first, again = _train(folder, rows, "first"), _train(folder, rows, "again")
        size = (folder / f"rows-{rows}.jsonl").stat().st_size
    return {
        "rows": rows,
        "manifest_bytes": size,
        "small": {"rows": SMALL_ROWS, **baseline},
        "index_built": first | _growth(first, baseline),
        "index_there": again | _growth(again, baseline),
    }


def _growth(found: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    return {f"{key}_growth": found[key] - baseline[key] for key in ("resident_bytes", "peak_bytes")}


def _train(folder: Path, rows: int, name: str) -> dict[str, float]:
    """What one process of `qforge train` tells about itself; the cache lies in `folder`."""
    told = folder / f"told-{name}.json"
    words = ["train", str(folder / "recipe.yaml"), "--out", str(folder / f"run-{name}"), "--stage", "stage1"]
    words += ["--set", f"data.root={folder}", "--set", f"data.captions_train=rows-{rows}.jsonl"]
    watched = f"from benchmarks.big_manifest import watch; watch({time.time()!r}, {str(told)!r})"
    command = [sys.executable, "-c", f"{watched}; from qforge.cli import main; main()", *words]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run over {rows} rows failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(told.read_text())
    return found


def watch(began: float, told: str) -> None:
    """In the process that is measured: note when its first batch is there, and write `told` when it ends.

    `began` is when it was started (seconds since the epoch).
    """
    from trainer.data import ImageRows

    found = {"imported_s": time.time() - began}
    batch = ImageRows.batch

    def watched(self: ImageRows, indices: Any, draws: Any) -> Any:
        answer = batch(self, indices, draws)
        if "first_batch_s" not in found:
            found["first_batch_s"] = time.time() - began
            found["first_batch_cpu_s"] = time.process_time()
        return answer

    def tell() -> None:
        found["resident_bytes"] = _resident_bytes()
        found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        Path(told).write_text(json.dumps(found))

    ImageRows.batch = watched  # type: ignore[method-assign]
    atexit.register(tell)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--scratch", type=Path, required=True, help="folder with room for the manifest")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args()
    result = {
        "what": "qforge train on a manifest of many rows: time to the first batch, memory",
        "command": "python -m benchmarks.big_manifest --rows N --scratch DIR --out FILE",
        **measure(arguments.rows, arguments.scratch),
        "machine": describe_machine(),
    }
    text = json_text(result)
    if arguments.out is not None:
        write_text_atomic(arguments.out, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
