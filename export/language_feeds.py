"""What the language model's graphs meet when real requests are answered: real prefixes, prompts, pads and caches.

The runtime's own decode loop drives a `Recorder` per graph, so batches are padded as in serving.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from export.eager import Eager, Recorder
from export.feeds import StoredFeeds
from export.graphs import Graph
from export.verify import request_tokens
from runtime.answers import Request
from runtime.bundle import Bundle
from runtime.image_encoder import ImageEncoder
from runtime.preprocess import preprocess_batch
from runtime.query_cache import QueryCache
from runtime.speaker import LANGUAGE_GRAPHS, open_decoder
from runtime.stopwatch import Stopwatch
from trainer.blip2 import Blip2

REQUESTS = 32
"""Requests at most: a language model's activations differ by its weights far more than by its prompts."""
TOKENS = 3
"""New tokens at most: the prefill, and two steps with a cache."""


def language_feeds(
    bundle: Bundle, model: Blip2, graphs: Mapping[str, Graph], requests: Sequence[Request], folder: Path
) -> dict[str, StoredFeeds]:
    """Inputs by graph, kept in `folder`; `bundle` is the one in fp32.

    Raises:
        CheckFailed: eager PyTorch gives NaN or infinity.
    """
    manifest, some = bundle.manifest, requests[:REQUESTS]
    feeds = {name: StoredFeeds(folder / name) for name in LANGUAGE_GRAPHS[manifest.model.style]}
    engines = {name: Recorder(graph, feeds[name]) if name in feeds else Eager(graph) for name, graph in graphs.items()}
    encoder = ImageEncoder(engines["vision"], engines["qformer"], QueryCache(0), manifest)
    decoder = open_decoder(manifest, engines.__getitem__)
    for start in range(0, len(some), manifest.limits.max_batch):
        batch = some[start : start + manifest.limits.max_batch]
        prompts, questions = request_tokens(bundle, model, batch)
        pixels_BCHW = preprocess_batch([request.image for request in batch], model.preprocess)
        prefix_BQD = encoder.encode(pixels_BCHW, questions, Stopwatch())
        decoder.generate(prefix_BQD, prompts, min(TOKENS, manifest.limits.max_new_tokens), Stopwatch())
    return feeds
