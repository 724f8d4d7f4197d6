"""Which of a bundle's plans runs here: built for this GPU, by a builder whose library is installed, from these graphs.

Every graph that is opened needs a plan; none is quietly left to the CPU, where it would wait for the GPU and back. What
does not fit is told with its reason, and with the command that builds what does.
"""

import importlib.util
import platform
from pathlib import Path

from runtime.backends.trt.cuda import Gpu
from runtime.backends.trt.engine import TrtEngine
from runtime.backends.trt.plan import TensorRtPlan
from runtime.backends.trt.session import session_here
from runtime.bundle import Bundle
from runtime.engine_manifest import BuiltEngine, EngineManifest, EngineName, engine_folders, read_engine
from runtime.errors import BackendUnavailable, BundleError
from runtime.first_use import Place
from runtime.gpu import compute_capability_here, installed_engines
from runtime.user_cache import user_cache

BINDINGS = "cuda"
"""Package that reaches the GPU."""
ALTERNATIVES = "run with --backend ort, or on a machine with one"


def lacks() -> str | None:
    """What this machine lacks to run plans, as half a sentence; None when it lacks nothing."""
    if compute_capability_here() is None:
        return "an NVIDIA GPU with its driver"
    if not installed_engines():
        return "TensorRT: pip install 'qforge[trt,tensorrt]', or 'qforge[trt,tensorrt-rtx]' for an RTX card"
    if importlib.util.find_spec(BINDINGS) is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings: pip install 'qforge[trt]'"
    return None


def open_plan(bundle: Bundle, graph: str) -> tuple[TrtEngine, Place]:
    """A graph of a bundle on the GPU here, and where that is.

    Raises:
        BackendUnavailable: no GPU, TensorRT or bindings here.
        BundleError: no plan of this bundle fits, or the one that fits has none of this graph or was changed.
    """
    here = compute_capability_here()
    if here is None:
        raise BackendUnavailable(
            f"backend 'trt' needs an NVIDIA GPU with its driver, found none here; {ALTERNATIVES}{_built_for(bundle)}"
        )
    if (missing := lacks()) is not None:
        raise BackendUnavailable(f"backend 'trt' needs {missing}")
    installed = installed_engines()
    built = fitting(bundle, here, installed)
    file, stated = built.checked_plan(graph), built.manifest.graphs[graph]
    session = session_here()
    place = Place(
        model=stated.plan.sha256,
        device=_named(session.gpu),
        library=f"{built.manifest.engine} {installed[built.manifest.engine]}",
    )
    compiled = user_cache("compiled") / f"{place.key}.bin"
    with session.turn():
        plan = TensorRtPlan(file, built.manifest.engine, compiled)
        return TrtEngine(plan, stated, graph, session), place


def fitting(bundle: Bundle, capability: tuple[int, int], installed: dict[EngineName, str]) -> BuiltEngine:
    """The plans of a bundle that run on a GPU with the libraries that are installed; the most specific ones.

    Raises:
        BundleError: there are none; says why of each.
    """
    engines, reasons = list[BuiltEngine](), list[str]()
    for folder in engine_folders(bundle):
        try:
            engine = read_engine(bundle, folder, check_hashes=False)  # of the graph that is opened, it is checked then
        except BundleError as error:
            reasons.append(str(error))
            continue
        if (reason := unfit(engine.manifest, capability, installed)) is None:
            engines.append(engine)
        else:
            reasons.append(f"{folder.name} {reason}")
    if engines:
        return min(engines, key=lambda one: (one.manifest.engine != "tensorrt", len(one.manifest.compute_capabilities)))
    sm = f"{capability[0]}.{capability[1]}"
    builder = next(iter(installed), "tensorrt")
    raise BundleError(
        f"{bundle.path}: expected plans for the GPU here (compute capability {sm}), found "
        f"{'none' if not reasons else '; '.join(reasons)}; build them: qforge build {bundle.path} --engine {builder} "
        f"--compute-capability {sm}"
    )


def unfit(manifest: EngineManifest, capability: tuple[int, int], installed: dict[EngineName, str]) -> str | None:
    """Why plans cannot run here, as the end of a sentence that begins with their name; None when they can."""
    machine = f"{platform.system()}-{platform.machine()}".lower()
    if manifest.platform != machine:
        return f"is for {manifest.platform}, not {machine}"
    if not _reaches(manifest, capability):
        return f"is for compute capability {', '.join(manifest.compute_capabilities)}"
    version = installed.get(manifest.engine)
    if version is None:
        return f"needs {manifest.engine}: pip install 'qforge[trt,{manifest.engine}]'"
    if not _loads(manifest, version):
        return f"was built by {manifest.engine} {manifest.builder_version}, and {version} is installed here"
    return None


def _reaches(manifest: EngineManifest, capability: tuple[int, int]) -> bool:
    """Whether plans were built for a GPU of this kind; TensorRT can also build for all from Ampere on."""
    if f"{capability[0]}.{capability[1]}" in manifest.compute_capabilities:
        return True
    return manifest.options.hardware_compatibility == "ampere-plus" and capability >= (8, 0)


def _loads(manifest: EngineManifest, version: str) -> bool:
    """TensorRT loads plans of its own version, and version-compatible ones of an older one of the same major number;
    TensorRT-RTX loads plans of its own and of older versions with the same major number."""
    built, here = _numbers(manifest.builder_version), _numbers(version)
    if manifest.engine == "tensorrt" and not manifest.options.version_compatible:
        return built == here
    return built[0] == here[0] and built <= here


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _named(gpu: Gpu) -> str:
    return f"{gpu.name}, {gpu.uuid}, driver for CUDA {gpu.driver}"


def _built_for(bundle: Bundle) -> str:
    """What a bundle has plans for, as a clause; empty where it has none or none that can be read."""
    found = dict[str, Path]()
    for folder in engine_folders(bundle):
        try:
            manifest = read_engine(bundle, folder, check_hashes=False).manifest
        except BundleError:
            continue  # `qforge inspect` tells of it; here the GPU is what is missing
        found |= dict.fromkeys(manifest.compute_capabilities, folder)
    if not found:
        return f"; plans for an RTX card can be built here: qforge build {bundle.path} --engine tensorrt-rtx"
    return f" (its plans are for compute capability {', '.join(found)})"
