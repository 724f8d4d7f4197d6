"""Decoders whose cache has a fixed size: memory that stays where it is, and a place to write that is a number.

The portable decoders hand a longer cache back at every step. These are given one of full size, in memory of the engine,
and write each step's keys and values where an index says. Shapes and addresses are the same at every step, so that a
GPU engine runs all of them as one CUDA graph; nothing but a token's embedding and the scores crosses to the host.

An engine that updates in place (TensorRT) has one memory for each cache; any other (ONNX Runtime) has two, of which it
reads one and writes the other. The graphs are `export.static_cache`'s.

Shape letters: B rows, Q queries, S new positions, L positions of the cache, R positions the encoder read, h heads,
d head width, D language width, V vocabulary
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from runtime.backends import Arrays, Buffer, Engine, Feeds, View
from runtime.backends.host import HostEngine
from runtime.closing import Closing
from runtime.decoder import Decoder, embedded
from runtime.decoding.task import Floats, Ids
from runtime.encoder_decoder import SAID_MASK, EncoderDecoder
from runtime.manifest import Generation, Limits
from runtime.precision import carried

PAST, PRESENT, CROSS = "past_", "present_", "cross_"


@runtime_checkable
class InPlace(Protocol):
    """An engine that may write an output in the memory of an input."""

    def aliases(self) -> Mapping[str, str]:
        """Output → the input whose memory it must lie in."""
        ...


class Caches:
    """The caches of one batch of rows, at addresses that stay."""

    def __init__(self, engine: Engine, limits: Limits, dtype: str) -> None:
        """For as many rows as a bundle runs at once."""
        rows, self._limits = limits.max_batch, limits
        self._engine, self._dtype = engine, dtype
        self._cross = dict[str, Buffer]()
        self._shapes = {name: _three(shape) for name, shape in engine.inputs().items() if name.startswith(PAST)}
        aliases = engine.aliases() if isinstance(engine, InPlace) else {}
        self._sides: list[dict[str, Buffer]] = [{}, {}]
        for name, (heads, positions, width) in self._shapes.items():
            first = engine.buffer(rows * heads * positions * width, dtype)
            twice = aliases.get(_present(name)) != name
            self._sides[0][name] = first
            self._sides[1][name] = engine.buffer(rows * heads * positions * width, dtype) if twice else first
        self.spoilt = True
        """Something in it is no number. What the mask hides counts nothing, and nothing times infinity is no number."""

    @property
    def positions(self) -> int:
        """L."""
        return next(iter(self._shapes.values()))[1]

    def begin(self) -> None:
        """Ready for other rows; what earlier ones left behind is hidden by the mask."""
        if self.spoilt:
            for side in self._sides:
                for name, buffer in side.items():
                    view = buffer.view((self._limits.max_batch, *self._shapes[name]))
                    view.assign(np.zeros(view.shape, carried(self._dtype)))
            self.spoilt = False

    def hold(self, cross: Arrays) -> dict[str, View]:
        """What the encoder read, put where the decoder computes: it is the same at every step."""
        views = dict[str, View]()
        for name, array_BhRd in cross.items():
            if name not in self._cross:
                _, heads, _, width = array_BhRd.shape
                most = self._limits.max_batch * heads * self._limits.max_positions * width
                self._cross[name] = self._engine.buffer(most, self._dtype)
            views[name] = self._cross[name].view(array_BhRd.shape)
            views[name].assign(array_BhRd.astype(carried(self._dtype), copy=False))
        return views

    def run(self, feeds: Feeds, rows: int) -> Floats:
        """One run; scores [B, V]."""
        read, write = self._sides
        past = {name: read[name].view((rows, *shape)) for name, shape in self._shapes.items()}
        into = {_present(name): write[name].view((rows, *shape)) for name, shape in self._shapes.items()}
        logits_BV: Floats = self._engine.run({**feeds, **past}, into)["logits"]
        self._sides = [write, read]
        self.spoilt |= not np.isfinite(logits_BV).all()
        return logits_BV

    def select(self, rows_B: Ids, rows: int) -> None:
        """Go on with these of the `rows` present ones; by way of the host, since beams are no step of the graph."""
        for name, shape in self._shapes.items():
            buffer = self._sides[0][name]
            buffer.view((len(rows_B), *shape)).assign(buffer.view((rows, *shape)).numpy()[rows_B])


class Pool:
    """Sets of caches that are used again, so that addresses are the same for every request: one for each at a time."""

    def __init__(self, engine: Engine, limits: Limits, dtype: str) -> None:
        self._engine, self._limits, self._dtype = engine, limits, dtype
        self._free = list[Caches]()

    def lend(self, to: object) -> Caches:
        """A set that is free again when nobody holds `to` any more."""
        try:
            caches = self._free.pop()
        except IndexError:
            caches = Caches(self._engine, self._limits, self._dtype)
        caches.begin()
        weakref.finalize(to, self._free.append, caches)
        return caches


class StaticDecoder(Decoder):
    """Runs the graphs `embed` and `language_static`."""

    def __init__(
        self, embed: Engine, language: Engine, generation: Generation, limits: Limits, cache_type: str
    ) -> None:
        """The engines stay the caller's to close; `cache_type` is what the caches are kept in."""
        super().__init__(embed, language, generation, limits, cache_type)
        self._graph = f"{self._graph}_static"
        self._pool = Pool(language, limits, cache_type)

    def start(  # type: ignore[override]
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Floats, "StaticSteps"]:
        """Prefill; see `TextDecoder`. The cache has room for all that the bundle allows."""
        embeds_BSD, mask_BS = self._left_padded(prefix_BQD, prompts)
        steps = StaticSteps(self._embed, mask_BS)
        steps.caches = self._pool.lend(steps)
        return steps.read(embeds_BSD), steps


class Alone:
    """Rows whose caches lie at addresses of their own, written at one index: no others can join them."""

    def can_join(self, other: Self) -> bool:
        """Never."""
        return False

    def join(self, other: Self) -> None:
        """ValueError; see `can_join`."""
        raise ValueError("rows in caches of fixed size are run as they were started, none can join them")


class StaticSteps(Alone):
    """The rows of one batch behind their prefill; satisfies `runtime.decoding.task.Steps`."""

    caches: Caches

    def __init__(self, embed: Engine, mask_BS: Ids) -> None:
        """`mask_BS` hides the pads of what is read first."""
        self._embed, self._mask_BS, self._written = embed, mask_BS, 0

    def read(self, embeds_BSD: Floats) -> Floats:
        """Scores [B, V] after S more positions."""
        rows, new = embeds_BSD.shape[:2]
        if self._written:
            self._mask_BS = np.pad(self._mask_BS, ((0, 0), (0, new)), constant_values=1)
        rest = self.caches.positions - self._mask_BS.shape[1]
        feeds: Arrays = {
            "inputs_embeds": embeds_BSD,
            "attention_mask": np.pad(self._mask_BS, ((0, 0), (0, rest))),
            "write_indices": np.full(rows, self._written, np.int64),
        }
        self._written += new
        return self.caches.run(feeds, rows)

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token."""
        return self.read(embedded(self._embed, ids_B[:, None]))

    def select(self, rows_B: Ids) -> None:
        """Mask and cache of these rows."""
        rows = len(self._mask_BS)
        if not np.array_equal(rows_B, np.arange(rows)):
            self.caches.select(rows_B, rows)
            self._mask_BS = self._mask_BS[rows_B]


class StaticEncoderDecoder(EncoderDecoder):
    """Runs the graphs `embed`, `encoder` and `decoder_static`."""

    def __init__(
        self,
        embed: Engine,
        encoder: Engine,
        decoder: Engine,
        generation: Generation,
        limits: Limits,
        cache_type: str,
    ) -> None:
        """As `EncoderDecoder`; `cache_type` is what the caches are kept in."""
        super().__init__(embed, encoder, decoder, generation, limits, cache_type)
        self._graph = f"{self._graph}_static"
        self._pool = Pool(decoder, limits, cache_type)

    def start(  # type: ignore[override]
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Floats, "StaticReadSteps"]:
        """Encoder and first token; see `TextDecoder`. The cache has room for all that the bundle allows."""
        embeds_BSD, mask_BS = self._right_padded(prefix_BQD, prompts)
        read = self._encoder.run({"inputs_embeds": embeds_BSD, "attention_mask": mask_BS})
        cross = {name: array for name, array in read.items() if name.startswith(CROSS)}
        steps = StaticReadSteps(self._embed, mask_BS)
        steps.caches = self._pool.lend(steps)
        steps.cross = steps.caches.hold(cross)
        return steps.step(np.full(len(prefix_BQD), self._start_token_id, np.int64)), steps


class StaticReadSteps(Alone):
    """The rows of one batch behind the encoder; satisfies `runtime.decoding.task.Steps`."""

    caches: Caches
    cross: dict[str, View]
    """Keys and values of what the encoder read."""

    def __init__(self, embed: Engine, mask_BR: Ids) -> None:
        """`mask_BR` hides the pads of what the encoder read."""
        self._embed, self._mask_BR, self._written = embed, mask_BR, 0

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token."""
        feeds: dict[str, npt.NDArray[Any] | View] = {
            "inputs_embeds": embedded(self._embed, ids_B[:, None]),
            "attention_mask": self._mask_BR,
            "write_index": np.array([self._written], np.int64),
            **self.cross,
        }
        self._written += 1
        return self.caches.run(feeds, len(ids_B))

    def select(self, rows_B: Ids) -> None:
        """Cache of these rows, and what the encoder read of them."""
        rows = len(self._mask_BR)
        if not np.array_equal(rows_B, np.arange(rows)):
            self.caches.select(rows_B, rows)
            self._mask_BR = self._mask_BR[rows_B]
            self.cross = self.caches.hold({name: view.numpy()[rows_B] for name, view in self.cross.items()})


class PortableFace(Closing, HostEngine):
    """A static decoder behind the inputs and outputs of the portable one: caches that grow."""

    def __init__(self, engine: Engine, held_in: np.dtype[Any]) -> None:
        """`held_in` is the type of the engine's caches."""
        self._engine, self._held_in = engine, held_in
        self._caches = {name: shape for name, shape in engine.inputs().items() if name.startswith("past_")}

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Those of the portable graph."""
        own = {name: shape for name, shape in self._engine.inputs().items() if not name.startswith("write_")}
        return own | {name: (*shape[:2], "past", shape[3]) for name, shape in self._caches.items()}

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Those of the portable graph."""
        return self._engine.outputs()

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """One run from the cached positions that `feeds` holds; ValueError for rows that have said unequally much."""
        if SAID_MASK in feeds and not feeds[SAID_MASK].all():
            raise ValueError(f"{SAID_MASK}: a decoder of fixed size runs rows that have said equally much")
        batch, new, _ = feeds["inputs_embeds"].shape
        past = feeds["past_key_0"].shape[2]
        static: Arrays = {"inputs_embeds": feeds["inputs_embeds"]}
        for name, (_, heads, positions, width) in self._caches.items():
            cache_BhLd = np.zeros((batch, int(heads), int(positions), int(width)), self._held_in)
            cache_BhLd[:, :, :past] = feeds[name]
            static[name] = cache_BhLd
        static |= {name: array.astype(self._held_in) for name, array in feeds.items() if name.startswith("cross_")}
        mask = feeds["attention_mask"]
        if "write_indices" in self._engine.inputs():
            positions = int(next(iter(self._caches.values()))[2])
            mask = np.pad(mask, ((0, 0), (0, positions - mask.shape[1])))
            static["write_indices"] = np.full(batch, past, np.int64)
        else:
            static["write_index"] = np.array([past], np.int64)
        outputs = self._engine.run(static | {"attention_mask": mask})
        return {
            name: array if name == "logits" else array[:, :, : past + new].astype(np.float32)
            for name, array in outputs.items()
        }

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


def _present(name: str) -> str:
    return name.replace(PAST, PRESENT, 1)


def _three(shape: tuple[int | str, ...]) -> tuple[int, int, int]:
    """(heads, positions, head width) of a cache."""
    _, heads, positions, width = shape
    return int(heads), int(positions), int(width)
