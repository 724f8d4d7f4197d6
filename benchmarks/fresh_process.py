"""Cold start and peak memory, each in a process of its own that does nothing else.

The parent tells the child on stdin what to open and what to ask; the child answers with one JSON line. A bundle's
child imports no torch, so its memory is what a device without torch needs.

Peak memory is the kernel's high-water mark of this program (VmHWM). `resource.getrusage` would report the parent's
peak where that was higher, because Linux hands it on through fork and exec.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from runtime.answers import Answerer, Request
from runtime.backends import Device
from runtime.errors import QforgeError

STATUS = Path("/proc/self/status")
MODULE = "benchmarks.fresh_process"


class FreshProcessFailed(QforgeError):
    """A measuring process ended without a result."""


def run_fresh(
    kind: Literal["eager", "bundle"], path: Path, requests: Sequence[Request], *, device: Device, max_new_tokens: int
) -> dict[str, float]:
    """Start a process, open the pipeline there and answer the requests one by one.

    Returns milliseconds from the start of the process to: interpreter ready (python_ms), libraries imported
    (imported_ms), pipeline open (loaded_ms), first answer there (first_answer_ms); and resident bytes after the import
    (imported_bytes), after opening (loaded_bytes) and at the peak (peak_bytes).

    Raises:
        FreshProcessFailed: the process died or said no result; its last words are in the message.
    """
    asked = [{"image": str(request.image), "question": request.question} for request in requests]
    order: dict[str, Any] = {"kind": kind, "path": str(path), "requests": asked, "max_new_tokens": max_new_tokens}
    order["device"] = asdict(device)
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    order["started_s"] = time.perf_counter()  # Linux's monotonic clock, the same in every process
    done = subprocess.run(
        [sys.executable, "-m", MODULE], input=json.dumps(order), capture_output=True, text=True, env=environment
    )
    if done.returncode:
        words = done.stderr.strip().splitlines() or ["no message"]
        raise FreshProcessFailed(
            f"{path}: the process that measures cold start and memory ended with code {done.returncode}: {words[-1]}; "
            f"set bench.fresh_starts=0 to leave it out"
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def resident_bytes() -> int:
    """Memory of this process in RAM now."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most this program ever had in RAM."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def _import_libraries(kind: str) -> None:
    if kind == "eager":
        import trainer.checkpoint
        import trainer.generate  # noqa: F401  (its import is what is measured)
    else:
        import onnxruntime  # noqa: F401

        import runtime.pipeline  # noqa: F401


def _open(kind: str, path: Path, device: Device) -> Answerer:
    if kind == "bundle":
        from runtime import load

        return load(path, device.backend, device.threads, provider=device.provider)
    import torch

    from trainer.checkpoint import load_checkpoint
    from trainer.generate import EagerPipeline

    if device.threads is not None:
        torch.set_num_threads(device.threads)
    return EagerPipeline(load_checkpoint(path))


def _measure(order: dict[str, Any], ready_s: float) -> dict[str, float]:
    marks_s = {"python_ms": ready_s}
    _import_libraries(order["kind"])
    marks_s["imported_ms"] = time.perf_counter()
    memory = {"imported_bytes": resident_bytes()}
    pipeline = _open(order["kind"], Path(order["path"]), Device(**order["device"]))
    marks_s["loaded_ms"] = time.perf_counter()
    memory["loaded_bytes"] = resident_bytes()
    for number, asked in enumerate(order["requests"]):
        pipeline.answer([Request(Path(asked["image"]), asked["question"])], max_new_tokens=order["max_new_tokens"])
        if number == 0:
            marks_s["first_answer_ms"] = time.perf_counter()
    memory["peak_bytes"] = peak_bytes()
    return {name: (at_s - order["started_s"]) * 1e3 for name, at_s in marks_s.items()} | memory


if __name__ == "__main__":
    ready_s = time.perf_counter()
    print(json.dumps(_measure(json.load(sys.stdin), ready_s)))
