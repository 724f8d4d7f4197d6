"""What both kinds of language model share: one prefill, then the decode loop that was asked for."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.decoding import GREEDY, Decoding
from runtime.decoding.batch import Batch, searches_of
from runtime.decoding.one_by_one import OneByOne
from runtime.decoding.task import Floats, Steps, Stops, Task
from runtime.errors import InputError
from runtime.manifest import Generation, Limits
from runtime.query_cache import Statistics
from runtime.stopwatch import Stopwatch

Prompts = Sequence[Sequence[int]]
"""Token ids of each row."""


class TextDecoder(ABC):
    """Prefix and prompt → tokens; one class per kind of language model."""

    def __init__(self, generation: Generation, limits: Limits, graph: str) -> None:
        """`graph` is the one that gives the scores, for messages."""
        self._generation, self._limits, self._graph = generation, limits, graph

    @abstractmethod
    def start(self, prefix_BQD: Floats, prompts: Prompts, max_new_tokens: int) -> tuple[Floats, Steps]:
        """Read prefix and prompts: scores [B, V] of the first token, and the rows that go on from there.

        No row says more than `max_new_tokens`, so that memory for all of them is made once, here.
        """

    @abstractmethod
    def check_positions(self, prompt_positions: int, max_new_tokens: int) -> None:
        """InputError when prefix, prompt and new tokens take more positions than the bundle has."""

    def statistics(self) -> Statistics:
        """Counters of what was remembered; none for a kind that remembers nothing."""
        return {}

    def generate(
        self,
        prefix_BQD: Floats,
        prompts: Prompts,
        max_new_tokens: int,
        watch: Stopwatch,
        decoding: Decoding = GREEDY,
        stops: Stops | None = None,
    ) -> list[tuple[int, ...]]:
        """Generated ids of each row, the end token excluded; `num_return_sequences` of them in a row's place.

        A row stops at any end token, when `stops` says so, or after `max_new_tokens`. Where a row is several sequences,
        no more rows run together than the bundle's `max_batch` has sequences.

        Raises:
            InputError: beyond the bundle's limits (new tokens, positions, sequences).
        """
        task = self.task(prefix_BQD.shape[1], prompts, max_new_tokens, decoding, stops)
        at_once = len(prompts) if decoding.width == 1 else self._limits.max_batch // decoding.width
        texts = list[tuple[int, ...]]()
        for first in range(0, len(prompts), at_once):
            rows = slice(first, first + at_once)
            with watch.phase("prefill"):
                logits_BV, steps = self.start(prefix_BQD[rows], prompts[rows], max_new_tokens)
            with watch.phase("decode"):
                texts += _said(logits_BV, steps, task)
        return texts

    def stream(
        self,
        prefix_1QD: Floats,
        prompt: Sequence[int],
        max_new_tokens: int,
        watch: Stopwatch,
        decoding: Decoding = GREEDY,
        stops: Stops | None = None,
    ) -> Iterator[int]:
        """The tokens of one row as they are said, those of `generate`; the errors come before the first token.

        Raises:
            InputError: as `generate`, and for what is known only at the end (beams) or is several texts.
        """
        check_streamable(decoding)
        task = self.task(prefix_1QD.shape[1], [prompt], max_new_tokens, decoding, stops)
        with watch.phase("prefill"):
            logits_1V, steps = self.start(prefix_1QD, [prompt], max_new_tokens)
        return self._stream(logits_1V, steps, task, watch)

    @staticmethod
    def _stream(logits_1V: Floats, steps: Steps, task: Task, watch: Stopwatch) -> Iterator[int]:
        said, shown = OneByOne(task, 1), 0
        with watch.phase("decode"):  # what the caller does between two tokens is not charged
            batch = Batch(logits_1V, steps, [said], np.zeros(1, np.int64))
        while True:
            for token in said.texts()[0][shown:]:
                shown += 1
                yield token
            if not batch.searches:
                return
            with watch.phase("decode"):
                batch.step()

    def task(
        self, queries: int, prompts: Prompts, max_new_tokens: int, decoding: Decoding, stops: Stops | None
    ) -> Task:
        """The rules of a call, after every check; `queries` are the positions of a prefix.

        Raises:
            InputError: beyond the bundle's limits (new tokens, positions, sequences).
        """
        check_new_tokens(max_new_tokens, self._limits)
        decoding.check_length(max_new_tokens)
        self.check_positions(queries + max(len(prompt) for prompt in prompts), max_new_tokens)
        if 1 < decoding.width > self._limits.max_batch:
            name = "num_beams" if decoding.num_beams > 1 else "num_return_sequences"
            raise InputError(
                f"{name}: expected at most {self._limits.max_batch} (sequences that this bundle runs at once), found "
                f"{decoding.width}; export with a larger one: qforge export --set export.max_batch={decoding.width}"
            )
        return Task(decoding, self._generation, max_new_tokens, self._graph, stops)


def _said(logits_BV: Floats, steps: Steps, task: Task) -> list[tuple[int, ...]]:
    searches = searches_of(task, len(logits_BV))
    batch = Batch(logits_BV, steps, searches, np.repeat(np.arange(len(logits_BV)), task.decoding.width))
    while batch.searches:
        batch.step()
    return [text for search in searches for text in search.texts()]


def check_streamable(decoding: Decoding) -> None:
    """InputError for what is known only at the end (beams), or is several texts."""
    if decoding.width > 1:
        name = "num_beams" if decoding.num_beams > 1 else "num_return_sequences"
        why = "beams may change until the end" if decoding.num_beams > 1 else "a stream is one text"
        raise InputError(f"{name}: expected 1 in a stream, found {decoding.width}: {why}; do not stream")


def check_new_tokens(max_new_tokens: int, limits: Limits) -> None:
    """InputError when a request asks for more tokens than the bundle can say, or for none."""
    if not 1 <= max_new_tokens <= limits.max_new_tokens:
        raise InputError(
            f"max_new_tokens: expected 1 to {limits.max_new_tokens} (this bundle's limit), found {max_new_tokens}"
        )
