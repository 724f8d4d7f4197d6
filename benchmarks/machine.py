"""What machine this is, so that a number can be judged: processor, memory, system, versions, how busy it was.

No host name, user name or path: results are published.

    python -m benchmarks.machine
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from runtime.cores import physical_cores

PACKAGES = ("numpy", "pillow", "tokenizers", "onnxruntime", "torch", "transformers", "onnx", "nncf", "pycocoevalcap")
"""Their versions can change a result."""

FLAGS = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
FLAGS_ARM = ("asimd", "asimddp", "fphp", "i8mm", "bf16", "sve", "sve2")
"""Processor features that decide how fast floats and 8-bit integers are."""

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
STAT = Path("/proc/stat")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_machine() -> dict[str, Any]:
    """Everything above, ready for `json.dumps`; None where the system does not say."""
    cpuinfo = _text(CPUINFO)
    features = set(_field(cpuinfo, "flags|Features", "").split())
    return {
        "cpu": _field(cpuinfo, "model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "logical_cpus_usable": len(os.sched_getaffinity(0)),
        "physical_cores_usable": physical_cores(),
        "cpu_features": [flag for flag in (*FLAGS, *FLAGS_ARM) if flag in features],
        "cpu_governor": _text(GOVERNOR).strip() or None,
        "memory_bytes": int(_field(_text(MEMINFO), "MemTotal", "0 kB").split()[0]) * 1024 or None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "gpus": _gpus(),
        "load_average_1min": os.getloadavg()[0],
    }


def cpu_seconds() -> tuple[float, float]:
    """Processor time used since the start: (by everybody on this machine, by this process and its ended children).

    What others took between two readings tells whether a latency was measured in peace. PyTorch's threads wait for
    each other by spinning, so one busy neighbour can make it ten times slower.
    """
    user, nice, system, _, _, irq, softirq, steal = (int(word) for word in STAT.read_text().split()[1:9])
    own = os.times()
    by_all = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return by_all, own.user + own.system + own.children_user + own.children_system


def _text(path: Path) -> str:
    """Content of a file of the kernel's; empty where this kernel has none."""
    return path.read_text() if path.exists() else ""


def _field(text: str, names: str, otherwise: str) -> str:
    found = re.search(rf"^(?:{names})\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else otherwise


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> list[str] | None:
    """Names of the GPUs; None when nvidia-ml-py is not there to ask. Nothing here is measured on them."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    pynvml: Any = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver, and so no GPU
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


if __name__ == "__main__":
    print(json.dumps(describe_machine(), indent=2))
