"""Which NVIDIA GPU is here, asked of the driver itself: one call that works on servers, PCs and Jetsons alike; and
which TensorRT."""

import ctypes
import importlib.metadata

from runtime.engine_manifest import EngineName

MODULES: dict[EngineName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Who builds and runs plans → its module."""
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


def compute_capability_here(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """(major, minor) of the first GPU; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    asked = (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), 0),
        cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device),
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device),
    )
    return None if any(asked) else (major.value, minor.value)


def installed_engines() -> dict[EngineName, str]:
    """Whose plans can be built and run here, with the version; found without loading anything."""
    found = dict[EngineName, str]()
    for engine, module in MODULES.items():
        try:
            found[engine] = importlib.metadata.version(module.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
