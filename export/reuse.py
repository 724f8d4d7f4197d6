"""What a graph was made from, as one hash; an export copies a graph whose hash has not changed.

A traced graph is made from its module (weights, structure, settings, our own code around it), from the table of its
inputs and outputs, and by the libraries that trace. A written one also from the precision, the settings of the export
and the data that ranges were measured on. What is copied was read with its hashes checked, so a file that somebody
changed by hand is refused and never copied.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from export import trace
from export.config import ExportConfig
from export.facts import versions
from export.graphs import Graph
from export.precision.kept import REPORT
from runtime.bundle import MANIFEST, Bundle, read_bundle
from runtime.errors import BundleError
from runtime.files import sha256_of
from runtime.progress import Progress

OUR_PACKAGES = ("export", "trainer")
TRACERS = ("torch", "transformers", "onnx", "onnxscript")
FOREIGN_TO_THE_GRAPH = ("_name_or_path", "transformers_version")
"""Keys of a Hugging Face configuration that say where it lay, not what it computes."""
WITHOUT_EFFECT = {
    *(
        "precisions",
        "language_precision",
        "heads",
        "fused",
        "image_sizes",
        "max_batch",
        "max_positions",
        "reference_items",
    ),
    *("verification_images", "fp32", "fp16", "bf16", "int8", "fp8", "int4"),
}
"""Settings that do not change what is written into a graph, or are in its hash by themselves."""


def traced_from(graph: Graph) -> str:
    """Hex SHA-256 of everything that decides what tracing this graph gives."""
    table = {
        "inputs": {
            name: [list(plan.example.shape), str(plan.example.dtype), sorted(plan.varying.items())]
            for name, plan in graph.inputs.items()
        },
        "outputs": {name: sorted(axes.items()) for name, axes in graph.outputs.items()},
        "opset": graph.opset,
        "versions": {name: version for name, version in versions().items() if name in TRACERS},
    }
    digest = hashlib.sha256()
    for part in (_json(table), *_code(graph.module), *_structure(graph.module), *_weights(graph.module)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def written_from(
    traced: Mapping[str, str],
    precisions: Mapping[str, str],
    config: ExportConfig,
    calibration: Iterable[tuple[Path, str | None]],
) -> dict[str, str]:
    """Per graph, hex SHA-256 of what it was traced from and how its precision was written into it.

    `calibration` holds images, which count by content, and the texts beside them. What the Q-Former is calibrated on
    has passed the vision tower, so that counts too. A graph in fp32 is what was traced.
    """
    known: dict[Path, str] = {}
    rows = [(known.setdefault(image, sha256_of(image)), text) for image, text in calibration]
    common = {
        "settings": config.model_dump(mode="json", exclude=WITHOUT_EFFECT),
        "calibration": rows,
        "vision": traced["vision"],
        "versions": versions(),
    }
    return {
        name: digest if precisions[name] == "fp32" else _digest({**common, "from": digest, "to": precisions[name]})
        for name, digest in traced.items()
    }


@dataclass(frozen=True)
class Sources:
    """Bundles to copy graphs from, and whom to tell."""

    bundles: tuple[Bundle, ...]
    progress: Progress
    told: set[str] = field(default_factory=set)
    """Graphs the user has heard of: one that is taken as traced and as written is told once."""

    def copy(self, wanted: Mapping[str, str], folder: Path) -> frozenset[str]:
        """Copy each graph whose `made_from` is the wanted one; returns the names of those that were found."""
        found: dict[str, Path] = {}
        for bundle in self.bundles:
            for name in wanted:
                if name in found or _made_from(bundle, name) != wanted[name]:
                    continue
                entry = bundle.manifest.graphs[name]
                for file in (entry, entry.data):
                    if file is not None:
                        shutil.copyfile(bundle.file(file.file), folder / file.file)
                found[name] = bundle.path
        for path in dict.fromkeys(found.values()):
            if names := [name for name, source in found.items() if source == path and name not in self.told]:
                self.progress.note(f"{path}: unchanged and taken from there: {', '.join(names)}")
                self.told.update(names)
        return frozenset(found)

    def reports(self, names: Collection[str], wanted: Mapping[str, str]) -> dict[str, Any]:
        """What the bundles that these graphs were copied from say in precision.json of how they were written."""
        found: dict[str, Any] = {}
        for bundle in self.bundles:
            same = [name for name in names if _made_from(bundle, name) == wanted[name] and name not in found]
            if same:
                said = json.loads(bundle.file(REPORT).read_text(encoding="utf-8"))
                found |= {name: said[name] for name in same}
        return found


def _made_from(bundle: Bundle, name: str) -> str | None:
    entry = bundle.manifest.graphs.get(name)
    return None if entry is None else entry.made_from


def sources(reuse: Path | None, out: Path, progress: Progress) -> Sources:
    """The bundle that is named, and the one that is to be replaced.

    The one to be replaced may be damaged, which is then said; nothing is taken from it.

    Raises:
        BundleError: `reuse` is no bundle, or a file of it was changed.
    """
    bundles = [] if reuse is None else [read_bundle(reuse)]
    if (out / MANIFEST).is_file() and (reuse is None or out.resolve() != reuse.resolve()):
        try:
            bundles.append(read_bundle(out))
        except BundleError as error:
            progress.note(f"nothing of the old bundle is taken over: {error}")
    return Sources(tuple(bundles), progress)


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode("utf-8")


def _code(module: nn.Module) -> Iterator[bytes]:
    """Our own source files that define a part of the module, and the one that traces."""
    ours = {type(part) for part in module.modules() if type(part).__module__.partition(".")[0] in OUR_PACKAGES}
    values = (value for part in module.modules() for value in vars(part).values())
    set_in = [value for value in values if isinstance(value, FunctionType)]
    sources_of: list[Any] = [*ours, *set_in, trace]
    files = {Path(inspect.getfile(found)) for found in sources_of}
    yield from (file.read_bytes() for file in sorted(files))


def _structure(module: nn.Module) -> Iterator[bytes]:
    """What weights do not tell: classes, and every plain setting of every part (layer, epsilon, number of heads …)."""
    for name, part in module.named_modules():
        kept = {key: value for key, value in vars(part).items() if isinstance(value, str | int | float | tuple)}
        kind, config = f"{type(part).__module__}.{type(part).__qualname__}", getattr(part, "config", None)
        stated = config.to_dict() if isinstance(config, PretrainedConfig) else {}
        attention = getattr(config, "_attn_implementation", None)
        own = {key: value for key, value in stated.items() if key not in FOREIGN_TO_THE_GRAPH}
        yield _json([name, kind, kept, own, attention])


def _weights(module: nn.Module) -> Iterator[bytes]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield _json([name, list(tensor.shape), str(tensor.dtype)])
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
