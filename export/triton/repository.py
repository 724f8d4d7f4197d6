"""Bundle → Triton model repository: a folder that `tritonserver --model-repository` serves as it is.

qforge export-triton runs/demo/bundle-fp32 --out models
"""

import shutil
from pathlib import Path

import runtime
from export.triton.config import PLATFORM, EngineName, chain_config, graph_config
from export.triton.readme import readme
from runtime.bundle import MANIFEST, Bundle
from runtime.engine_manifest import BuiltEngine, engine_folders, read_engine
from runtime.errors import InputError
from runtime.files import atomic_folder
from runtime.pipeline import QFORMER_TOKENIZER, TOKENIZER

CHAIN = "qforge"
"""Name of the model that answers; a graph is served as `qforge_NAME`."""
MARKER = f"{CHAIN}/config.pbtxt"
"""What only a repository of ours holds."""
CACHE_BYTES = 256 * 1024**2
"""Query cache of each instance of the chaining model."""
VERSION = "1"
"""The one version folder of every model."""


def write_repository(
    bundle: Bundle, out: Path, *, engine: EngineName = "onnxruntime", max_batch: int | None = None, instances: int = 1
) -> Path:
    """Write the repository `out`; an older one of ours is replaced, a folder of others refused.

    Args:
        bundle: A bundle that answers.
        out: Folder to write.
        engine: What runs the graphs: the ONNX files, or the TensorRT plans in the bundle's `engines` folder.
        max_batch: Largest batch that Triton joins; None: the bundle's own limit.
        instances: Copies of every model that run side by side.

    Raises:
        InputError: a bundle that only searches, a batch beyond its limit, no instance, no plans, or foreign files.
        BundleError: plans of another bundle, or changed ones.
        OutOfSpace: the disk ran full.
    """
    manifest, batch = bundle.manifest, bundle.manifest.limits.max_batch if max_batch is None else max_batch
    if manifest.model.style == "none":
        raise InputError(
            f"{bundle.path}: a Triton repository answers, and this bundle only searches; export one with "
            f"--heads generate"
        )
    if not 1 <= batch <= manifest.limits.max_batch:
        raise InputError(f"--max-batch: expected 1 to {manifest.limits.max_batch} (the bundle's limit), found {batch}")
    if instances < 1:
        raise InputError(f"--instances: expected at least 1, found {instances}")
    plans = plans_of(bundle) if engine == "tensorrt" else None
    with atomic_folder(out, replaces=MARKER) as folder:
        for name, entry in manifest.graphs.items():
            model_name = f"{CHAIN}_{name}"
            if plans is not None:
                plan = plans.manifest.graphs[name]
                config = graph_config(
                    model_name, plan, engine, max_batch=batch, instances=instances, profiles=len(plan.profiles)
                )
                shutil.copyfile(plans.plan(name), _model_folder(folder, model_name, config) / PLATFORM[engine][1])
                continue
            config = graph_config(model_name, entry, engine, max_batch=batch, instances=instances)
            version = _model_folder(folder, model_name, config)
            shutil.copyfile(bundle.graph(name), version / PLATFORM[engine][1])
            if entry.data is not None:  # the graph names this file, so it keeps its name
                shutil.copyfile(bundle.file(entry.data.file), version / Path(entry.data.file).name)
        config = chain_config(CHAIN, max_batch=batch, instances=instances, cache_bytes=CACHE_BYTES)
        _write_chain(bundle, _model_folder(folder, CHAIN, config))
        (folder / "README.md").write_text(readme(manifest, engine, batch), encoding="utf-8")
    return out


def plans_of(bundle: Bundle) -> BuiltEngine:
    """The one set of TensorRT plans of a bundle, with a plan for every graph.

    Raises:
        InputError: no such plans (those of TensorRT-RTX are for another library than Triton's), or several.
        BundleError: plans of another bundle, or changed ones.
    """
    names = set(bundle.manifest.graphs)
    built = [read_engine(bundle, folder) for folder in engine_folders(bundle)]
    fitting = [found for found in built if found.manifest.engine == "tensorrt" and names <= set(found.manifest.graphs)]
    if len(fitting) != 1:
        told = ", ".join(f"{found.path.name} ({found.manifest.engine})" for found in built) or "none"
        raise InputError(
            f"{bundle.path}: --engine tensorrt expects one set of TensorRT plans with a plan for each of "
            f"{', '.join(sorted(names))}, found {told}; build them on the server's GPU: qforge build {bundle.path} "
            f"--engine tensorrt"
        )
    return fitting[0]


def _model_folder(folder: Path, name: str, config: str) -> Path:
    """`NAME/config.pbtxt`; returns the empty `NAME/1`."""
    version = folder / name / VERSION
    version.mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(config, encoding="utf-8")
    return version


def _write_chain(bundle: Bundle, version: Path) -> None:
    """The step, the runtime it drives, and what the runtime reads of the bundle.

    The runtime is copied, not required: it is then the one that this bundle was verified with, and the server needs
    nothing of ours installed, only four public packages.
    """
    own = Path(__file__).with_name("model.py")
    shutil.copyfile(own, version / "model.py")
    shutil.copytree(
        Path(str(runtime.__file__)).parent, version / "runtime", ignore=shutil.ignore_patterns("__pycache__")
    )
    (version / "bundle").mkdir()
    for name in (MANIFEST, TOKENIZER, QFORMER_TOKENIZER):
        if (bundle.path / name).exists():
            shutil.copyfile(bundle.path / name, version / "bundle" / name)
