"""Many callers, one batch: texts stay what they are alone, rows join and leave between tokens, errors stay at home."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from runtime.batching.job import Job
from runtime.decoder import DecoderSteps
from runtime.decoding import GREEDY, Decoding
from runtime.decoding.task import Floats, Ids, Steps
from runtime.encoder_decoder import EncoderDecoderSteps
from runtime.errors import InputError, PipelineClosed
from tests.runtime.batching.workshop import WAIT_S, Workshop
from tests.runtime.decoding.family import NEW_TOKENS

Open = Callable[..., Workshop]

KINDS = (
    GREEDY,
    Decoding(repetition_penalty=1.3, min_new_tokens=4),
    Decoding(stop_strings=("a", "e")),
    Decoding(do_sample=True, seed=3),
    Decoding(do_sample=True, seed=4, temperature=1.5, top_p=0.8, num_return_sequences=3),
    Decoding(num_beams=3),
    Decoding(num_beams=4, num_return_sequences=2, early_stopping=True, length_penalty=0.5),
    Decoding(num_beams=2, no_repeat_ngram_size=2),
)


class Gate:
    """Around what the scheduler's `start` gives: notes the rows of each step, and holds one until it is let through."""

    def __init__(self, workshop: Workshop) -> None:
        self.rows = list[int]()
        """Of every step, those after a prefill too."""
        self.positions = list[int]()
        """What each step's cache holds, by its shape."""
        self.hold_before: int | None = None
        """Number of the step that waits."""
        self.fails: Callable[[int], Exception | None] = lambda rows: None
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._thread = workshop.scheduler._thread
        self._start = workshop.family.decoder.start
        workshop.family.decoder.start = self._started  # type: ignore[method-assign]

    def _started(self, prefix_BQD: Floats, prompts: list[list[int]], most: int) -> tuple[Floats, Steps]:
        scores_BV, steps = self._start(prefix_BQD, prompts, most)
        if threading.current_thread() is not self._thread:
            return scores_BV, steps
        step = steps.step

        def watched(ids_B: Ids) -> Floats:
            if len(self.rows) == self.hold_before:
                self.reached.set()
                assert self.go_on.wait(WAIT_S)
            error = self.fails(len(ids_B))
            if error is not None:
                raise error
            self.rows.append(len(ids_B))
            self.positions.append(steps._cache.positions)  # type: ignore[attr-defined]
            return step(ids_B)

        steps.step = watched  # type: ignore[method-assign]
        return scores_BV, steps


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """All at once; the first error is raised here."""
    errors = list[BaseException]()

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a caller waits for ever"
    if errors:
        raise errors[0]


def test_a_text_never_depends_on_its_neighbours(workshop: Open) -> None:
    """Random mixes of all kinds, from six threads that come when they like."""
    shop = workshop(max_wait_ms=2.0)
    rng = np.random.default_rng(0)
    asked = [(int(rng.integers(50)), KINDS[place % len(KINDS)], int(rng.choice([2, 3]))) for place in range(72)]
    expected = [shop.alone(row, decoding) for row, decoding, _ in asked]
    found: dict[int, list[tuple[int, ...]]] = {}
    together = Gate(shop)

    def caller(number: int) -> None:
        pause = np.random.default_rng(number)
        for place in range(number, len(asked), 6):
            row, decoding, side = asked[place]
            found[place] = shop.ask(row, decoding, side=side).wait()
            time.sleep(float(pause.random()) * 2e-3)

    in_threads(6, caller)
    assert [found[place] for place in range(len(asked))] == expected
    assert max(together.rows) > 4, "requests ran together"
    assert max(together.rows) <= 8, "the bundle's limit"
    assert max(len(images) for images in shop.images.batches) > 1


def test_rows_join_and_leave_between_steps(workshop: Open) -> None:
    shop = workshop()
    gate = Gate(shop)
    early, late = shop.long_rows(2)
    gate.hold_before = 4
    first = shop.ask(early)
    assert gate.reached.wait(WAIT_S)
    second = shop.ask(late, Decoding(num_beams=3))
    gate.go_on.set()
    assert first.wait() == shop.alone(early)
    assert second.wait() == shop.alone(late, Decoding(num_beams=3))
    steps = gate.rows[: 2 * NEW_TOKENS + 2]
    assert steps[:5] == [1] * 5, "four tokens, and the one that was held"
    assert steps[5] == 4, "joined before the next"
    assert 3 in steps[6:], "the first left while the other went on"


def test_rows_that_cannot_share_a_run_take_turns(workshop: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in (DecoderSteps, EncoderDecoderSteps):
        monkeypatch.setattr(steps, "can_join", lambda *_: False)
    shop = workshop()
    early, late = shop.long_rows(2)
    gate = Gate(shop)
    first = held(shop, gate, early)
    second = shop.ask(late, Decoding(num_beams=3))
    gate.go_on.set()
    assert first.wait() == shop.alone(early)
    assert second.wait() == shop.alone(late, Decoding(num_beams=3))
    assert {*gate.rows} == {1, 3}
    turns = gate.rows[gate.rows.index(3) :][:4]
    assert turns in ([3, 1, 3, 1], [1, 3, 1, 3])


def test_a_long_row_of_joiners_needs_no_more_positions_than_each_alone(workshop: Open) -> None:
    """Pads in front of all rows are cut off: whoever stays longest decides, not who was there before."""
    shop = workshop(max_batch=3)
    rows = shop.long_rows(12)
    gate = Gate(shop)
    needed = 4 + max(len(shop.family.prompts[row]) for row in rows) + NEW_TOKENS
    gate.hold_before = 4  # so that not all end at the same step
    jobs = [shop.ask(rows[0])]
    assert gate.reached.wait(WAIT_S)
    jobs += [shop.ask(row) for row in rows[1:]]
    gate.go_on.set()
    assert [job.wait() for job in jobs] == [shop.alone(row) for row in rows]
    assert max(gate.positions) <= needed


def test_one_image_size_per_encoder_batch_and_one_prefill_for_all(workshop: Open) -> None:
    shop = workshop()
    gate = Gate(shop)
    gate.hold_before = 0
    first = shop.ask(0)
    assert gate.reached.wait(WAIT_S)
    others = [shop.ask(row, side=side) for row, side in ((1, 2), (2, 3), (3, 2))]
    gate.hold_before = None
    gate.go_on.set()
    for job, row in zip((first, *others), range(4), strict=True):
        assert job.wait() == shop.alone(row)
    assert shop.images.batches == [[0], [1, 3], [2]]
    assert {job.timings_ms["prefill"] for job in others} == {others[0].timings_ms["prefill"]}


def test_first_come_first_served(workshop: Open) -> None:
    """Narrow requests do not overtake a wide one for ever."""
    shop = workshop(max_batch=4)
    gate, (row, other) = Gate(shop), shop.long_rows(2)
    gate.hold_before = 0
    first = shop.ask(row)
    assert gate.reached.wait(WAIT_S)
    wide, narrow = shop.ask(other, Decoding(num_beams=4)), shop.ask(row)
    gate.go_on.set()
    assert (first.wait(), wide.wait(), narrow.wait()) == (
        shop.alone(row),
        shop.alone(other, Decoding(num_beams=4)),
        shop.alone(row),
    )
    assert shop.images.batches == [[row], [other], [row]]


def test_a_single_request_waits_for_nobody(workshop: Open) -> None:
    shop = workshop(max_wait_ms=WAIT_S * 1e3)
    begin = time.perf_counter()
    shop.ask(0).wait()
    assert time.perf_counter() - begin < WAIT_S / 4


def slow_caller(shop: Workshop, arrived: threading.Event, go_on: threading.Event) -> threading.Thread:
    """Somebody whose image is still being read."""

    def prepare() -> Job:
        arrived.set()
        assert go_on.wait(WAIT_S)
        return shop.job(1)

    thread = threading.Thread(target=lambda: shop.scheduler.submit(prepare).wait(), daemon=True)
    thread.start()
    assert arrived.wait(WAIT_S)
    return thread


@pytest.mark.parametrize("bound_ms", [0.0, 150.0])
def test_nobody_waits_longer_than_the_bound(workshop: Open, bound_ms: float) -> None:
    shop = workshop(max_wait_ms=bound_ms)
    arrived, go_on = threading.Event(), threading.Event()
    thread = slow_caller(shop, arrived, go_on)
    job = shop.ask(0)
    assert job.wait() == shop.alone(0)
    assert bound_ms <= job.timings_ms["queue"] < bound_ms + WAIT_S * 500
    assert shop.images.batches == [[0]]
    go_on.set()
    thread.join(WAIT_S)
    assert shop.images.batches == [[0], [1]]


def test_a_companion_that_comes_in_time_is_waited_for(workshop: Open) -> None:
    shop = workshop(max_wait_ms=WAIT_S * 1e3)
    arrived, go_on = threading.Event(), threading.Event()
    thread = slow_caller(shop, arrived, go_on)
    job = shop.ask(0)
    go_on.set()
    assert job.wait() == shop.alone(0)
    thread.join(WAIT_S)
    assert shop.images.batches == [[0, 1]]


def test_a_caller_whose_image_is_bad_is_not_waited_for(workshop: Open) -> None:
    shop = workshop(max_wait_ms=WAIT_S * 1e3)

    def prepare() -> Job:
        raise InputError("no image")

    with pytest.raises(InputError, match="no image"):
        shop.scheduler.submit(prepare)
    begin = time.perf_counter()
    shop.ask(0).wait()
    assert time.perf_counter() - begin < WAIT_S / 4


def held(shop: Workshop, gate: Gate, row: int) -> Job:
    """A job whose next token waits for `gate.go_on`, so that those after it come together."""
    gate.hold_before = len(gate.rows)
    job = shop.ask(row)
    assert gate.reached.wait(WAIT_S)
    gate.hold_before = None
    return job


def test_errors_belong_to_their_request(workshop: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the encoder, of the prefill and of the search; those beside them are answered."""
    shop = workshop()
    gate, start = Gate(shop), shop.family.decoder.start
    first = held(shop, gate, 0)
    prompt = shop.family.prompts[9]

    def breaks(prefix_BQD: Floats, prompts: list[list[int]], most: int) -> tuple[Floats, Steps]:
        if prompt in prompts:
            raise MemoryError("prompt 9")
        return start(prefix_BQD, prompts, most)

    monkeypatch.setattr(shop.family.decoder, "start", breaks)
    shop.images.broken = 7
    impossible = Decoding(do_sample=True, no_repeat_ngram_size=1)
    good, image, read, search = shop.ask(1), shop.ask(7), shop.ask(9), shop.ask(3, impossible)
    monkeypatch.setattr(search, "_search", Broken())
    good_too = shop.ask(4, Decoding(num_beams=2))
    gate.go_on.set()
    with pytest.raises(MemoryError, match="image 7"):
        image.wait()
    with pytest.raises(MemoryError, match="prompt 9"):
        read.wait()
    with pytest.raises(InputError, match="no token is left"):
        search.wait()
    assert (first.wait(), good.wait()) == (shop.alone(0), shop.alone(1))
    assert good_too.wait() == shop.alone(4, Decoding(num_beams=2))


class Broken:
    """A search that fails at its first token."""

    rows = 1

    def advance(self, scores_BV: Floats) -> tuple[Ids, Ids]:
        raise InputError("no token is left")


def test_a_failing_step_costs_the_youngest(workshop: Open) -> None:
    """No memory for three rows: the last to come is told, the others go on as if it had never been there."""
    shop = workshop()
    gate, rows = Gate(shop), shop.long_rows(4)
    first = held(shop, gate, rows[0])
    gate.fails = lambda count: MemoryError("three rows") if count > 2 else None
    second, third, fourth = (shop.ask(row) for row in rows[1:])
    gate.go_on.set()
    for job in (third, fourth):
        with pytest.raises(MemoryError, match="three rows"):
            job.wait()
    assert (first.wait(), second.wait()) == (shop.alone(rows[0]), shop.alone(rows[1]))
    assert shop.ask(rows[3]).wait() == shop.alone(rows[3]), "and the thread goes on"


def test_a_step_that_never_works_ends_all_of_them(workshop: Open) -> None:
    shop = workshop()
    gate = Gate(shop)
    gate.fails = lambda rows: MemoryError("always")
    for job in [shop.ask(row) for row in shop.long_rows(3)]:
        with pytest.raises(MemoryError, match="always"):
            job.wait()
    gate.fails = lambda rows: None
    assert shop.ask(0).wait() == shop.alone(0)


def test_streams_say_what_answers_say(workshop: Open) -> None:
    shop = workshop()
    streams = {row: shop.ask(row, streamed=True) for row in range(6)}
    for row, job in streams.items():
        assert [tuple(job.tokens())] == shop.alone(row)
        assert job.timings_ms["decode"] > 0


def test_a_stream_that_is_dropped_frees_its_rows(workshop: Open) -> None:
    """While it runs, and while it waits; also before its first token was asked for."""
    shop = workshop(max_batch=1)
    gate, (row, other) = Gate(shop), shop.long_rows(2)
    gate.hold_before = 3
    tokens = shop.ask(row, streamed=True).tokens()
    assert next(tokens) == shop.alone(row)[0][0]
    assert gate.reached.wait(WAIT_S)
    never_begun = shop.ask(other, streamed=True).tokens()
    last = shop.ask(other)
    del tokens, never_begun
    gate.go_on.set()
    assert last.wait() == shop.alone(other)
    assert shop.images.batches == [[row], [other]], "one of them never ran"
    assert len(gate.rows) == 4 + NEW_TOKENS - 1, "the other left before its fifth step"


def test_closing_ends_those_that_run_and_those_that_wait(workshop: Open) -> None:
    shop = workshop(max_batch=1)
    gate, rows = Gate(shop), shop.long_rows(2)
    running = held(shop, gate, rows[0])
    waiting = shop.ask(rows[1])
    closing = threading.Thread(target=shop.scheduler.close)
    closing.start()
    while not shop.scheduler._closed:
        time.sleep(1e-3)
    gate.go_on.set()
    closing.join(WAIT_S)
    for job in (running, waiting):
        with pytest.raises(PipelineClosed, match="the pipeline was closed before it answered"):
            job.wait()
    with pytest.raises(PipelineClosed):
        shop.ask(0)
    shop.scheduler.close()  # once more does nothing
