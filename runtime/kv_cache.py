"""Keys and values of the rows of one batch, in memory of the engine that reads and writes them.

Every tensor has two buffers. A step reads one and writes the other, one position longer, and they change places: so
nothing is allocated and nothing crosses to the host while a text is said. Rows that change places are copied inside
one buffer, and only those that moved. The buffers of a batch that is gone serve the next one.

A tensor [B, h, P, d] lies packed at the beginning of its buffer, so a row is one block whatever B is.

Shape letters: B rows, h heads, P cached positions, d head width, V vocabulary
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Arrays, Buffer, Engine, Feeds, View

Shapes = Mapping[str, tuple[int, int]]
"""Name of a tensor → its heads and head width."""


class Held:
    """Tensors [B, h, P, d] of one batch, as a graph takes them."""

    def __init__(self, memory: "Memory", shapes: Shapes, rows: int, reach: int) -> None:
        """No positions yet; `reach` is how many there may be before another batch joins, ValueError beyond."""
        self.rows, self.positions = rows, 0
        self._reach = reach
        self._tensors = {name: _Tensor(memory, *shape) for name, shape in shapes.items()}
        self.views: dict[str, View] = self._spare(rows, 0)
        self._swap(self.views, rows, 0)

    def assign(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """These positions [B, h, P, d] instead of all that was there."""
        positions = next(iter(arrays.values())).shape[2]
        views = self._spare(self.rows, positions)
        for name, view in views.items():
            view.assign(arrays[name])
        self._swap(views, self.rows, positions)

    def arrays(self) -> Arrays:
        """A copy of everything."""
        return {name: np.array(view.numpy()) for name, view in self.views.items()}

    def select(self, rows_B: npt.NDArray[np.int64], pads: int = 0) -> None:
        """Go on with these rows, without the first `pads` positions; nothing moves where a row keeps its place."""
        rows, kept = len(rows_B), self.positions - pads
        if pads or not self._has_room(max(rows, self.rows)):
            views, old = self._spare(rows, kept), self.views
            for name, view in views.items():
                view.assign(old[name].numpy()[rows_B, :, pads:])
            self._reach -= pads
            self._swap(views, rows, kept)
            return
        most = max(rows, self.rows)
        moves = row_moves(rows_B.tolist(), spare=most)
        if moves:
            for tensor in self._tensors.values():
                tensor.present(most + 1, kept).move(moves)
        if rows != self.rows:
            self.views = {name: tensor.present(rows, kept) for name, tensor in self._tensors.items()}
            self.rows = rows

    def join(self, other: "Held", *, right: bool) -> None:
        """The rows of `other` behind the present ones; the shorter get zeros, in front where `right` aligns ends."""
        positions, old = max(self.positions, other.positions), self.views
        self._reach = positions + max(self._reach - self.positions, other._reach - other.positions)
        rows = self.rows + other.rows
        views = self._spare(rows, positions)
        for name, view in views.items():
            parts = (_padded(part.numpy(), positions, right) for part in (old[name], other.views[name]))
            view.assign(np.concatenate(list(parts)))
        self._swap(views, rows, positions)

    def _has_room(self, rows: int) -> bool:
        return all(tensor.has_room((rows + 1) * self._reach) for tensor in self._tensors.values())

    def _spare(self, rows: int, positions: int) -> dict[str, View]:
        """Views of the buffers that hold nothing; they are made larger where so many rows could not go on in them."""
        if positions > self._reach:
            raise ValueError(f"memory was asked for {self._reach} positions, and {positions} are needed")
        cells = (rows + 1) * self._reach  # one row more: what rows in a ring go by way of
        return {name: tensor.spare(rows, positions, cells) for name, tensor in self._tensors.items()}

    def _swap(self, views: dict[str, View], rows: int, positions: int) -> None:
        for tensor in self._tensors.values():
            tensor.swap()
        self.views, self.rows, self.positions = views, rows, positions


class KvCache(Held):
    """What the rows of a batch have read and said: the `past_*` inputs of a decoder, which it gives as `present_*`."""

    def __init__(self, memory: "Memory", shapes: Shapes, rows: int, reach: int) -> None:
        """No positions yet; `reach` counts all that these rows can come to, prompt and new tokens.

        `shapes` are those of `cache_shapes`.
        """
        super().__init__(memory, shapes, rows, reach)
        self._engine = memory.engine
        self._present = {name: name.replace("past_", "present_", 1) for name in shapes}

    def advance(self, feeds: Feeds) -> npt.NDArray[np.float32]:
        """Run the graph on `inputs_embeds` [B, S, D]: scores [B, V] of the last position, S positions more are cached.

        Nothing has changed when the graph fails.
        """
        positions = self.positions + feeds["inputs_embeds"].shape[1]
        views = self._spare(self.rows, positions)
        into = {self._present[name]: view for name, view in views.items()}
        logits_BV: npt.NDArray[np.float32] = self._engine.run({**feeds, **self.views}, into)["logits"]
        self._swap(views, self.rows, positions)
        return logits_BV


class Memory:
    """Buffers of an engine that no batch uses any more, for the next: fresh memory costs far more than to write it.

    There are never more of them than were once in use at the same time. Safe to share between threads.
    """

    def __init__(self, engine: Engine, dtype: str) -> None:
        """`dtype` is numpy's name of what the graph caches in."""
        self.engine, self._dtype = engine, dtype
        self._free: list[tuple[int, Buffer]] = []
        """By size, the smallest first."""
        self._in_use = self._most_in_use = 0
        self._lock = threading.RLock()  # a collected batch may give back while this thread takes

    def take(self, elements: int) -> tuple[int, Buffer]:
        """A buffer with at least so many elements, and how many it has; nobody else has it."""
        with self._lock:
            place = next((place for place, (size, _) in enumerate(self._free) if size >= elements), None)
            found = None if place is None else self._free.pop(place)
            self._in_use += 1
            self._most_in_use = max(self._most_in_use, self._in_use)
            self._drop_smallest()
        return found or (elements, self.engine.buffer(elements, self._dtype))

    def give(self, size: int, buffer: Buffer) -> None:
        """Back from who took it and has no view of it left."""
        with self._lock:
            self._in_use -= 1
            self._free.append((size, buffer))
            self._free.sort(key=lambda sized: sized[0])
            self._drop_smallest()

    def _drop_smallest(self) -> None:
        del self._free[: max(0, len(self._free) + self._in_use - self._most_in_use)]


class _Tensor:
    """Two buffers of one tensor: one holds the present, the other is free."""

    def __init__(self, memory: Memory, heads: int, head_width: int) -> None:
        self._memory, self._heads, self._head_width = memory, heads, head_width
        self._cell = heads * head_width
        """Elements of one position of one row."""
        self._buffers: list[tuple[int, Buffer] | None] = [None, None]

    def __del__(self) -> None:
        for held in self._buffers:
            if held is not None:
                self._memory.give(*held)

    def present(self, rows: int, positions: int) -> View:
        """So many rows and positions of the buffer in use."""
        held = self._buffers[0]
        assert held is not None, "a tensor is written before it is read"
        return held[1].view((rows, self._heads, positions, self._head_width))

    def spare(self, rows: int, positions: int, cells: int) -> View:
        """So many rows and positions of the free buffer; it is changed for another if it has no room for the cells."""
        held = self._buffers[1]
        if held is None or held[0] < cells * self._cell:
            taken = self._memory.take(cells * self._cell)
            if held is not None:
                self._memory.give(*held)
            self._buffers[1] = held = taken
        return held[1].view((rows, self._heads, positions, self._head_width))

    def has_room(self, cells: int) -> bool:
        """Whether the buffer in use has it."""
        held = self._buffers[0]
        return held is not None and held[0] >= cells * self._cell

    def swap(self) -> None:
        """The free buffer is now the one in use."""
        self._buffers.reverse()


def cache_shapes(graph: Engine, kind: str = "past_") -> dict[str, tuple[int, int]]:
    """(heads, head width) of every input of a graph whose name begins with `kind`."""
    shapes = {name: shape for name, shape in graph.inputs().items() if name.startswith(kind)}
    return {name: (int(heads), int(head_width)) for name, (_, heads, _, head_width) in shapes.items()}


def row_moves(sources: Sequence[int], spare: int) -> list[tuple[int, int]]:
    """Copies (target, source) that, one after the other, put row `sources[i]` in place i, for every i.

    A row that keeps its place is not copied. Rows that change places in a ring go by way of the row `spare`.
    """
    wanted = {target: source for target, source in enumerate(sources) if target != source}
    moves = list[tuple[int, int]]()
    while wanted:
        needed = set(wanted.values())
        free = [target for target in wanted if target not in needed]
        moves += [(target, wanted.pop(target)) for target in free]
        if not free:  # rings alone are left, and the spare row is free again
            first = next(iter(wanted))
            moves.append((spare, first))
            wanted = {target: spare if source == first else source for target, source in wanted.items()}
    return moves


def _padded(array: npt.NDArray[Any], positions: int, right: bool) -> npt.NDArray[Any]:
    """[B, h, P, d] with zeros up to so many positions, in front where `right` keeps the end."""
    missing = positions - array.shape[2]
    if not missing:
        return array
    return np.pad(array, ((0, 0), (0, 0), (missing, 0) if right else (0, missing), (0, 0)))
