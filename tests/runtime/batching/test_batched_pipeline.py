"""A shared pipeline answers as one of its own would; the tiny bundle's answers are told by hand (conftest.py)."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import runtime
from benchmarks.hammer import hammer, make_asks
from runtime.answers import Request
from runtime.batching.job import Job
from runtime.batching.pipeline import BatchedPipeline
from runtime.decoding import Decoding
from runtime.errors import ImageError, InputError, PipelineClosed
from runtime.pipeline import Pipeline

WAIT_S = 20.0


def plain(red: int, green: int, blue: int) -> np.ndarray:
    return np.full((5, 7, 3), (red, green, blue), np.uint8)


REDDISH, GREENISH, BLUISH = plain(250, 90, 10), plain(20, 200, 90), plain(40, 10, 220)


@pytest.fixture
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with runtime.load(tiny_bundle, batch_wait_ms=2.0) as opened:
        yield opened


def count_runs(engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes the engine was run with, as they come."""
    sizes, run = list[int](), engine.run

    def counted(feeds):
        sizes.append(len(next(iter(feeds.values()))))
        return run(feeds)

    monkeypatch.setattr(engine, "run", counted)
    return sizes


def test_it_is_a_pipeline(pipeline: Pipeline, tiny_bundle: Path) -> None:
    assert isinstance(pipeline, BatchedPipeline)
    assert [answer.text for answer in pipeline.caption([REDDISH, GREENISH, BLUISH, REDDISH, BLUISH])] == [
        "a red",
        "a green",
        "a blue",
        "a red",
        "a blue",
    ], "more than max_batch, in their order"
    assert pipeline.vqa(REDDISH, "opposite colour").text == "a blue"
    beams = Decoding(num_beams=3, num_return_sequences=2)
    with runtime.load(tiny_bundle) as single:
        assert type(single) is Pipeline
        assert pipeline.caption(REDDISH, decoding=beams)[0].texts == single.caption(REDDISH, decoding=beams)[0].texts
        *pieces, last = pipeline.stream(Request(GREENISH, "colour"))
        alone = list(single.stream(Request(GREENISH, "colour")))
        assert [(piece.text, piece.token_ids) for piece in (*pieces, last)] == [
            (piece.text, piece.token_ids) for piece in alone
        ]
        assert last.answer is not None and last.answer.text == "a green"


def test_every_answer_has_its_own_timings(pipeline: Pipeline) -> None:
    first, second = pipeline.answer([Request(REDDISH, "colour"), Request(REDDISH, "colour")])
    for answer in (first, second):
        phases = {name: took for name, took in answer.timings_ms.items() if name != "total"}
        assert set(phases) == {"queue", "preprocess", "vision", "qformer", "prefill", "decode"}
        assert all(took >= 0 for took in phases.values())
        assert 0 < sum(phases.values()) <= answer.timings_ms["total"]
        assert answer.timings_ms["prefill"] > 0 < answer.timings_ms["decode"]
    *_, last = pipeline.stream(Request(REDDISH, "colour"))
    assert last.answer is not None and set(last.answer.timings_ms) == set(first.timings_ms)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (Request(REDDISH, prompt="say {}"), "expected no '{}' in a caption prompt"),
        (Request(REDDISH, " . "), "question: expected words"),
        (Request(REDDISH, "colour", prompt="photo " * 14 + "{}"), "positions, this bundle has 20"),
        (Request("nowhere.png"), "nowhere.png: expected an image file"),
        (Request(REDDISH, image_size=9), "image_size"),
    ],
)
def test_refusals(pipeline: Pipeline, request_: Request, sentence: str) -> None:
    with pytest.raises(InputError, match="(?s)" + sentence.replace("{", r"\{").replace("}", r"\}")):
        pipeline.answer([Request(GREENISH), request_])
    with pytest.raises(InputError):
        pipeline.stream(request_)
    assert pipeline.caption(GREENISH)[0].text == "a green", "the others do not notice"


def test_other_refusals(pipeline: Pipeline, tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="at least one request"):
        pipeline.caption([])
    with pytest.raises(ImageError):
        pipeline.caption([b"not an image"])
    with pytest.raises(InputError, match="max_new_tokens: expected 1 to 8"):
        pipeline.answer([Request(REDDISH)], max_new_tokens=9)
    with pytest.raises(InputError, match="num_beams: expected 1 in a stream"):
        pipeline.stream(Request(REDDISH), decoding=Decoding(num_beams=2))
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="batch_wait_ms: expected 0 or more milliseconds"):
            runtime.load(tiny_bundle, batch_wait_ms=wrong)


def texts_at_once(pipeline: Pipeline, questions: Sequence[str]) -> list[str]:
    """What as many threads are told of one image."""
    texts, together = dict[str, str](), threading.Barrier(len(questions))

    def ask(question: str) -> None:
        together.wait(WAIT_S)
        texts[question] = pipeline.vqa(REDDISH, question).text

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    return [texts[question] for question in questions]


def test_a_new_image_that_two_ask_about_at_once_is_encoded_once(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they come into one batch or one after the other."""
    for _ in range(10):
        with runtime.load(tiny_bundle, batch_wait_ms=1.0) as pipeline:
            vision = count_runs(pipeline._encoder._vision, monkeypatch)
            assert texts_at_once(pipeline, ("colour", "opposite", "photo")) == ["a red", "a blue", "a red"]
            assert vision == [1]


def test_closing_is_told_to_those_who_wait(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = runtime.load(tiny_bundle, batch_wait_ms=0.0)
    vision, reached, go_on = pipeline._encoder._vision, threading.Event(), threading.Event()
    run = vision.run

    def held(feeds):
        reached.set()
        assert go_on.wait(WAIT_S)
        return run(feeds)

    monkeypatch.setattr(vision, "run", held)
    errors = list[Exception]()

    def ask() -> None:
        try:
            pipeline.caption(REDDISH)
        except PipelineClosed as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    assert reached.wait(WAIT_S)
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    while not pipeline._scheduler._closed:
        closing.join(1e-3)
    go_on.set()
    for thread in (asking, closing):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert "closed before it answered" in str(errors[0])
    with pytest.raises(PipelineClosed):
        pipeline.caption(REDDISH)


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_a_reader_who_goes_away_cancels(
    pipeline: BatchedPipeline, monkeypatch: pytest.MonkeyPatch, begun: bool, closed: bool
) -> None:
    jobs, submit = list[Job](), pipeline._scheduler.submit
    monkeypatch.setattr(pipeline._scheduler, "submit", lambda prepare: jobs.append(submit(prepare)) or jobs[-1])
    pieces = pipeline.stream(Request(REDDISH))
    if begun:
        next(pieces)
    assert not jobs[0].cancelled
    if closed:
        pieces.close()
    else:
        del pieces
    assert jobs[0].cancelled


def test_hammer(tiny_bundle: Path) -> None:
    """Eight threads for two seconds: every answer is the one of a pipeline that nobody shares."""
    found = hammer(tiny_bundle, make_asks(tiny_bundle, 24, seed=0), seconds=2.0, threads=8, warm_up_s=0.5)
    assert found["answers"] > 40
    assert found["different"] == []
    assert set(found["answers_by_kind"]) >= {"greedy", "beams", "drawn", "streamed", "refused"}
    assert min(found["answers_by_kind"].values()) > 0
    assert found["resident_bytes"], "memory is looked at"


def test_the_hammer_sees_a_wrong_answer(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = BatchedPipeline.answer

    def sometimes_wrong(pipeline, requests, **settings):
        return answer(pipeline, [Request(BLUISH, request.question) for request in requests], **settings)

    monkeypatch.setattr(BatchedPipeline, "answer", sometimes_wrong)
    found = hammer(tiny_bundle, make_asks(tiny_bundle, 24, seed=0), seconds=0.5, threads=2, warm_up_s=0.1)
    assert found["different"]
