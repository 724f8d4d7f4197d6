"""The fastest way that holds is kept, measured in turn with all others, and believed only where it was measured."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime import tune as tuning
from runtime.backends import Device
from runtime.bundle import Bundle, read_bundle
from runtime.dataset import Row
from runtime.errors import DataError, InputError
from runtime.pipeline import Pipeline
from runtime.progress import Progress
from runtime.tune import Recorded, Rows, devices_here, recorded_of, tune
from runtime.tuned import TUNED, read_tuned

QUIET = Progress(quiet=True)
ONE, TWO = Device(threads=1), Device(threads=2)


@pytest.fixture
def bundle(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> Bundle:
    return read_bundle(make_tiny_bundle(tmp_path / "right"))


@pytest.fixture
def wrong(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> Bundle:
    """Its Q-Former takes red for blue and blue for red."""
    path = make_tiny_bundle(tmp_path / "wrong")
    model = onnx.load(path / "onnx" / "qformer.onnx")
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "colours")
    table.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(table)[::-1]), "colours"))
    onnx.save(model, path / "onnx" / "qformer.onnx")
    return read_bundle(path, check_hashes=False)


class Slowed:
    """Recorded requests; some ways of running take longer. Notes who was asked."""

    metric, items = "equal", 6

    def __init__(self, bundle: Bundle, slow: Callable[[Pipeline], bool]) -> None:
        self.recorded, self.slow = recorded_of(bundle, 2), slow
        self.asked: list[tuple[str, int]] = []

    def ask(self, pipeline: Pipeline, item: int) -> float:
        self.asked.append((pipeline.bundle.path.name, item))
        time.sleep(0.03 if self.slow(pipeline) else 0.0)
        return self.recorded.ask(pipeline, item)


def test_the_fastest_is_kept_if_it_holds(bundle: Bundle, wrong: Bundle) -> None:
    workload = Slowed(bundle, slow=lambda pipeline: pipeline.bundle is bundle)
    results = tune([bundle, wrong], workload, max_drop=10, devices=[ONE], progress=QUIET)
    assert list(results) == [bundle.path] and not (wrong.path / TUNED).exists()
    right, other = results[bundle.path].measured
    assert right.held and right.accuracy == 1.0 and right.ms is not None and right.ms >= 30
    assert not other.held and other.accuracy == 0.5 and other.ms is not None and other.ms < 30
    allowed = tune([bundle, wrong], workload, max_drop=70, devices=[ONE], progress=QUIET)
    assert allowed[wrong.path].choice.held and allowed[wrong.path].reference.bundle == "right"


def test_the_faster_device_is_chosen_and_read_again(bundle: Bundle) -> None:
    opened = list[Pipeline]()

    def second_opened(pipeline: Pipeline) -> bool:
        if pipeline not in opened:
            opened.append(pipeline)
        return pipeline is opened[0]

    results = tune([bundle], Slowed(bundle, second_opened), max_drop=0, devices=[ONE, TWO], progress=QUIET)
    assert results[bundle.path].choice.threads == 2
    found = read_tuned(bundle.path)
    assert found.device == Device("ort", "cpu", 2)
    assert found.note == f"{bundle.path}: as tuned, backend ort, provider cpu, 2 threads"
    assert read_bundle(bundle.path).manifest.digest == bundle.manifest.digest


def test_requests_are_asked_in_turn(bundle: Bundle, wrong: Bundle) -> None:
    workload = Slowed(bundle, slow=lambda pipeline: False)
    tune([bundle, wrong], workload, max_drop=0, devices=[ONE], progress=QUIET)
    warm, measured = workload.asked[:4], workload.asked[4:]
    assert {item for _, item in warm} == {0, 1}
    assert measured[:4] == [("right", 0), ("wrong", 0), ("wrong", 1), ("right", 1)]
    assert [item for _, item in measured] == [item for item in range(6) for _ in range(2)]


def test_what_cannot_run_is_told_and_passed_over(bundle: Bundle) -> None:
    devices = [Device(provider="cuda"), ONE]
    results = tune([bundle], recorded_of(bundle, 1), max_drop=0, devices=devices, progress=QUIET)
    cuda, cpu = results[bundle.path].measured
    assert cuda.ms is None and not cuda.held and "needs an onnxruntime with CUDAExecutionProvider" in str(cuda.why)
    assert cpu.held and cpu.why is None
    with pytest.raises(InputError, match=r"nothing here runs it: provider 'cuda' needs"):
        tune([bundle], recorded_of(bundle, 1), max_drop=0, devices=devices[:1], progress=QUIET)


def test_bad_settings(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="--max-drop: expected at least 0 points, found -1"):
        tune([bundle], recorded_of(bundle, 1), max_drop=-1, progress=QUIET)
    chain = recorded_of(bundle, 1)
    chain.items = 2
    with pytest.raises(InputError, match="expected at least 3 rows to measure on, found 2"):
        tune([bundle], chain, max_drop=1, progress=QUIET)


def test_every_way_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "physical_cores", lambda: 6)
    monkeypatch.setattr(tuning, "providers_here", lambda: ("cpu", "openvino"))
    monkeypatch.setattr(tuning, "available_backends", lambda: ("ort", "trt"))
    by_cpu = [Device("ort", "cpu", threads) for threads in (1, 2, 4, 6)]
    assert devices_here() == [*by_cpu, Device("ort", "openvino"), Device("trt")]


def test_rows_are_scored_as_everywhere(bundle: Bundle, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    rows = [Row(tmp_path / "red.png", "1", (), "colour", (answer,), {}) for answer in ("a red", "a blue", "a red")]
    workload = Rows(rows, "vqa", limit=2)
    with Pipeline(bundle, device=ONE, cache_bytes=0) as pipeline:
        assert (workload.items, workload.metric) == (2, "accuracy")
        assert workload.ask(pipeline, 0) > 0.0 == workload.ask(pipeline, 1)
    with pytest.raises(DataError, match="expected rows with captions"):
        Rows(rows, "caption")
    assert Recorded.metric == "tokens equal to PyTorch's"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": {"cpu": "another"}}, "measured on another machine .cpu another; here: cpu "),
        ({"bundle_digest": "0"}, "measured on another bundle; run qforge tune again"),
        ({"format": 2}, "not what qforge tune writes"),
        ({"choice": None}, "not what qforge tune writes"),
    ],
)
def test_a_choice_that_does_not_hold_here_is_left_aside(change: dict, words: str, bundle: Bundle) -> None:
    import re

    tune([bundle], recorded_of(bundle, 1), max_drop=0, devices=[ONE], progress=QUIET)
    file = bundle.path / TUNED
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    found = read_tuned(bundle.path)
    assert found.device is None and re.search(words, str(found.note))


def test_no_choice_is_no_news(bundle: Bundle, tmp_path: Path) -> None:
    for path in (bundle.path, tmp_path / "nowhere"):
        assert read_tuned(path).device is None and read_tuned(path).note is None
