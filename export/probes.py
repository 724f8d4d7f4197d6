"""Inputs that numbers of a narrow type break on: black, white and saturated pixels, the longest prompt, no question.

A graph in FP16 ends at 65,504. Real images say little about what lies near that end, so every exported graph also runs
on these, as serving would run it, and must give finite numbers. Eager PyTorch is not asked: a tolerance on inputs that
no user has would only be in the way.

Shape letters: B rows, C H W pixels
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from export.eager import least_finite
from export.graphs import Arrays
from export.judge import JUDGING
from runtime.backends import Engine
from runtime.backends.host import HostEngine
from runtime.bundle import Bundle
from runtime.closing import Closing
from runtime.errors import CheckFailed
from runtime.image_encoder import FUSED, ImageEncoder
from runtime.manifest import Limits, Manifest
from runtime.pipeline import QFORMER_TOKENIZER, TOKENIZER
from runtime.preprocess import preprocess_batch
from runtime.progress import Progress
from runtime.query_cache import QueryCache
from runtime.retrieval import GRAPHS, RetrievalGraphs
from runtime.speaker import open_decoder
from runtime.stopwatch import Stopwatch
from runtime.tokenizer import TextTokenizer

NEW_TOKENS = 2
"""A prefill and one step."""


class Probe(Closing, HostEngine):
    """An engine that refuses to hand on a number that is none; satisfies `runtime.backends.Engine`."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        self._bundle, self._graph, self._engine = bundle, graph, JUDGING.open(bundle, graph)
        self.runs = 0

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Those of the graph."""
        return self._engine.inputs()

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Those of the graph."""
        return self._engine.outputs()

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The graph's outputs; CheckFailed when one is not finite."""
        self.runs += 1
        outputs = self._engine.run(feeds)
        worst, share = least_finite(outputs)
        if share:
            where = first_broken(self._bundle, self._graph, feeds)
            raise CheckFailed(
                f"graph '{self._graph}': NaN or infinity in {100 * share:.2g} % of '{worst}' on extreme inputs "
                f"(black, white or saturated pixels, the longest prompt, no question){where}; keep that part in a "
                f"wider type; nothing was written"
            )
        return outputs

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def probe(bundle: Bundle, progress: Progress) -> dict[str, int]:
    """Run every graph of the bundle on extreme inputs; returns how often each ran.

    Raises:
        CheckFailed: NaN or infinity; names the graph, its worst output, and the first tensor inside it that broke.
    """
    manifest = bundle.manifest
    with ExitStack() as opened:
        probes: dict[str, Probe] = {}

        def engine(name: str) -> Engine:
            if name not in probes:
                probes[name] = opened.enter_context(Probe(bundle, name))
            return probes[name]

        with progress.bar("probing extremes", 2) as bar:
            if manifest.model.style != "none":
                _answer(bundle, engine)
            bar.advance()
            if all(name in manifest.graphs for name in GRAPHS):
                _search(manifest, engine)
            bar.advance()
        return {name: found.runs for name, found in probes.items()}


def extreme_pixels(manifest: Manifest, rows: int, side: int | None = None) -> npt.NDArray[np.float32]:
    """pixels_BCHW of black, white, noise of nothing but 0 and 255, and a chessboard of single pixels, in turn."""
    settings = manifest.preprocess.at(side)
    height, width = settings.height, settings.width
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (height, width, 3))
    board = np.indices((height, width)).sum(axis=0)[..., None] % 2 * np.full(3, 255)
    kinds = [np.zeros_like(noise), np.full_like(noise, 255), noise, board.astype(np.uint8)]
    return preprocess_batch([kinds[row % len(kinds)] for row in range(rows)], settings)


def first_broken(bundle: Bundle, graph: str, feeds: Mapping[str, npt.NDArray[Any]]) -> str:
    """`, first in 'NAME' (Op NODE)`: where it begins, found by running the graph with all tensors as outputs."""
    file = bundle.graph(graph)
    model = onnx.load(str(file), load_external_data=False)
    named = {value.name for value in model.graph.output}
    made = [(name, node) for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name, _ in made if name not in named)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    open_all = file.with_name(
        f"{file.name}.probe"
    )  # beside the graph, which names its weights' file by a relative path
    try:
        onnx.save(model, str(open_all))
        session = onnxruntime.InferenceSession(str(open_all), options, providers=["CPUExecutionProvider"])
    finally:
        open_all.unlink(missing_ok=True)
    arrays = session.run([name for name, _ in made], dict(feeds))
    for (name, node), array in zip(made, arrays, strict=True):
        broken = array.dtype.kind == "f" and (np.isnan(array) | np.isposinf(array)).any()  # masks are minus infinity
        if broken:
            return f", first in '{name}' ({node.op_type} {node.name})"
    return ""


def _answer(bundle: Bundle, engine: Any) -> None:
    """The full batch with short prompts beside long ones and questions beside none; then one row of the longest."""
    manifest = bundle.manifest
    limits, queries = manifest.limits, manifest.model.queries
    encoder = ImageEncoder(engine("vision"), engine("qformer"), QueryCache(0), manifest)
    decoder = open_decoder(manifest, engine)
    pixels_BCHW = extreme_pixels(manifest, limits.max_batch)
    conditioned = manifest.model.question_conditioned
    question = _tokens(bundle, limits.max_question_tokens, QFORMER_TOKENIZER) if conditioned else None
    asked = [question if row % 2 else None for row in range(limits.max_batch)]
    for side in limits.image_sizes:
        encoder.encode(extreme_pixels(manifest, limits.max_batch, side), asked, Stopwatch())
    if FUSED in manifest.graphs:
        engine(FUSED).run({"pixels": pixels_BCHW})
    new_tokens = min(NEW_TOKENS, limits.max_new_tokens)
    prefix_BQD = encoder.encode(pixels_BCHW, asked, Stopwatch())
    longest = _longest_prompt(limits, queries, new_tokens, manifest.model.style == "decoder-only")
    short = [_tokens(bundle, min(4 * row, longest), TOKENIZER) for row in range(limits.max_batch)]
    decoder.generate(prefix_BQD, short, new_tokens, Stopwatch())
    decoder.generate(prefix_BQD[:1], [_tokens(bundle, longest, TOKENIZER)], new_tokens, Stopwatch())


def _longest_prompt(limits: Limits, queries: int, new_tokens: int, shared: bool) -> int:
    """Prompt tokens that fit; a decoder-only model's answer takes its positions from the same table."""
    return limits.max_positions - queries - (new_tokens - 1 if shared else 0)


def _tokens(bundle: Bundle, count: int, file: str) -> list[int]:
    """So many tokens of the caption prompt, or of "a photo", over and over."""
    tokenizer = TextTokenizer(bundle.file(file))
    some = tokenizer.encode(bundle.manifest.prompts.caption) or tokenizer.encode("a photo")
    return [some[place % len(some)] for place in range(count)]


def _search(manifest: Manifest, engine: Any) -> None:
    """The full batch of extreme images, with a text of one token beside the longest."""
    graphs = RetrievalGraphs(*(engine(name) for name in GRAPHS))
    rows, longest = manifest.limits.max_batch, manifest.limits.max_text_tokens
    texts: Sequence[Sequence[int]] = [[1] if row % 2 else [1] * longest for row in range(rows)]
    graphs.embed_ids(texts)
    graphs.match_ids(graphs.embed_pixels(extreme_pixels(manifest, rows)).image_embeds_BNE, texts)
