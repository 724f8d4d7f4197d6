"""One thread that runs what all others ask for, one token of all texts after the other.

Between two tokens it lets waiting requests in, first come first served, as long as the bundle's `max_batch` has rows
for them. Those that come together are encoded together (images of one size) and their prompts are read together.

Shape letters: B rows, Q queries, D language width, V vocabulary
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from runtime.batching.job import Job
from runtime.closing import Closing
from runtime.decoding.batch import Batch
from runtime.decoding.task import Floats, Steps
from runtime.decoding.text_decoder import TextDecoder
from runtime.errors import PipelineClosed
from runtime.image_encoder import ImageEncoder
from runtime.pipeline import one_size_batches
from runtime.stopwatch import Stopwatch

T = TypeVar("T")


class Scheduler(Closing):
    """Runs jobs in a thread of its own, until it is closed."""

    def __init__(self, encoder: ImageEncoder, decoder: TextDecoder, max_batch: int, max_wait_ms: float) -> None:
        """`max_wait_ms` bounds how long a first job waits for others that are being prepared; 0: it never waits."""
        self._encoder, self._decoder, self._max_batch = encoder, decoder, max_batch
        self._max_wait_s = max_wait_ms / 1e3
        self._changed = threading.Condition()
        """Guards the next three."""
        self._waiting = deque[Job]()
        self._coming = 0
        self._closed = False
        self._batches = list[Batch[Job]]()
        """More than one only where a language model cannot run all rows at once; the thread's alone."""
        self._thread = threading.Thread(target=self._work, name="qforge-batching", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Job]) -> Job:
        """Make a job in the calling thread, while a first one may wait for it; then it waits for its turn.

        Raises:
            PipelineClosed: the scheduler is closed.
            Exception: whatever `prepare` raises.
        """
        with self._changed:
            self._coming += 1
        job = None
        try:
            job = prepare()
        finally:
            with self._changed:
                self._coming -= 1
                closed = self._closed
                if job is not None and not closed:
                    self._waiting.append(job)
                self._changed.notify()
        if closed:
            raise _closed()
        return job

    def close(self) -> None:
        """End every job that has not ended, by PipelineClosed, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while self._round():
            pass
        for job in (*self._waiting, *(job for batch in self._batches for job in batch.searches)):
            job.fail(_closed())
        self._waiting.clear()
        self._batches.clear()

    def _round(self) -> bool:
        """Let jobs in and say one token; False when all is over. What it names is freed before the next one waits."""
        jobs = self._admitted()
        if jobs is None:
            return False
        if jobs:
            self._start(jobs)
        for batch in self._batches:
            self._step(batch)
        self._batches = [batch for batch in self._batches if batch.searches]
        return True

    def _admitted(self) -> list[Job] | None:
        """Jobs whose turn it is; None when all is over. Waits only while nothing runs."""
        with self._changed:
            while not self._closed and not self._batches and (left_s := self._wait_s()) != 0:
                self._changed.wait(left_s)
            if self._closed:
                return None
            if any(job.cancelled for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
            free = self._max_batch - sum(batch.rows for batch in self._batches)
            jobs = list[Job]()
            while self._waiting and self._waiting[0].width <= free:
                jobs.append(self._waiting.popleft())
                free -= jobs[-1].width
        for job in jobs:
            job.admitted()
        return jobs

    def _wait_s(self) -> float | None:
        """How long to wait for a job, or for more of them; None: for ever."""
        if not self._waiting:
            return None
        if not self._coming or sum(job.width for job in self._waiting) >= self._max_batch:
            return 0
        return max(0.0, self._waiting[0].submitted_s + self._max_wait_s - time.perf_counter())

    def _start(self, jobs: Sequence[Job]) -> None:
        """Encode and read; then they go on with those that run, or beside them."""
        watch = Stopwatch()
        for places in one_size_batches([job.side for job in jobs], self._max_batch):
            together = [jobs[place] for place in places]
            for some, prefix_BQD in _one_by_one_if_it_fails(together, lambda some: self._encode(some, watch)):
                for job, prefix_QD in zip(some, prefix_BQD, strict=True):
                    job.pixels_CHW, job.prefix_QD = None, prefix_QD
        encoded = [job for job in jobs if not job.ended]
        for some, (scores_BV, steps) in _one_by_one_if_it_fails(encoded, lambda some: self._read(some, watch)):
            for job in some:
                job.started(watch)
            try:
                batch = Batch(scores_BV, steps, some, np.repeat(np.arange(len(some)), [job.width for job in some]))
                self._add(batch)
            except Exception as error:  # there was no memory for their rows
                for job in some:
                    job.fail(error)

    def _encode(self, jobs: Sequence[Job], watch: Stopwatch) -> Floats:
        pixels_BCHW = np.stack([job.pixels_CHW for job in jobs if job.pixels_CHW is not None])
        return self._encoder.encode(pixels_BCHW, [job.question for job in jobs], watch)

    def _read(self, jobs: Sequence[Job], watch: Stopwatch) -> tuple[Floats, Steps]:
        prefix_BQD = np.stack([job.prefix_QD for job in jobs if job.prefix_QD is not None])
        with watch.phase("prefill"):
            most = max(job.max_new_tokens for job in jobs)
            return self._decoder.start(prefix_BQD, [job.prompt for job in jobs], most)

    def _add(self, batch: Batch[Job]) -> None:
        if not batch.searches:  # one token was enough
            return
        for running in self._batches:
            if running.can_join(batch):
                running.join(batch)
                return
        self._batches.append(batch)

    @staticmethod
    def _step(batch: Batch[Job]) -> None:
        """One token more; where the language model fails, the youngest job is given up and the rest tried again."""
        try:
            while batch.searches:
                try:
                    scores_BV = batch.scores()
                except Exception as error:
                    batch.drop_last().fail(error)
                    continue
                batch.advance(scores_BV)
                return
        except Exception as error:  # its rows cannot be told apart any more
            for job in batch.searches:
                job.fail(error)
            batch.searches.clear()


def _one_by_one_if_it_fails(jobs: Sequence[Job], do: Callable[[Sequence[Job]], T]) -> list[tuple[Sequence[Job], T]]:
    """Do something for all jobs together, or else for each alone, so that an error is its own job's; (jobs, result)."""
    if not jobs:
        return []
    try:
        return [(jobs, do(jobs))]
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].fail(error)
            return []
    return [done for job in jobs for done in _one_by_one_if_it_fails([job], do)]


def _closed() -> PipelineClosed:
    return PipelineClosed("the pipeline was closed before it answered; open the bundle again: runtime.load")
