"""Fair turns, every sample kept, phases counted rightly."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.config import BenchConfig
from benchmarks.latency import Samples, batches_of, further_tokens, measure, summarise, time_tasks
from runtime.answers import Answer, Request
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from runtime.progress import Progress
from tests.benchmarks.stand_ins import Parrot, contestant, question_row

QUIET = Progress(quiet=True)


def said(*lengths: int) -> list[Answer]:
    timings_ms = {"preprocess": 1.0, "vision": 2.0, "qformer": 3.0, "prefill": 4.0, "decode": 6.0, "total": 16.0}
    return [Answer(None, None, "", tuple(range(length)), timings_ms) for length in lengths]


def run(names: Sequence[str], batches: int, warmup: int) -> tuple[list[str], dict[str, Samples]]:
    calls: list[str] = []
    pipelines = {name: Parrot(name, calls=calls) for name in names}
    requests = [[Request("red.png")] for _ in range(batches)]
    with QUIET.bar("", batches) as bar:
        samples = measure(pipelines, requests, warmup=warmup, max_new_tokens=8, bar=bar)
    return calls, samples


def test_pipelines_take_turns_and_the_first_one_rotates() -> None:
    calls, _ = run(["eager", "a", "b"], batches=4, warmup=0)
    assert calls[::2] == calls[1::2], "each timed call follows one of the same pipeline"
    assert calls[1::2] == ["eager", "a", "b", "a", "b", "eager", "b", "eager", "a", "eager", "a", "b"]


def test_what_is_timed_is_not_what_was_just_answered() -> None:
    """Else the query cache, or the processor's, would know the answer."""
    asked: list[str] = []

    class Listening(Parrot):
        def answer(
            self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
        ) -> list[Answer]:
            asked.append(str(requests[0].image))
            return super().answer(requests, max_new_tokens=max_new_tokens)

    batches = [[Request(f"{colour}.png")] for colour in ("red", "green", "blue")]
    with QUIET.bar("", 3) as bar:
        measure({"eager": Listening()}, batches, warmup=0, max_new_tokens=8, bar=bar)
    assert asked == ["blue.png", "red.png", "red.png", "green.png", "green.png", "blue.png"]


def test_warm_up_is_not_sampled_and_every_other_call_is() -> None:
    calls, samples = run(["eager", "a"], batches=5, warmup=3)
    assert len(calls) == 2 * (3 + 2 * 5)
    for one in samples.values():
        assert {len(values) for values in one.phases_ms.values()} == {5}
        assert len(one.further_tokens) == 5


def test_the_total_is_our_clock_not_the_pipelines() -> None:
    class Slow(Parrot):
        def answer(
            self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
        ) -> list[Answer]:
            time.sleep(0.03)
            return super().answer(requests, max_new_tokens=max_new_tokens)

    with QUIET.bar("", 1) as bar:
        samples = measure({"eager": Slow()}, [[Request("red.png")]], warmup=0, max_new_tokens=8, bar=bar)
    assert samples["eager"].phases_ms["total"][0] >= 30.0, "the parrot itself claims 10 ms"
    assert samples["eager"].phases_ms["vision"] == [2.0], "phases are the pipeline's own"


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [((0,), 0), ((1,), 1), ((3,), 3), ((8,), 7), ((2, 5, 1), 5)],
    ids=["ended at once", "a token and the end", "the end is a step", "cut at the limit of 8", "the longest row"],
)
def test_further_tokens(lengths: tuple[int, ...], steps: int) -> None:
    assert further_tokens(said(*lengths), max_new_tokens=8) == steps


def test_time_per_token_leaves_out_answers_that_ended_at_once() -> None:
    samples = Samples()
    for length in (3, 0, 2):
        samples.add(said(length), 20.0, max_new_tokens=8)
    assert samples.per_token_ms() == [2.0, 3.0]
    found = summarise({"eager": samples}, seed=0)["eager"]
    phases_ms = {"preprocess": 1.0, "vision": 2.0, "qformer": 3.0, "prefill": 4.0, "decode": 6.0}
    assert found["p50_ms"] == {**phases_ms, "total": 20.0, "per_token": 2.5}
    assert found["time_over_eager"] is None


def test_answers_without_a_further_token_have_no_time_per_token() -> None:
    samples = Samples()
    samples.add(said(0), 20.0, max_new_tokens=8)
    assert "per_token" not in summarise({"eager": samples}, seed=0)["eager"]["p50_ms"]


def test_ratio_is_against_eager() -> None:
    eager, ours = Samples(), Samples()
    for total_ms in (10.0, 20.0, 30.0):
        eager.add(said(1), total_ms, max_new_tokens=8)
        ours.add(said(1), total_ms / 4, max_new_tokens=8)
    found = summarise({"eager": eager, "bundle": ours}, seed=0)["bundle"]["time_over_eager"]
    assert found == pytest.approx({"value": 0.25, "low": 0.25, "high": 0.25})


def test_batches_come_round_again_when_rows_are_few() -> None:
    rows = [question_row(Path(f"{number}.png"), "what?", "red") for number in range(3)]
    batches = batches_of(rows, "vqa", size=2, calls=2)
    assert [[request.image for request in batch] for batch in batches] == [
        [Path("0.png"), Path("1.png")],
        [Path("2.png"), Path("0.png")],
    ]
    assert batches[0][0].question == "what?"
    assert batches_of(rows, "caption", size=1, calls=1)[0][0].question is None


def test_every_size_without_cache_and_the_smallest_with() -> None:
    opened: list[bool] = []
    contestants = [contestant("eager", Parrot(), opened), contestant("bundle", Parrot())]
    rows = [question_row(Path("red.png"), "what?", "red")]
    config = BenchConfig(batch_sizes=(4, 1), latency_calls=3, warmup=1)
    timed = time_tasks(contestants, {"vqa": rows}, config, 8, QUIET)
    assert [(case["batch"], case["cache"]) for case in timed] == [(1, "off"), (4, "off"), (1, "hit")]
    assert opened == [False, True]
    assert all(case["calls"] == 3 for case in timed)


def test_a_real_cache_hits_on_every_look_up(tmp_path: Path) -> None:
    """With the tiny bundle of the runtime's tests: after one pass over the items nothing is computed again."""
    from benchmarks.contestants import _of_bundle
    from runtime.backends import Device
    from runtime.bundle import read_bundle
    from tests.benchmarks.stand_ins import colour_images
    from tests.runtime.conftest import write_tiny_bundle

    bundle = _of_bundle(read_bundle(write_tiny_bundle(tmp_path / "tiny")), "tiny", Device(threads=1))
    rows = [question_row(image, "colour", "red") for image in colour_images(tmp_path)[:3]]
    config = BenchConfig(batch_sizes=(1,), latency_calls=3, warmup=1)
    off, hit = time_tasks([contestant("eager", Parrot()), bundle], {"vqa": rows}, config, 5, QUIET)
    assert min(off["pipelines"]["tiny"]["samples_ms"]["vision"]) > 0
    assert hit["pipelines"]["tiny"]["cache"] == {"hits": 7, "misses": 0}, "one warm-up, three calls, one before each"
    assert hit["pipelines"]["tiny"]["samples_ms"]["vision"] == [0.0, 0.0, 0.0]
    assert "cache" not in hit["pipelines"]["eager"]


def test_a_batch_beyond_a_bundle_is_refused(tmp_path: Path) -> None:
    from benchmarks.contestants import _of_bundle, common_token_limit
    from runtime.backends import Device
    from runtime.bundle import read_bundle
    from tests.runtime.conftest import write_tiny_bundle

    contestants = [_of_bundle(read_bundle(write_tiny_bundle(tmp_path / "tiny")), "tiny", Device(threads=1))]
    assert common_token_limit(contestants, BenchConfig(batch_sizes=(1, 3))) == 5
    with pytest.raises(InputError, match=r"bench\.batch_sizes: expected at most 3, the max_batch of tiny, found 4"):
        common_token_limit(contestants, BenchConfig(batch_sizes=(1, 4)))
