"""Which processor this is, and how many of its cores this process may use: affinity and container quota count,
hyper-threads do not."""

import hashlib
import math
import os
import platform
from pathlib import Path

TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
QUOTA = Path("/sys/fs/cgroup/cpu.max")
CPUINFO = Path("/proc/cpuinfo")


def physical_cores() -> int:
    """Physical cores this process may run on, at least 1."""
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(QUOTA)))


def cpu_fingerprint() -> str:
    """Hex digits that are the same on processors with the same instructions, which decide how weights are packed."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else [f"flags: {platform.processor()}"]
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return hashlib.sha256(" ".join([platform.machine(), *sorted(flags)]).encode()).hexdigest()[:16]


def _siblings(cpu: int) -> str:
    """The hyper-threads that share this one's core; itself where the kernel does not say."""
    path = Path(TOPOLOGY.format(cpu))
    return path.read_text().strip() if path.exists() else str(cpu)


def _quota(path: Path) -> int:
    """Whole cores a container may use; unlimited reads as a number no machine has."""
    limit, period = path.read_text().split() if path.exists() else ("max", "1")
    return 1 << 30 if limit == "max" else math.ceil(int(limit) / int(period))
