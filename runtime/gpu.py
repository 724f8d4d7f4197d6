"""Which NVIDIA GPU is here, asked of the driver itself: one call that works on servers, PCs and Jetsons alike."""

import ctypes

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
