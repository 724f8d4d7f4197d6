"""What an export and an engine cost at full size: time and memory for BLIP-2 OPT-2.7B's shape with random weights.

The model (ViT-g of 1 B parameters, 12-layer Q-Former, OPT-2.7B; 7.5 GB in fp16) is generated and imported, then each
command runs in a process of its own: `qforge export` in fp16, and `qforge build` of the vision graph with TensorRT-RTX.
About 60 GB of disk are needed meanwhile; everything is deleted again. Nothing is downloaded.

    python -m benchmarks.export_full_size --work DIR --out benchmarks/results/export-opt-2.7b.json
    python -m benchmarks.export_full_size --work DIR --out benchmarks/results/export-vit-g.json --size vit-g
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.import_full_size import SHAPES, write_folder
from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from runtime.errors import CheckFailed, InputError
from runtime.files import write_text_atomic
from runtime.progress import Progress
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import write_demo_world

IMAGES = 4
"""Pictures to measure ranges on, and as many to verify on; each costs a pass of 4 B parameters in fp32."""
SAMPLE_S = 0.02
"""Pause between two looks at a process's memory."""
CAPABILITY = "8.6"
EXPORT_SETTINGS = (
    f"export.calibration_images={IMAGES}",
    f"export.verification_images={IMAGES}",
    "export.reference_items=1",
    "export.max_batch=2",
    "model.max_new_tokens=4",
)


def run(size: str, work: Path) -> dict[str, Any]:
    """Generate, import, export, build, delete; what each command took."""
    if work.exists() and any(work.iterdir()):
        raise InputError(f"{work}: expected an empty folder, which this fills and empties again")
    source, checkpoint, bundle, images = (work / name for name in ("source", "checkpoint", "bundle", "images"))
    commands = dict[str, Any]()
    try:
        world = DemoWorldConfig(train_scenes=2 * IMAGES, val_scenes=1, test_scenes=1, image_size=224)
        write_demo_world(world, images, Progress(quiet=True))
        weights_bytes = write_folder(source, SHAPES[size])
        commands["import"] = _measured("import", str(source), "--out", str(checkpoint))
        shutil.rmtree(source)
        precision = ["--precision", "fp16", "--language-precision", "fp16"]
        manifest = ["--calibration", str(images / "captions_train.jsonl")]
        settings = [word for setting in EXPORT_SETTINGS for word in ("--set", setting)]
        commands["export"] = _measured(
            "export", str(checkpoint), "--out", str(bundle), *precision, *manifest, *settings
        )
        sizes = {file.name: file.stat().st_size for file in sorted((bundle / "onnx").iterdir())}
        commands["build vision"] = _measured(
            "build", str(bundle), "--engine", "tensorrt-rtx", "--graph", "vision", "--compute-capability", CAPABILITY
        )
        plans = {file.name: file.stat().st_size for file in sorted((bundle / "engines").rglob("*.plan"))}
    finally:
        for folder in (source, checkpoint, bundle, images):
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "what": f"qforge export (fp16) and qforge build of a generated BLIP-2 ({size}), random weights",
        "command": f"python -m benchmarks.export_full_size --size {size} --work DIR --out FILE",
        "settings": list(EXPORT_SETTINGS),
        "weights_bytes": weights_bytes,
        "graph_bytes": sizes,
        "plan_bytes": plans,
        "commands": commands,
        "machine": describe_machine(),
    }


def _measured(*words: str) -> dict[str, Any]:
    """Run one command of ours in a process of its own: seconds, and its largest memory (bytes).

    `resident` counts mapped pages of files too, which the system takes back when it needs them; `anonymous` is what the
    process itself keeps.
    """
    start, peak = time.perf_counter(), {"resident": 0, "anonymous": 0}
    process = subprocess.Popen(
        [sys.executable, "-c", "from qforge.cli import main; main()", *words], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for name, field in (("resident", "VmHWM"), ("anonymous", "RssAnon")):
            line = next((line for line in status.splitlines() if line.startswith(field)), None)
            if line is not None:  # a process that has just ended has no memory
                peak[name] = max(peak[name], int(line.split()[1]) * 1024)
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise CheckFailed(f"qforge {words[0]}: exit {process.returncode}; its own words are above")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="empty folder for everything that is generated")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--size", choices=SHAPES, default="opt-2.7b")
    given = parser.parse_args(arguments)
    text = json_text(run(given.size, given.work))
    write_text_atomic(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
