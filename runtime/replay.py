"""Does this device compute what eager PyTorch computed?

Replays the inputs recorded in a bundle and compares, without torch:

    qforge verify runs/demo/bundle-fp32
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import CPU, Device
from runtime.bundle import Bundle
from runtime.image_encoder import Floats, open_encoder
from runtime.query_cache import QueryCache
from runtime.reference import REFERENCE, ChainCase, GraphCase, RetrievalCase, read_reference
from runtime.retrieval import Retrieval
from runtime.speaker import open_decoder
from runtime.stopwatch import Stopwatch


@dataclass(frozen=True)
class Check:
    """One output compared with eager's."""

    graph: str
    """Graph and case, as `language/step`; `chain` for whole answers, `retrieval` for whole scores."""
    output: str
    max_error: float
    """Largest error over largest value; for greedy tokens the fraction of rows that differ. Infinite for NaN."""
    tolerance: float
    """As recorded by the exporter, in the same unit."""

    @property
    def ok(self) -> bool:
        """Whether the error is within its tolerance."""
        return self.max_error <= self.tolerance


def replay(bundle: Bundle, device: Device = CPU) -> list[Check]:
    """Run every recorded case and the whole chain on `device`; the caller judges the checks.

    Raises:
        BundleError: the bundle has no usable recording.
        BackendUnavailable: the package of the backend or provider is not installed.
    """
    reference = read_reference(bundle.file(REFERENCE))
    checks = [check for case in reference.cases for check in _replay_graph(bundle, device, case)]
    if reference.chain is not None:
        checks.append(_replay_chain(bundle, device, reference.chain))
    if reference.retrieval is not None:
        checks += _replay_retrieval(bundle, device, reference.retrieval)
    return checks


def relative_error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Largest absolute error over the largest expected magnitude; infinite for NaN or another shape."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found - expected).max(initial=0.0)) / scale


def _replay_graph(bundle: Bundle, device: Device, case: GraphCase) -> list[Check]:
    with device.open(bundle, case.graph) as engine:
        outputs = engine.run(case.inputs)
    return [
        Check(f"{case.graph}/{case.case}", name, relative_error(outputs[name], expected), case.tolerances[name])
        for name, expected in case.outputs.items()
    ]


def _replay_chain(bundle: Bundle, device: Device, chain: ChainCase) -> Check:
    """The graphs of the image side first, then those of the language model: both at once may exceed the memory."""
    manifest, prefixes, found = bundle.manifest, list[Floats](), list[tuple[int, ...]]()
    step = manifest.limits.max_batch
    batches = [slice(start, start + step) for start in range(0, len(chain.prompts), step)]
    with ExitStack() as opened:
        encoder = open_encoder(manifest, lambda name: opened.enter_context(device.open(bundle, name)), QueryCache(0))
        for rows in batches:
            prefixes.append(encoder.encode(chain.pixels_BCHW[rows], chain.questions[rows], Stopwatch()))
    with ExitStack() as opened:
        decoder = open_decoder(manifest, lambda name: opened.enter_context(device.open(bundle, name)))
        for rows, prefix_BQD in zip(batches, prefixes, strict=True):
            found += decoder.generate(prefix_BQD, chain.prompts[rows], chain.max_new_tokens, Stopwatch())
    wrong = sum(ids != expected for ids, expected in zip(found, chain.token_ids, strict=True))
    return Check("chain", "token_ids", wrong / len(found), chain.tolerance)


def _replay_retrieval(bundle: Bundle, device: Device, case: RetrievalCase) -> list[Check]:
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
