"""Answers with a cache of fixed size are those of the portable decoder, token for token, in place or not."""

import gc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from export.static_cache import StaticDecoderGraph, StaticLanguageGraph, _converted
from runtime.decoding import GREEDY, Decoding
from runtime.errors import CheckFailed
from runtime.static_cache import StaticDecoder, StaticEncoderDecoder
from runtime.stopwatch import Stopwatch
from tests.runtime.decoding.family import NEW_TOKENS, Family, Module


class HostView:
    """The first elements of an array as a view."""

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...]) -> None:
        self.memory, self.shape, self.dtype = memory, shape, str(memory.dtype)

    @property
    def array(self) -> np.ndarray:
        return self.memory[: int(np.prod(self.shape))].reshape(self.shape)

    def numpy(self) -> np.ndarray:
        return self.array.copy()

    def assign(self, array: np.ndarray) -> None:
        assert array.shape == self.shape and array.dtype == self.memory.dtype
        self.array[:] = array


class HostBuffer:
    """Fresh memory is full of NaN, as device memory may be."""

    def __init__(self, elements: int, dtype: str) -> None:
        self.memory = np.full(elements, np.nan, dtype)

    def view(self, shape: tuple[int, ...]) -> HostView:
        assert np.prod(shape) <= len(self.memory)
        return HostView(self.memory, shape)


class Bound(Module):
    """A module as an engine with memory of its own, which counts it and notes addresses."""

    def setup(self) -> "Bound":
        self.buffers = 0
        self.addresses = set[tuple[int, ...]]()
        self.spoil_next = False
        return self

    def buffer(self, elements: int, dtype: str) -> HostBuffer:
        self.buffers += 1
        return HostBuffer(elements, dtype)

    def run(self, feeds: Mapping[str, Any], into: Mapping[str, HostView] | None = None) -> dict[str, np.ndarray]:
        views = {name: feed for name, feed in feeds.items() if isinstance(feed, HostView)}
        self.addresses.add(tuple(view.memory.ctypes.data for view in views.values()))
        self.check(views, into or {})
        outputs = super().run({name: feed.array if name in views else feed for name, feed in feeds.items()})
        if self.spoil_next:
            self.spoil_next = False
            outputs = {name: np.full_like(array, np.nan) for name, array in outputs.items()}
        for name, view in (into or {}).items():
            view.array[:] = outputs.pop(name)
        return outputs

    def check(self, views: Mapping[str, HostView], into: Mapping[str, HostView]) -> None:
        """Reads one memory and writes another."""
        for name, view in into.items():
            assert view.memory is not views[name.replace("present_", "past_")].memory


class BoundInPlace(Bound):
    """As TensorRT: an output lies in its input's memory."""

    def aliases(self) -> dict[str, str]:
        return {name: name.replace("present_", "past_") for name in self._outputs if name.startswith("present_")}

    def check(self, views: Mapping[str, HostView], into: Mapping[str, HostView]) -> None:
        for name, view in into.items():
            assert view.memory is views[name.replace("present_", "past_")].memory


def static_engine(family: Family, kind: type[Bound]) -> Bound:
    """The static twin of a family's decoder, in fp32."""
    portable: Any = family.decoder
    model = _converted(family.language_model, torch.float32)
    own = portable._decoder if family.reads_first else portable._language
    positions = NEW_TOKENS if family.reads_first else portable._limits.max_positions
    inputs = {n: (s[0], s[1], positions, s[3]) if n.startswith("past_") else s for n, s in own.inputs().items()}
    at = {"write_index": (1,)} if family.reads_first else {"write_indices": ("B",)}
    if not family.reads_first:
        inputs["attention_mask"] = ("B", positions)
    order = ("inputs_embeds", "attention_mask", *at)
    caches = {n: s for n, s in inputs.items() if n.startswith(("past_", "cross_"))}
    module = StaticDecoderGraph(model) if family.reads_first else StaticLanguageGraph(model)
    return kind(module.eval(), {n: (inputs | at)[n] for n in order} | caches, own._outputs).setup()


def static(family: Family, engine: Bound) -> Any:
    portable: Any = family.decoder
    settings = portable._generation, portable._limits, "float32"
    if family.reads_first:
        return StaticEncoderDecoder(portable._embed, portable._encoder, engine, *settings)
    return StaticDecoder(portable._embed, engine, *settings)


def say(family: Family, decoder: Any, rows: range, decoding: Decoding = GREEDY) -> list[tuple[int, ...]]:
    prompts = [family.prompts[row] for row in rows]
    return list(decoder.generate(family.prefix_BQD[list(rows)], prompts, NEW_TOKENS, Stopwatch(), decoding))


@pytest.mark.parametrize("kind", [Bound, BoundInPlace])
@pytest.mark.parametrize(
    "decoding",
    [GREEDY, Decoding(num_beams=3), Decoding(do_sample=True, seed=3, num_return_sequences=2)],
    ids=["greedy", "beams", "samples"],
)
def test_it_says_what_the_portable_decoder_says(family: Family, kind: type[Bound], decoding: Decoding) -> None:
    decoder, rows = static(family, static_engine(family, kind)), range(12)
    assert say(family, decoder, rows, decoding) == say(family, family.decoder, rows, decoding)


def test_addresses_stay_from_request_to_request(family: Family) -> None:
    engine = static_engine(family, BoundInPlace)
    decoder = static(family, engine)
    texts = [say(family, decoder, range(first, first + 3)) for first in (0, 3, 6, 0)]
    gc.collect()
    assert texts[0] == texts[3] and texts[:3] == [say(family, family.decoder, range(f, f + 3)) for f in (0, 3, 6)]
    assert len(engine.addresses) == 1
    assert engine.buffers == sum(name.startswith(("past_", "cross_")) for name in engine.inputs())


def test_two_batches_at_once_have_caches_of_their_own(family: Family) -> None:
    decoder = static(family, static_engine(family, BoundInPlace))
    streams = [decoder.stream(family.prefix_BQD[[row]], family.prompts[row], NEW_TOKENS, Stopwatch()) for row in (1, 2)]
    said: list[list[int]] = [[], []]
    for _ in range(NEW_TOKENS):
        for texts, stream in zip(said, streams, strict=True):
            texts += [token for token in [next(stream, None)] if token is not None]
    assert [tuple(text) for text in said] == say(family, family.decoder, range(1, 3))


def test_one_spoilt_request_does_not_spoil_the_next(family: Family) -> None:
    engine = static_engine(family, BoundInPlace)
    decoder = static(family, engine)
    engine.spoil_next = True
    with pytest.raises(CheckFailed, match="_static': expected numbers, found NaN"):
        say(family, decoder, range(3))
    gc.collect()
    assert say(family, decoder, range(3)) == say(family, family.decoder, range(3))
    assert len(engine.addresses) == 1
