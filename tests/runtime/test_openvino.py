"""Backend openvino: what looks at an image runs in OpenVINO, the language model in ONNX Runtime, with one answer."""

import threading

import numpy as np
import pytest

from runtime.backends import Device
from runtime.backends.openvino import OpenVinoEngine
from runtime.backends.ort import OrtEngine
from runtime.bundle import read_bundle
from runtime.errors import BackendUnavailable, BundleError, InputError
from runtime.pipeline import Pipeline


@pytest.fixture(scope="module", autouse=True)
def cache_of_this_test(tmp_path_factory):
    """What is compiled and checked is remembered in the user's cache; a test has one of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


@pytest.mark.parametrize("graph", ["vision", "qformer"])
def test_its_numbers_are_those_of_onnxruntime(bundle, graph):
    rng = np.random.default_rng(0)
    spec = bundle.manifest.graphs[graph]
    with Device("openvino", threads=1).open(bundle, graph) as ours, Device(threads=1).open(bundle, graph) as theirs:
        assert isinstance(ours, OpenVinoEngine)
        for rows in (1, 3, 2):  # shapes vary from call to call
            shapes = {n: [rows, *(5 if isinstance(s, str) else s for s in t.shape[1:])] for n, t in spec.inputs.items()}
            feeds = {name: rng.normal(size=shape).astype(spec.inputs[name].dtype) for name, shape in shapes.items()}
            found, expected = ours.run(feeds), theirs.run(feeds)
            for name in spec.outputs:
                np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_the_language_model_stays_with_onnxruntime(bundle):
    with Device("openvino", threads=1).open(bundle, "language") as engine:
        assert isinstance(engine, OrtEngine)


def test_answers_are_those_of_backend_ort(bundle):
    pictures = [np.full((40, 30, 3), value, np.uint8) for value in (0, 90, 250)]
    with (
        Pipeline(bundle, device=Device("openvino", threads=1), cache_bytes=0) as ours,
        Pipeline(bundle, device=Device(threads=1), cache_bytes=0) as theirs,
    ):
        assert [a.token_ids for a in ours.caption(pictures)] == [a.token_ids for a in theirs.caption(pictures)]


def test_threads_share_an_engine(bundle):
    spec = bundle.manifest.graphs["vision"].inputs["pixels"]
    pixels = [np.full((1, *spec.shape[1:]), value, np.float32) for value in range(8)]
    with Device("openvino", threads=1).open(bundle, "vision") as engine:
        alone = [engine.run({"pixels": one})["image_embeds"] for one in pixels]
        together: dict[int, list[np.ndarray]] = {}

        def ask(number):
            together[number] = [engine.run({"pixels": pixels[number]})["image_embeds"] for _ in range(10)]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, found in together.items():
        assert all(np.array_equal(one, alone[number]) for one in found)


def test_what_was_compiled_is_found_again(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        Device("openvino", threads=1).open(bundle, "vision").close()
        kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "qforge" / "openvino").iterdir()}
        assert kept, "OpenVINO keeps what it compiled"
    assert list((tmp_path / "qforge" / "checked").iterdir()), "the first use is checked against the recording"


def test_refusals(bundle, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="backend 'openvino' computes on the CPU and has neither"):
        Device("openvino", provider="cuda").open(bundle, "vision")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"broken.onnx: openvino [\d.]+\S* cannot compile it"):
        OpenVinoEngine(broken, bundle.manifest.graphs["vision"])
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(BackendUnavailable, match=r"backend 'openvino' needs 'openvino'.*qforge\[openvino\]"):
        Device("openvino").open(bundle, "vision")
