"""Cold start and memory of a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fresh_process import FreshProcessFailed, run_fresh
from runtime.answers import Request
from runtime.backends import Device
from tests.benchmarks.stand_ins import colour_images
from tests.runtime.conftest import write_tiny_bundle

ROOT = Path(__file__).parent.parent.parent
MIB = 1024**2


def test_a_bundle_is_measured_without_torch(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    requests = [Request(image, "colour") for image in colour_images(tmp_path)]
    found = run_fresh("bundle", bundle, requests, device=Device(threads=1), max_new_tokens=5)
    marks_ms = [found[f"{name}_ms"] for name in ("python", "imported", "loaded", "first_answer")]
    assert marks_ms[0] > 0
    assert marks_ms == sorted(marks_ms)
    assert 10 * MIB < found["imported_bytes"] < found["peak_bytes"] < 200 * MIB, "torch alone would take more"


def test_a_big_parent_does_not_count() -> None:
    """`getrusage` would hand the parent's peak on to the child."""
    ballast = b"x" * (400 * MIB)
    code = "from benchmarks.fresh_process import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert len(ballast) == 400 * MIB
    assert int(done.stdout) < 200 * MIB


def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(FreshProcessFailed, match=r"nowhere: the process .* code 1: .*expected a bundle") as caught:
        run_fresh("bundle", tmp_path / "nowhere", [], device=Device(threads=1), max_new_tokens=5)
    assert "fresh_starts=0" in str(caught.value)
