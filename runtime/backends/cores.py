"""How many CPU cores this process may really use: affinity and container quota count, hyper-threads do not."""

import math
import os
from pathlib import Path

TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """Physical cores this process may run on, at least 1."""
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _quota(QUOTA)))


def _siblings(cpu: int) -> str:
    """The hyper-threads that share this one's core; itself where the kernel does not say."""
    path = Path(TOPOLOGY.format(cpu))
    return path.read_text().strip() if path.exists() else str(cpu)


def _quota(path: Path) -> int:
    """Whole cores a container may use; unlimited reads as a number no machine has."""
    limit, period = path.read_text().split() if path.exists() else ("max", "1")
    return 1 << 30 if limit == "max" else math.ceil(int(limit) / int(period))
