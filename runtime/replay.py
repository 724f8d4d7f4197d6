"""Does this device compute what eager PyTorch computed?

Replays the inputs recorded in a bundle and compares, without torch:

    qforge verify runs/demo/bundle-fp32
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import CPU, Device, Engine, Opener
from runtime.bundle import Bundle
from runtime.checks import Check, relative_error
from runtime.first_use import compare
from runtime.image_encoder import Floats, open_encoder
from runtime.query_cache import QueryCache
from runtime.reference import REFERENCE, ChainCase, GraphCase, RetrievalCase, read_reference
from runtime.retrieval import Retrieval
from runtime.speaker import open_decoder
from runtime.stopwatch import Stopwatch


def replay(bundle: Bundle, device: Opener = CPU) -> list[Check]:
    """Run every recorded case and the whole chain on `device`; the caller judges the checks.

    Raises:
        BundleError: the bundle has no usable recording.
        BackendUnavailable: the package of the backend or provider is not installed.
    """
    if isinstance(device, Device):
        device = replace(device, checked=False)  # who replays wants to see what a first use would refuse
    reference = read_reference(bundle.file(REFERENCE))
    checks = [check for case in reference.cases for check in _replay_graph(bundle, device, case)]
    if reference.chain is not None:
        checks.append(_replay_chain(bundle, device, reference.chain))
    if reference.retrieval is not None:
        checks += _replay_retrieval(bundle, device, reference.retrieval)
    return checks


def _replay_graph(bundle: Bundle, device: Opener, case: GraphCase) -> list[Check]:
    with device.open(bundle, case.graph) as engine:
        return compare(engine, [case], bundle.manifest.limits.max_batch)


def _replay_chain(bundle: Bundle, device: Opener, chain: ChainCase) -> Check:
    """The graphs of the image side first, then those of the language model: both at once may exceed the memory."""
    manifest, prefixes, found = bundle.manifest, list[Floats](), list[tuple[int, ...]]()
    step = manifest.limits.max_batch
    batches = [slice(start, start + step) for start in range(0, len(chain.prompts), step)]
    with ExitStack() as opened:
        encoder = open_encoder(manifest, _opener(bundle, device, opened), QueryCache(0))
        for rows in batches:
            prefixes.append(encoder.encode(chain.pixels_BCHW[rows], chain.questions[rows], Stopwatch()))
    with ExitStack() as opened:
        decoder = open_decoder(manifest, _opener(bundle, device, opened), in_place=device.in_place)
        for rows, prefix_BQD in zip(batches, prefixes, strict=True):
            found += decoder.generate(prefix_BQD, chain.prompts[rows], chain.max_new_tokens, Stopwatch())
    wrong = sum(ids != expected for ids, expected in zip(found, chain.token_ids, strict=True))
    return Check("chain", "token_ids", wrong / len(found), chain.tolerance)


def _opener(bundle: Bundle, device: Opener, opened: ExitStack) -> Callable[[str], Engine]:
    return lambda name: opened.enter_context(device.open(bundle, name))


def _replay_retrieval(bundle: Bundle, device: Opener, case: RetrievalCase) -> list[Check]:
    with Retrieval(bundle, device=device) as retrieval:
        itc, logits = list[npt.NDArray[Any]](), list[npt.NDArray[Any]]()
        for start in range(0, len(case.texts), retrieval.max_batch):
            rows = slice(start, start + retrieval.max_batch)
            images, texts_BF = retrieval.embed_pixels(case.pixels_BCHW[rows]), retrieval.embed_ids(case.texts[rows])
            itc.append(np.einsum("bqf,bf->bq", images.features_BQF, texts_BF).max(axis=1))
            logits.append(retrieval.match_ids(images.image_embeds_BNE, case.texts[rows]))
    pairs = {"itc": (itc, case.itc_B), "match_logits": (logits, case.match_logits_B2)}
    return [
        Check("retrieval", name, relative_error(np.concatenate(found), expected), case.tolerance)
        for name, (found, expected) in pairs.items()
    ]
