"""Who is compared: eager PyTorch, and every bundle made from it, behind one way to open them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.config import BenchConfig
from benchmarks.sizes import bundle_facts, checkpoint_facts
from runtime import load
from runtime.answers import Answer, Answerer, Request
from runtime.backends import Device
from runtime.bundle import Bundle, read_bundle
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from trainer.checkpoint import load_checkpoint
from trainer.generate import EagerPipeline

EAGER = "eager"
"""Name of eager PyTorch in every result."""


@dataclass(frozen=True)
class Contestant:
    """One pipeline that takes part."""

    name: str
    """`eager`, or the bundle's folder name."""
    kind: Literal["eager", "bundle"]
    path: Path
    facts: dict[str, Any]
    """Precision, hashes and bytes, for the result."""
    open: Callable[[bool], AbstractContextManager[Answerer]]
    """Open it with the query cache (True) or without; eager PyTorch has none either way."""


def contestants_of(bundles: Sequence[Path], checkpoint: Path, device: Device) -> list[Contestant]:
    """Eager first, then the bundles in their order.

    Raises:
        InputError: no bundle.
        BundleError, CheckpointError, MissingFile: what was given cannot be used.
    """
    if not bundles:
        raise InputError("bundles: expected at least one bundle to compare with eager PyTorch, found none")
    read = [read_bundle(path) for path in bundles]
    model = load_checkpoint(checkpoint)
    pipeline = EagerPipeline(model)
    eager = Contestant(EAGER, "eager", checkpoint, checkpoint_facts(checkpoint, model), lambda _: nullcontext(pipeline))
    return [eager, *(_of_bundle(one, name, device) for one, name in zip(read, _names(bundles), strict=True))]


def _of_bundle(bundle: Bundle, name: str, device: Device) -> Contestant:
    def opened(cached: bool) -> AbstractContextManager[Answerer]:
        open_it = partial(load, bundle.path, device.backend, device.threads, provider=device.provider)
        return open_it() if cached else open_it(cache_bytes=0)

    return Contestant(name, "bundle", bundle.path, bundle_facts(bundle), opened)


def _names(bundles: Sequence[Path]) -> list[str]:
    """Folder names; whole paths as given where two bundles would share one, or be taken for eager."""
    short = [path.resolve().name for path in bundles]
    return short if len({EAGER, *short}) == len(short) + 1 else [str(path) for path in bundles]


def common_token_limit(contestants: Sequence[Contestant], config: BenchConfig) -> int:
    """Tokens an answer may have in every pipeline alike: the smallest default among the bundles.

    Raises:
        InputError: a batch size of the config is beyond a bundle's limit.
    """
    manifests = {
        one.name: read_bundle(one.path, check_hashes=False).manifest for one in contestants if one.kind == "bundle"
    }
    largest = max(config.batch_sizes)
    for name, manifest in manifests.items():
        if largest > manifest.limits.max_batch:
            raise InputError(
                f"bench.batch_sizes: expected at most {manifest.limits.max_batch}, the max_batch of {name}, found "
                f"{largest}; lower it, or export with a larger export.max_batch"
            )
    return min(manifest.generation.max_new_tokens for manifest in manifests.values())


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Capped:
    """An answerer whose answers have at most `max_new_tokens` tokens, so that all pipelines share one limit."""

    def __init__(self, answerer: Answerer, max_new_tokens: int) -> None:
        self._answerer = answerer
        self._max_new_tokens = max_new_tokens

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer all requests as one batch; a given limit counts when it is lower."""
        limit = self._max_new_tokens if max_new_tokens is None else min(max_new_tokens, self._max_new_tokens)
        return self._answerer.answer(requests, max_new_tokens=limit, decoding=decoding)
