"""The judge and the comparison of answers: what they accept, and how they refuse."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.calibration import draw
from export.config import ExportConfig, Tolerance
from export.graphs import Arrays, Graph
from export.judge import Judge
from export.verify import verify
from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.manifest import TensorSpec
from runtime.pipeline import Pipeline
from runtime.progress import Progress
from tests.export.conftest import CONFIG, FP32, QUIET
from trainer.blip2 import Blip2
from trainer.generate import EagerPipeline

LOOSE = Tolerance(max_error=0.5, min_cosine=0.5, differing_answers=1.0)


class FakeEngine:
    """Gives what it is told to."""

    def __init__(self, outputs: Arrays) -> None:
        self._outputs = outputs

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        return {}

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        return {}

    def run(self, feeds: object) -> Arrays:
        return self._outputs

    def close(self) -> None:
        pass

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def requests(model: Blip2, manifests: list[Path]) -> tuple[Request, ...]:
    drawn = draw(model, manifests, calibration_images=0, verification_images=8, seed=5, progress=QUIET)
    return drawn.verification


@pytest.fixture
def eager_embed(graphs: dict[str, Graph]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    feeds = {"input_ids": np.array([[1, 2, 3]])}
    return feeds, graphs["embed"].run_eager(feeds)["inputs_embeds"]


def judged(graphs: dict[str, Graph], output: np.ndarray, feeds: dict[str, np.ndarray]) -> Judge:
    outputs = {"inputs_embeds": TensorSpec(dtype="float32", shape=("batch", "tokens", output.shape[-1]))}
    judge = Judge(graphs["embed"], FakeEngine({"inputs_embeds": output}), outputs, "fp32", LOOSE)
    returned = judge.run(feeds)["inputs_embeds"]
    np.testing.assert_array_equal(returned, graphs["embed"].run_eager(feeds)["inputs_embeds"])
    assert not judge.parities, "the graph's turn comes when it is settled"
    judge.settle()
    return judge


def test_the_judge_measures_and_hands_on_eagers_result(graphs: dict[str, Graph], eager_embed) -> None:
    feeds, expected = eager_embed
    (parity,) = judged(graphs, expected * 0.9, feeds).parities.values()
    assert parity.max_error == pytest.approx(0.1, rel=1e-4)
    assert parity.cosine == pytest.approx(1.0)
    (parity,) = judged(graphs, -expected, feeds).parities.values()
    assert parity.cosine == pytest.approx(-1.0)
    assert not parity.ok


def test_pending_runs_are_settled_before_they_fill_memory(graphs: dict[str, Graph], eager_embed, monkeypatch) -> None:
    feeds, expected = eager_embed
    monkeypatch.setattr("export.judge.LARGEST_PENDING_BYTES", 3 * expected.nbytes)
    outputs = {"inputs_embeds": TensorSpec(dtype="float32", shape=expected.shape)}
    judge = Judge(graphs["embed"], FakeEngine({"inputs_embeds": expected}), outputs, "fp32", LOOSE)
    for _ in range(3):
        judge.run(feeds)
    (parity,) = judge.parities.values()
    assert parity.runs == 3
    judge.settle()
    assert parity.runs == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_from_a_graph_names_graph_and_tensor(value: float, graphs: dict[str, Graph], eager_embed) -> None:
    feeds, expected = eager_embed
    spoilt = expected.copy()
    spoilt[0, 1, 2] = value
    with pytest.raises(
        CheckFailed, match=r"graph 'embed': the fp32 graph gives NaN or infinity in .* of 'inputs_embeds'"
    ):
        judged(graphs, spoilt, feeds)


def test_answers_equal_transformers_generate(bundle_fp32: Bundle, model: Blip2, requests: tuple[Request, ...]) -> None:
    """One batch of unequal prompts, captions beside questions, both with prompts of their own."""
    batch = [*requests[:3], replace(requests[1], prompt="well, {}"), replace(requests[2], prompt="a picture of two")]
    expected = EagerPipeline(model).answer(batch)
    with Pipeline(bundle_fp32, device=Device(threads=1), cache_bytes=0) as pipeline:
        together = [answer.token_ids for answer in pipeline.answer(batch)]
        alone = [pipeline.answer([request])[0].token_ids for request in batch]
    assert together == alone == [answer.token_ids for answer in expected]
    assert len(set(together)) > 2, "a model that always says the same would prove nothing"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_good_bundle_passes_with_room_to_spare(
    precision: str, bundle_fp32: Bundle, bundle_int8: Bundle, model: Blip2, graphs, requests
) -> None:
    bundle = {"fp32": bundle_fp32, "int8": bundle_int8}[precision]
    verdict = verify(bundle, model, graphs, requests, CONFIG, QUIET)
    assert (verdict.captions, verdict.questions, verdict.images) == (8, 8, 8)
    assert {(p.graph, p.case) for p in verdict.parities} == {
        ("vision", "run"),
        ("qformer", "run"),
        ("embed", "run"),
        ("language", "prefill"),
        ("language", "step"),
    }
    worst = max(parity.max_error for parity in verdict.parities)
    assert worst < {"fp32": 2e-5, "int8": 0.2}[precision]
    if precision == "fp32":
        assert verdict.equal_answers == 16
    else:
        assert worst > 1e-3, "INT8 that is exact was not quantised"


def test_a_missed_tolerance_names_the_worst_output(bundle_int8: Bundle, model: Blip2, graphs, requests) -> None:
    strict = ExportConfig(int8=LOOSE.model_copy(update={"max_error": 1e-6}))
    with pytest.raises(CheckFailed, match=r"graph '\w+' \(int8, \w+\): '\w+' is the worst of \d+ outputs"):
        verify(bundle_int8, model, graphs, requests, strict, QUIET)


def test_other_answers_are_refused(bundle_fp32: Bundle, model: Blip2, graphs, requests, monkeypatch) -> None:
    answer = EagerPipeline.answer

    def otherwise(self: EagerPipeline, batch, **settings):
        return [replace(given, token_ids=(*given.token_ids, 7)) for given in answer(self, batch, **settings)]

    monkeypatch.setattr(EagerPipeline, "answer", otherwise)
    with pytest.raises(CheckFailed, match=r"16 of 16 greedy answers differ from eager PyTorch \(0% may\)"):
        verify(bundle_fp32, model, graphs, requests, FP32, QUIET)


def test_a_tokenizer_that_reads_otherwise_is_refused(
    bundle_fp32: Bundle, model: Blip2, graphs, requests, monkeypatch
) -> None:
    monkeypatch.setattr("export.verify.TextTokenizer.encode", lambda self, text: [1, 2])
    with pytest.raises(CheckFailed, match=r"tokenizer.json reads .* as \[1, 2\], transformers as"):
        verify(bundle_fp32, model, graphs, requests, FP32, Progress(quiet=True))
