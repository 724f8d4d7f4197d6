"""One request on its way from the thread that asks to the thread that runs, and its text on the way back.

Shape letters: B rows, C colour channels, H height, W width, Q queries, D language width, V vocabulary
"""

import queue
import time
from collections.abc import Iterator

import numpy as np

from runtime.decoding.batch import searches_of
from runtime.decoding.task import Floats, Ids, Task
from runtime.stopwatch import Stopwatch

NONE_GO_ON = np.arange(0), np.arange(0)


class Job:
    """A request; satisfies `runtime.decoding.task.Search`, but what goes wrong in it is told to its own caller alone.

    The caller makes it and then only waits, reads tokens or cancels; all else is the scheduler's.
    """

    def __init__(
        self,
        pixels_CHW: Floats,
        side: int | None,
        question: list[int] | None,
        prompt: list[int],
        task: Task,
        watch: Stopwatch,
        *,
        streamed: bool = False,
    ) -> None:
        """`side` is the size that the image was read at; `watch` goes on with what the caller has charged to it.

        `streamed` gives the tokens to `tokens` as they are said; the task then is one text.
        """
        self.pixels_CHW: Floats | None = pixels_CHW
        """None when it is encoded."""
        self.prefix_QD: Floats | None = None
        """What the language model reads of the image, once it is encoded."""
        self.side, self.question, self.prompt, self.width = side, question, prompt, task.decoding.width
        self.max_new_tokens = task.max_new_tokens
        self.watch = watch
        self.timings_ms: dict[str, float] = {}
        """By phase, when it has ended well."""
        self.submitted_s = time.perf_counter()
        self.cancelled = False
        self.ended = False
        """Whether its caller has been told the end."""
        self._decoding_since_s = 0.0
        (self._search,) = searches_of(task, 1)
        self._streamed, self._shown = streamed, 0
        self._told: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()

    @property
    def rows(self) -> int:
        """Rows that it has in its batch."""
        return self._search.rows

    def advance(self, scores_BV: Floats) -> tuple[Ids, Ids]:
        """See `Search`; one that was cancelled, or whose search fails, leaves."""
        if self.cancelled:
            return NONE_GO_ON
        try:
            kept_B, ids_B = self._search.advance(scores_BV)
            if self._streamed:
                for token in self._search.texts()[0][self._shown :]:
                    self._told.put(token)
                    self._shown += 1
        except Exception as error:  # whatever it is, it is this request's
            self.fail(error)
            return NONE_GO_ON
        if not len(ids_B):
            self._end()
        return kept_B, ids_B

    def texts(self) -> list[tuple[int, ...]]:
        """What it said; see `Search`."""
        return self._search.texts()

    def admitted(self) -> None:
        """It waits no longer."""
        self.watch.charge("queue", time.perf_counter() - self.submitted_s)

    def started(self, watch: Stopwatch) -> None:
        """Its batch has been read; `watch` says what that took."""
        self.watch.add(watch)
        self.prefix_QD = None
        self._decoding_since_s = time.perf_counter()

    def fail(self, error: Exception) -> None:
        """Tell its caller; nothing happens where that knows the end already."""
        if not self.ended:
            self.ended, self.pixels_CHW, self.prefix_QD = True, None, None
            self._told.put(error)

    def cancel(self) -> None:
        """Its caller wants no more of it: it leaves before the next token."""
        self.cancelled = True

    def wait(self) -> list[tuple[int, ...]]:
        """Its texts, when they are said; or its error."""
        told = self._told.get()
        if isinstance(told, Exception):
            raise told
        assert told is None, "a streamed job is read with `tokens`"
        return self.texts()

    def tokens(self) -> Iterator[int]:
        """Its tokens, as they are said; who drops or closes this has cancelled the job."""
        return _Tokens(self, self._told)

    def _end(self) -> None:
        self.watch.charge("decode", time.perf_counter() - self._decoding_since_s)
        self.timings_ms, self.ended = self.watch.timings_ms(), True
        self._told.put(None)


class _Tokens:
    """An object, not a generator: one that is dropped before its first token must cancel too."""

    def __init__(self, job: Job, told: "queue.SimpleQueue[int | Exception | None]") -> None:
        self._job, self._told, self._over = job, told, False

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._over:
            raise StopIteration
        told = self._told.get()
        if isinstance(told, int):
            return told
        self._over = True
        raise StopIteration if told is None else told

    def __del__(self) -> None:
        self._job.cancel()
