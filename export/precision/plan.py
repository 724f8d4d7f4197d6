"""The one table: role of a graph, precision and target → how the graph is written.

role       graphs                               precisions
image      vision                               fp32 fp16 bf16 int8 fp8
bridge     qformer, itc_image, itc_text, itm    fp32 fp16 bf16 int8 fp8
table      embed                                fp32: it is looked up, not computed with
language   language; encoder, decoder           fp32 fp16 bf16 int8 int4

What is not quantised is fp32 for target onnxruntime and FP16 for target tensorrt.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from export.config import ExportConfig
from export.graphs import Arrays
from export.precision.activations import Calibration, write_int8
from export.precision.fp8 import write_fp8
from export.precision.fuse import fuse
from export.precision.half import write_half
from export.precision.kept import Kept
from export.precision.weights import write_dequantized, write_nbits
from export.trace import DATA_SUFFIX, ONNX_FOLDER
from runtime.errors import DataError, InputError
from runtime.precision import LanguagePrecision, Precision, Target
from runtime.progress import Progress
from runtime.speaker import LANGUAGE_GRAPHS

Role = Literal["image", "bridge", "table", "language"]
Write = Callable[[Path, Sequence[Arrays], Collection[str]], list[Kept]]
"""(graph file, real feeds, nodes to keep) → what stayed in higher precision; the file is rewritten in place."""


@dataclass(frozen=True)
class Writer:
    """How one graph gets its precision."""

    precision: Precision | LanguagePrecision
    method: str
    """One sentence part for the report."""
    needs_feeds: bool
    """Whether ranges are measured on real inputs."""
    write: Write
    finish: Callable[[Path], object] | None = None
    """What is done to the written file when accuracy holds and nodes need no names any more."""


def role_of(graph: str) -> Role:
    """What a graph of a bundle is for."""
    if graph == "vision":
        return "image"
    if graph == "embed":
        return "table"
    return "language" if graph in {name for names in LANGUAGE_GRAPHS.values() for name in names} else "bridge"


def writers_for(
    graphs: Collection[str], precision: Precision, language_precision: LanguagePrecision, config: ExportConfig
) -> dict[str, Writer]:
    """The writer of each graph.

    Raises:
        InputError: a target that cannot hold a precision.
    """
    return {name: _writer(role_of(name), precision, language_precision, config) for name in graphs}


def _writer(role: Role, precision: Precision, language_precision: LanguagePrecision, config: ExportConfig) -> Writer:
    wanted: Precision | LanguagePrecision
    wanted = "fp32" if role == "table" else language_precision if role == "language" else precision
    calibration = Calibration(config.range_method, config.smooth_quant)
    ranges = f"ranges by {config.range_method}"
    smooth = "no SmoothQuant" if config.smooth_quant is None else f"SmoothQuant {config.smooth_quant:g}"
    half = partial(write_half, bridge=role == "bridge")
    int8 = partial(write_int8, calibration=calibration)
    fp8 = partial(write_fp8, calibration=calibration)
    as_traced = Writer("fp32", "as traced", False, lambda file, feeds, keep: [])
    blocks = "weights in blocks, MatMulNBits in int8 arithmetic"
    stored = {8: "weights per channel, DequantizeLinear", 4: "weights in blocks, DequantizeLinear"}
    table: dict[tuple[str, str, Target], Writer] = {
        ("any", "fp16", "onnxruntime"): Writer("fp16", "cast by rules and ranges", True, partial(half, low="fp16")),
        ("any", "bf16", "onnxruntime"): Writer("bf16", "cast by rules", False, partial(half, low="bf16")),
        ("seeing", "int8", "onnxruntime"): Writer(
            "int8", f"Q/DQ by NNCF, {ranges}, {smooth}, rest fp32", True, partial(int8, own_pairs=True)
        ),
        ("seeing", "int8", "tensorrt"): Writer(
            "int8",
            f"Q/DQ by NNCF, {ranges}, {smooth}, rest FP16",
            True,
            _then_half(partial(int8, own_pairs=False), partial(half, low="fp16")),
        ),
        ("seeing", "fp8", "onnxruntime"): Writer("fp8", f"E4M3 Q/DQ, {ranges}, rest fp32", True, fp8),
        ("seeing", "fp8", "tensorrt"): Writer(
            "fp8", f"E4M3 Q/DQ, {ranges}, rest FP16", True, _then_half(fp8, partial(half, low="fp16"))
        ),
    }
    bits: int
    for bits in (8, 4):
        narrow: LanguagePrecision = "int8" if bits == 8 else "int4"
        table["language", narrow, "onnxruntime"] = Writer(
            narrow, f"{blocks}, rest fp32, attention in one operator", False, _weights(bits), fuse
        )
        table["language", narrow, "tensorrt"] = Writer(
            narrow, f"{stored[bits]}, rest FP16", True, _then_half(_dequantized(bits), partial(half, low="fp16"))
        )
    if wanted == "fp32":
        return as_traced
    kind = "any" if wanted in {"fp16", "bf16"} else "language" if role == "language" else "seeing"
    target: Target = "onnxruntime" if kind == "any" else config.target  # the same for both
    if (kind, wanted, target) not in table:
        raise InputError(f"export: target {config.target} has no {wanted} form of a {role} graph; choose another")
    return table[kind, wanted, target]


def _weights(bits: int) -> Write:
    return lambda file, feeds, keep: write_nbits(file, keep, bits=bits)


def _dequantized(bits: int) -> Write:
    return lambda file, feeds, keep: write_dequantized(file, keep, bits=bits)


def _then_half(quantize: Write, half: Write) -> Write:
    """Quantise, then cast the rest; a node kept out of the first step is FP16 after the second."""

    def write(file: Path, feeds: Sequence[Arrays], keep: Collection[str]) -> list[Kept]:
        unquantized = quantize(file, feeds, keep)
        in_fp32 = half(file, feeds, [])
        names = {kept.node for kept in in_fp32}
        rest = [Kept(kept.node, kept.op, "fp16", kept.why) for kept in unquantized if kept.node not in names]
        return rest + in_fp32

    return write


def write_precision(
    folder: Path,
    traced: Path,
    writers: Mapping[str, Writer],
    feeds: Mapping[str, Sequence[Arrays]],
    keep: Mapping[str, frozenset[str]],
    progress: Progress,
) -> dict[str, list[Kept]]:
    """Write every graph into `folder` from the fp32 file in `traced`; what stayed in higher precision, by graph.

    Args:
        folder: Bundle folder; graphs of an earlier call are replaced.
        traced: Folder with `onnx/NAME.onnx` in fp32; it stays as it is, so that this can be called again.
        feeds: Real inputs by graph, for those whose writer needs them.
        keep: Nodes that must stay in higher precision, by graph.

    Raises:
        DataError: a writer needs feeds and there are none.
        CheckFailed: a result is not valid ONNX.
    """
    kept: dict[str, list[Kept]] = {}
    with progress.bar("writing graphs", len(writers)) as bar:
        for name, writer in writers.items():
            if writer.needs_feeds and not feeds.get(name):
                raise DataError(f"graph '{name}': {writer.precision} is calibrated on real inputs, found none")
            file = take(traced, folder, name)
            kept[name] = writer.write(file, feeds.get(name, ()), keep.get(name, frozenset()))
            bar.advance()
    return kept


def take(source: Path, folder: Path, name: str) -> Path:
    """Copy one graph from folder to folder, weights beside it too: onnx refuses to read them through a link."""
    file = folder / ONNX_FOLDER / f"{name}.onnx"
    file.parent.mkdir(exist_ok=True)
    shutil.copyfile(source / ONNX_FOLDER / file.name, file)
    data, weights = (place / ONNX_FOLDER / f"{name}.onnx{DATA_SUFFIX}" for place in (folder, source))
    data.unlink(missing_ok=True)
    if weights.exists():
        shutil.copyfile(weights, data)
    return file


def report(
    kept: Mapping[str, Sequence[Kept]],
    writers: Mapping[str, Writer],
    feeds: Mapping[str, Sequence[Arrays]],
    emulated: Collection[str],
) -> dict[str, Any]:
    """What precision.json says: of each graph its type, how it was written and verified, and the kept nodes."""
    return {
        name: {
            "precision": writer.precision,
            "method": writer.method,
            "calibration_runs": len(feeds[name]) if writer.needs_feeds else 0,
            "verified": "emulated" if name in emulated else "executed",
            "kept": [asdict(node) for node in kept[name]],
        }
        for name, writer in writers.items()
    }
