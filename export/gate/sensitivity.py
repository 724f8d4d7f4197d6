"""How much each block alone moves its graph's output: everything else is put back, on real inputs.

One block at a time in low precision tells more than one block at a time restored: two broken blocks hide each other's
restoration, while each alone shows its own damage.
"""

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.gate.blocks import Block, blocks_of
from export.gate.restore import restored
from export.graphs import Arrays
from export.precision.emulate import emulate, has_sixteen_bits
from export.precision.files import save
from runtime.backends.ort import OrtEngine
from runtime.progress import Progress

FEEDS = 8
"""Real inputs of a graph that errors are measured on."""


@dataclass(frozen=True)
class Sensitivity:
    """A block, or a single node of one, and the error it causes alone."""

    block: Block
    error: float
    """Root mean square of the output's error over that of the output; the largest over the graph's outputs."""


Rewrite = Callable[[str, frozenset[str]], Path]
"""Writes a graph anew with these nodes kept; says where it lies."""


@dataclass(frozen=True)
class Parts:
    """What errors are measured with."""

    traced: Mapping[str, Path]
    """The fp32 graphs."""
    written: Mapping[str, Path]
    """The same in lower precision, nothing restored."""
    feeds: Mapping[str, Sequence[Arrays]]
    """Real inputs of each."""
    rewrite: Rewrite
    """For graphs that cannot be mended node by node: all their tensors have another type."""


def rank_blocks(parts: Parts, progress: Progress) -> list[Sensitivity]:
    """Every block of every written graph, the most harmful first."""
    found = list[Sensitivity]()
    for name in parts.written:
        before, after = onnx.load(str(parts.traced[name])), onnx.load(str(parts.written[name]))
        blocks = blocks_of(name, before, after)
        every = {node for block in blocks for node in block.nodes}
        found += _errors(parts, name, before, after, blocks, every, progress)
    return sorted(found, key=lambda one: -one.error)


def rank_nodes(parts: Parts, blocks: Collection[Block], progress: Progress) -> list[Sensitivity]:
    """Every node of these blocks as a block of its own, the most harmful first."""
    found = list[Sensitivity]()
    for name in dict.fromkeys(block.graph for block in blocks):
        before, after = onnx.load(str(parts.traced[name])), onnx.load(str(parts.written[name]))
        every = {node for block in blocks_of(name, before, after) for node in block.nodes}
        single = [Block(name, f"{b.name}, {node}", (node,)) for b in blocks if b.graph == name for node in b.nodes]
        found += _errors(parts, name, before, after, single, every, progress)
    return sorted(found, key=lambda one: -one.error)


def _errors(
    parts: Parts,
    name: str,
    traced: onnx.ModelProto,
    written: onnx.ModelProto,
    blocks: Sequence[Block],
    every: Collection[str],
    progress: Progress,
) -> list[Sensitivity]:
    """`every`: names of all nodes of lower precision in the graph."""
    feeds, mendable = parts.feeds[name], not _in_16_bits(written)
    some = [feeds[i * len(feeds) // min(FEEDS, len(feeds))] for i in range(min(FEEDS, len(feeds)))]
    expected = _run(traced, some)
    found = []
    with progress.bar(f"error of each part of {name}", len(blocks)) as bar:
        for block in blocks:
            others = frozenset(every) - set(block.nodes)
            one = restored(written, traced, others) if mendable else onnx.load(str(parts.rewrite(name, others)))
            found.append(Sensitivity(block, _relative(_run(one, some), expected)))
            bar.advance(error=found[-1].error)
    return found


def _in_16_bits(written: onnx.ModelProto) -> bool:
    return any(t.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for t in written.graph.initializer)


def _run(model: onnx.ModelProto, feeds: Sequence[Arrays]) -> list[Arrays]:
    """Outputs of a graph that lies in memory, for each feed; 16-bit types as a GPU would compute them."""
    types = {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    with tempfile.TemporaryDirectory(prefix="qforge-") as folder:
        file = Path(folder) / "graph.onnx"
        save(model, file)
        if has_sixteen_bits(file):
            emulate(file)
        with OrtEngine(file) as engine:
            return [engine.run({name: feed[name].astype(types[name], copy=False) for name in types}) for feed in feeds]


def _relative(found: Sequence[Arrays], expected: Sequence[Arrays]) -> float:
    worst = 0.0
    for name in expected[0]:
        pairs = [(ours[name], theirs[name]) for ours, theirs in zip(found, expected, strict=True)]
        wrong = sum(float(np.square(ours - theirs, dtype=np.float64).sum()) for ours, theirs in pairs)
        whole = sum(float(np.square(theirs, dtype=np.float64).sum()) for _, theirs in pairs)
        worst = max(worst, (wrong / whole) ** 0.5 if whole else float(wrong > 0))
    return worst
