"""The one door to `tensorrt` and `tensorrt_rtx`: one API, of which each can do a part.

TensorRT builds on the GPU that will run the plan. TensorRT-RTX builds for RTX cards on any machine, in seconds, and
leaves the rest to the GPU's first run; without a GPU it cannot do what needs a driver.
"""

from dataclasses import dataclass
from typing import Any

from export.engines.targets import PORTABLE, ComputeCapability, require_reached
from runtime.engine_manifest import EngineName, EngineOptions
from runtime.errors import BackendUnavailable, InputError, require
from runtime.gpu import MODULES, compute_capability_here

FIRST_VERSION: dict[EngineName, int] = {"tensorrt": 11, "tensorrt-rtx": 1}
"""Older ones are another API: TensorRT 10 had precision flags and weakly typed networks."""


@dataclass(frozen=True)
class Builder:
    """An installed builder."""

    engine: EngineName
    version: str
    trt: Any
    """Its Python module."""

    def capabilities(self, wanted: tuple[ComputeCapability, ...]) -> tuple[ComputeCapability, ...]:
        """GPUs to build for, in order; nothing wanted: the GPU here (TensorRT), or RTX cards from Ampere on.

        Raises:
            InputError: a GPU that this builder does not reach.
        """
        wanted = tuple(sorted(set(wanted)))
        require_reached(self.engine, wanted)
        if self.engine == "tensorrt-rtx":
            return wanted or PORTABLE
        here = compute_capability_here()
        if here is None:
            raise InputError(
                "tensorrt builds on the GPU that will run the plan, found no NVIDIA driver here; build there, or with "
                "--engine tensorrt-rtx for an RTX card"
            )
        found = ComputeCapability(*here)
        if wanted not in {(), (found,)}:
            raise InputError(
                f"tensorrt builds for the GPU here ({found}), found --compute-capability "
                f"{', '.join(map(str, wanted))}; build on that GPU"
            )
        require_reached(self.engine, (found,))
        return (found,)

    def require_options(self, options: EngineOptions, timing_cache: bool) -> None:
        """InputError for an option that this builder cannot follow, with the reason."""
        if self.engine == "tensorrt":
            return
        refused = {
            "--version-compatible": (
                options.version_compatible,
                "its wheel has no lean runtime to put into the plan, and its plans load with newer versions anyway",
            ),
            "--hardware-compatibility": (
                options.hardware_compatibility != "none",
                "its plans are made for a list of GPUs; give --compute-capability once for each",
            ),
            "--timing-cache": (
                timing_cache,
                "it times no kernels while building; they are chosen on the GPU's first run",
            ),
        }
        for option, (asked, why) in refused.items():
            if asked:
                raise InputError(f"{option}: tensorrt-rtx cannot: {why}; leave the option out")


def open_builder(engine: EngineName) -> Builder:
    """Load a builder.

    Raises:
        BackendUnavailable: it is not installed, too old, or cannot load the driver's libraries.
    """
    try:
        trt: Any = require(MODULES[engine], extra=engine, why=f"Building with {engine}")
    except (OSError, RuntimeError) as error:  # the wheel is here, a library of the driver is not
        raise BackendUnavailable(f"{engine} is installed and cannot be loaded: {error}") from error
    version = str(trt.__version__)
    if int(version.partition(".")[0]) < FIRST_VERSION[engine]:
        raise BackendUnavailable(
            f"Building with {engine} needs version {FIRST_VERSION[engine]} or newer, found {version}: pip install "
            f"--upgrade 'qforge[{engine}]'"
        )
    return Builder(engine, version, trt)
