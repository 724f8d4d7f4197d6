"""A pipeline that several threads share: what they ask for at once runs as one batch."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.answers import Answer, Request
from runtime.backends import CPU, Opener
from runtime.batching.job import Job
from runtime.batching.scheduler import Scheduler
from runtime.bundle import Bundle
from runtime.decoding import GREEDY, Decoding
from runtime.decoding.task import Task
from runtime.decoding.text_decoder import check_streamable
from runtime.disk_cache import DiskCache
from runtime.errors import InputError
from runtime.pipeline import Pipeline, answer_of
from runtime.preprocess import preprocess_batch
from runtime.stopwatch import PHASES, QUEUE, Stopwatch
from runtime.streaming import Piece


class BatchedPipeline(Pipeline):
    """A `Pipeline` with one more thread, in which the requests of all callers run; close it to end that thread.

    The texts are those of a `Pipeline`. It differs in three ways. Callers gain from each other, whatever each asks for:
    captions, questions, streams, beams and draws share a batch. Every answer has timings of its own, with one phase
    more, `queue`; what ran for several requests is charged to each. And a call of many requests is no batch of its
    own: at most `max_batch` of them wait or run at a time, and each leaves as soon as its text has ended.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: Opener = CPU,
        cache_bytes: int,
        disk: DiskCache | None = None,
        max_wait_ms: float,
    ) -> None:
        """As `Pipeline`; `max_wait_ms` is the `batch_wait_ms` of `runtime.load`."""
        if not (math.isfinite(max_wait_ms) and max_wait_ms >= 0):
            raise InputError(f"batch_wait_ms: expected 0 or more milliseconds, found {max_wait_ms}")
        super().__init__(bundle, device=device, cache_bytes=cache_bytes, disk=disk)
        self._scheduler = Scheduler(self._encoder, self._decoder, bundle.manifest.limits.max_batch, max_wait_ms)

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer all requests; see `Pipeline.answer`.

        Raises:
            PipelineClosed: the pipeline was closed meanwhile.
        """
        self._weights.check()
        if not requests:
            raise InputError("expected at least one request, found none")
        asked = [self._asked(request, max_new_tokens, decoding) for request in requests]  # all are checked first
        answers, running = list[Answer](), deque[tuple[Request, Job]]()
        try:
            for one in asked:
                if len(running) == self.bundle.manifest.limits.max_batch:
                    answers.append(self._finished(*running[0]))
                    running.popleft()
                running.append((one.request, self._submitted(one)))
            while running:
                answers.append(self._finished(*running[0]))
                running.popleft()
        finally:
            for _, job in running:  # after an error nobody waits for the others
                job.cancel()
        return answers

    def stream(
        self, request: Request, *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> Iterator[Piece]:
        """One answer while it is said; see `Pipeline.stream`. Closing or dropping the iterator frees its rows.

        It does not wait for its reader: the tokens are kept until they are read.

        Raises:
            PipelineClosed: the pipeline was closed meanwhile.
        """
        self._weights.check()
        check_streamable(decoding)
        job = self._submitted(self._asked(request, max_new_tokens, decoding), streamed=True)
        return self._pieces(request, job.tokens(), job.watch)

    def close(self) -> None:
        """End what runs or waits by PipelineClosed, and free the graphs."""
        self._scheduler.close()
        super().close()

    def _asked(self, request: Request, max_new_tokens: int | None, decoding: Decoding) -> "_Asked":
        """What is to be done for one request, after every check that needs no image."""
        manifest, prompt = self.bundle.manifest, self._prompt_ids(request)
        task = self._decoder.task(
            manifest.model.queries, [prompt], self._new_tokens(max_new_tokens), decoding, self._stops(decoding)
        )
        return _Asked(request, manifest.side(request.image_size), self._question_ids(request), prompt, task)

    def _submitted(self, asked: "_Asked", *, streamed: bool = False) -> Job:
        def prepare() -> Job:
            watch = Stopwatch((QUEUE, *PHASES))
            with watch.phase("preprocess"):
                settings = self.bundle.manifest.preprocess.at(asked.side)
                (pixels_CHW,) = preprocess_batch([asked.request.image], settings)
            return Job(pixels_CHW, asked.side, asked.question, asked.prompt, asked.task, watch, streamed=streamed)

        return self._scheduler.submit(prepare)

    def _finished(self, request: Request, job: Job) -> Answer:
        return answer_of(request, self._spoken(job.wait()), job.timings_ms)


@dataclass(frozen=True)
class _Asked:
    """One request as ids and rules."""

    request: Request
    side: int | None
    question: list[int] | None
    prompt: list[int]
    task: Task


def open_pipeline(
    bundle: Bundle, device: Opener, *, cache_bytes: int, disk: DiskCache | None, batch_wait_ms: float | None
) -> Pipeline:
    """A bundle that answers; one whose callers share batches when `batch_wait_ms` is a number. See `runtime.load`."""
    if batch_wait_ms is None:
        return Pipeline(bundle, device=device, cache_bytes=cache_bytes, disk=disk)
    return BatchedPipeline(bundle, device=device, cache_bytes=cache_bytes, disk=disk, max_wait_ms=batch_wait_ms)
