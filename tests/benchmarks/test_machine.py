"""The machine is described from what the kernel says, and nobody is named."""

import json
import os
import platform
from pathlib import Path

import pytest

from benchmarks import machine

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse2 avx2 avx512_vnni
"""


def test_reads_the_kernels_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    (tmp_path / "meminfo").write_text("MemTotal:       16384 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "GOVERNOR", tmp_path / "absent")
    found = machine.describe_machine()
    assert found["cpu"] == "Some CPU @ 2.00GHz"
    assert found["cpu_features"] == ["avx2", "avx512_vnni"]
    assert found["memory_bytes"] == 16 * 1024**2
    assert found["cpu_governor"] is None
    assert found["packages"]["numpy"]


def test_what_others_use_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    own = os.times_result((1.0, 2.0, 0.25, 0.5, 99.0))
    idle_and_iowait = f"{800 * ticks} {70 * ticks}"
    (tmp_path / "stat").write_text(f"cpu  {9 * ticks} 0 {3 * ticks} {idle_and_iowait} 0 {ticks} 0 0 0\ncpu0 1 1\n")
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "times", lambda: own)
    assert machine.cpu_seconds() == (13.0, 3.75)


def test_this_machine_without_its_name() -> None:
    found = machine.describe_machine()
    assert found["logical_cpus_usable"] >= found["physical_cores_usable"] >= 1
    assert found["memory_bytes"] > 0
    assert platform.node() not in json.dumps(found)
