"""`qforge doctor`: what this machine can run, found without importing torch."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

from export.engines.targets import REACHES
from qforge import __version__
from qforge.console import Outcome
from runtime.backends import available_backends
from runtime.backends.ort import providers_here
from runtime.backends.providers import PROVIDERS
from runtime.backends.trt.choice import lacks
from runtime.cores import physical_cores
from runtime.engine_manifest import EngineName
from runtime.gpu import compute_capability_here, installed_engines

NEEDS = {
    "answer with a bundle on the CPU": ("cpu", ("onnxruntime",)),
    "answer faster on an x86 CPU (--backend openvino)": ("openvino", ("onnxruntime", "openvino")),
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
    providers = providers_here()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free_disk_bytes = shutil.disk_usage(Path.cwd()).free
    builders, gpu = installed_engines(), compute_capability_here()
    machine = {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": physical_cores(),
        "memory_bytes": memory_bytes,
        "free_disk_bytes": free_disk_bytes,
        "gpu_compute_capability": None if gpu is None else f"{gpu[0]}.{gpu[1]}",
    }
    lines = [
        f"qforge {__version__}, Python {machine['python']} on {machine['system']}",
        f"{machine['cpu_cores']} physical cores, {_gib(memory_bytes)} memory, "
        f"{_gib(free_disk_bytes)} free on this disk",
        f"engines: {', '.join(available_backends()) or 'none'}",
        f"providers of ort: {', '.join(providers) or 'none'}"
        + "".join(f"; {name}: pip install {PROVIDERS[name][1]}" for name in PROVIDERS if name not in providers),
        *(f"{package} {version}" for package, version in installed.items()),
    ]
    missing_trt = lacks()
    runs = ", ".join(f"{engine} {version}" for engine, version in builders.items())
    lines.append(
        "answer with engines on a GPU (--backend trt): " + (f"needs {missing_trt}" if missing_trt else f"yes, {runs}")
    )
    lines += _builder_lines(builders, gpu)
    for what, (extra, packages) in NEEDS.items():
        missing = [package for package in packages if package not in installed]
        lines.append(f"{what}: " + (f"needs {', '.join(missing)}: pip install 'qforge[{extra}]'" if missing else "yes"))
    data = {
        "qforge": __version__,
        "machine": machine,
        "installed": installed,
        "backends": available_backends(),
        "trt_needs": missing_trt,
        "providers": providers,
        "can": can,
        "builders": {
            engine: {"version": version, "compute_capabilities": _reached(engine, gpu)}
            for engine, version in builders.items()
        },
    }
    return Outcome(data, "\n".join(lines))


def _reached(engine: EngineName, gpu: tuple[int, int] | None) -> list[str]:
    """GPUs that a builder can build for on this machine."""
    if engine == "tensorrt-rtx":
        return [str(capability) for capability in REACHES[engine]]
    return [] if gpu is None else [f"{gpu[0]}.{gpu[1]}"]


def _builder_lines(builders: Mapping[EngineName, str], gpu: tuple[int, int] | None) -> list[str]:
    lines = []
    for engine in REACHES:
        if engine not in builders:
            lines.append(f"build engines with {engine}: needs it: pip install 'qforge[export,{engine}]'")
        elif reached := _reached(engine, gpu):
            lines.append(f"build engines with {engine} {builders[engine]}: for compute capability {', '.join(reached)}")
        else:
            lines.append(f"build engines with {engine} {builders[engine]}: needs an NVIDIA GPU and its driver")
    return lines


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
