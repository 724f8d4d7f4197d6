"""`qforge doctor`: what this machine can run, found without importing anything heavy."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from qforge import __version__
from qforge.console import Outcome
from runtime.backends import available_backends
from runtime.backends.cores import physical_cores

NEEDS = {
    "answer with a bundle on the CPU": ("cpu", ("onnxruntime",)),
    "train": ("train", ("torch", "transformers", "accelerate", "safetensors")),
    "export": ("export", ("onnx", "onnxscript", "nncf")),
    "benchmark": ("bench", ("matplotlib", "pycocoevalcap")),
}
"""What one may want to do → the extra that brings it, and the packages it stands on."""


def doctor() -> Outcome:
    """Machine, versions, and what is missing for what."""
    wanted = sorted({package for _, packages in NEEDS.values() for package in packages})
    installed = {package: version for package in wanted if (version := _version(package)) is not None}
    can = {what: all(package in installed for package in packages) for what, (_, packages) in NEEDS.items()}
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free_disk_bytes = shutil.disk_usage(Path.cwd()).free
    machine = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": physical_cores(),
        "memory_bytes": memory_bytes,
        "free_disk_bytes": free_disk_bytes,
    }
    lines = [
        f"qforge {__version__}, Python {machine['python']} on {machine['system']}",
        f"{machine['cpu_cores']} physical cores, {_gib(memory_bytes)} memory, "
        f"{_gib(free_disk_bytes)} free on this disk",
        f"engines: {', '.join(available_backends()) or 'none'}",
        *(f"{package} {version}" for package, version in installed.items()),
    ]
    for what, (extra, packages) in NEEDS.items():
        missing = [package for package in packages if package not in installed]
        lines.append(f"{what}: " + (f"needs {', '.join(missing)}: pip install 'qforge[{extra}]'" if missing else "yes"))
    data = {
        "qforge": __version__,
        "machine": machine,
        "installed": installed,
        "backends": available_backends(),
        "can": can,
    }
    return Outcome(data, "\n".join(lines))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
