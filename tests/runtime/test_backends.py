"""One contract for every backend that is installed here."""

import subprocess
import sys
import threading
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtime import cores
from runtime.backends import Device, available_backends, ort_memory
from runtime.backends.ort import OrtEngine
from runtime.bundle import read_bundle
from runtime.errors import BackendUnavailable, BundleError, InputError

SIZES = {"B": 2, "S": 3, "P": 4, "P+S": 7, "T": 5}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


def test_onnxruntime_is_present():
    assert "ort" in available_backends()


@pytest.mark.parametrize("graph", ["vision", "qformer", "embed", "language"])
@pytest.mark.parametrize(("backend", "mapped"), [("ort", False), ("ort", True), ("openvino", False)])
def test_a_backend_keeps_the_contract(bundle, backend, graph, mapped, tmp_path, monkeypatch):
    """trt: tests/runtime/trt, beside a stand-in for the GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entry = bundle.manifest.graphs[graph]
    with Device(backend, threads=1, mapped=mapped).open(bundle, graph) as engine:
        assert engine.inputs() == {name: spec.shape for name, spec in entry.inputs.items()}
        assert engine.outputs() == {name: spec.shape for name, spec in entry.outputs.items()}
        feeds = {
            name: np.ones([SIZES.get(size, size) for size in spec.shape], spec.dtype)
            for name, spec in entry.inputs.items()
        }
        first, second = engine.run(feeds), engine.run({name: 0 * array for name, array in feeds.items()})
    assert list(first) == list(entry.outputs)
    for name, spec in entry.outputs.items():
        assert isinstance(first[name], np.ndarray) and first[name].dtype == spec.dtype
        assert first[name].shape == tuple(SIZES.get(size, size) for size in spec.shape)
        assert not np.shares_memory(first[name], second[name])


@pytest.fixture(params=["host", "device"])
def language(request, bundle, monkeypatch):
    """The language graph; "device" has memory that onnxruntime gives, as on a GPU, here in the host's."""
    with Device(threads=1).open(bundle, "language") as engine:
        if request.param == "device":
            memory = partial(ort_memory.OrtDeviceBuffer, onnxruntime, "cpu")
            monkeypatch.setattr(engine, "buffer", memory)
        yield engine


def language_feeds(engine, past, seed=0):
    """Two rows, one position."""
    rng = np.random.default_rng(seed)
    sizes = {"B": 2, "S": 1, "P": past, "P+S": past + 1}
    shapes = {name: [sizes.get(size, size) for size in shape] for name, shape in engine.inputs().items()}
    feeds = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return feeds | {"attention_mask": np.ones(shapes["attention_mask"], np.int64)}


def in_buffers(engine, feeds):
    """The cached ones of these feeds in views, and views for what comes of them."""
    past = {name: array for name, array in feeds.items() if name.startswith("past_")}
    read, written = {}, {}
    for name, array in past.items():
        read[name] = engine.buffer(array.size, "float32").view(array.shape)
        read[name].assign(array)
        batch, heads, positions, width = array.shape
        longer = (batch, heads, positions + 1, width)
        written[name.replace("past", "present")] = engine.buffer(1000, "float32").view(longer)
    return feeds | read, written


@pytest.mark.parametrize("past", [0, 4])
def test_views_give_the_numbers_that_arrays_give(language, past):
    feeds = language_feeds(language, past)
    expected = language.run(feeds)
    held, into = in_buffers(language, feeds)
    for _ in range(2):  # nothing that was read is written
        outputs = language.run(held, into)
        assert set(outputs) == {"logits"}
        assert outputs["logits"].tobytes() == expected["logits"].tobytes()
        for name, view in into.items():
            assert view.numpy().tobytes() == expected[name].tobytes()
    assert set(language.run(held)) == set(expected), "views are read also where nothing is written to one"


def test_a_buffer_is_the_same_memory_in_every_view(language):
    buffer = language.buffer(24, "float32")
    rows, flat = buffer.view((4, 3)), buffer.view((24,))
    assert (rows.shape, rows.dtype) == ((4, 3), "float32")
    flat.assign(np.arange(24, dtype=np.float32))
    assert rows.numpy().tolist() == np.arange(12).reshape(4, 3).tolist()
    rows.assign(np.arange(100, 112).reshape(4, 3))
    assert flat.numpy().tolist() == [*range(100, 112), *range(12, 24)], "what lies behind a view is left alone"
    rows.move([(3, 0), (0, 1), (1, 3)])
    assert rows.numpy()[:, 0].tolist() == [103, 100, 106, 100]
    assert flat.numpy()[12:].tolist() == list(range(12, 24))
    with pytest.raises(ValueError, match=r"a view of shape \(5, 5\) has 25 elements, its buffer 24"):
        buffer.view((5, 5))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) was written to a view of shape \(4, 3\)"):
        rows.assign(np.zeros((3, 4), np.float32))


def test_host_memory_is_not_copied(bundle):
    with Device(threads=1).open(bundle, "language") as engine:
        buffer = engine.buffer(10, "float32")
        first, second = buffer.view((2, 5)).numpy(), buffer.view((10,)).numpy()
    assert np.shares_memory(first, second) and first.ctypes.data % 64 == 0


def test_threads_share_an_engine_each_with_its_own_views(bundle):
    wrong, sure = [], threading.Barrier(4)
    with Device(threads=1).open(bundle, "language") as engine:

        def work(seed):
            feeds = language_feeds(engine, 4, seed)
            expected = engine.run(feeds)
            held, into = in_buffers(engine, feeds)
            sure.wait()
            for _ in range(50):
                outputs = engine.run(held, into) | {name: view.numpy() for name, view in into.items()}
                if any(outputs[name].tobytes() != array.tobytes() for name, array in expected.items()):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_half_precision_buffers(tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    with OrtEngine(tmp_path / "g.onnx", threads=1) as engine:
        x, y = (engine.buffer(6, "float16").view((2, 3)) for _ in range(2))
        x.assign(np.arange(6, dtype=np.float32).reshape(2, 3))
        assert engine.run({"x": x}, {"y": y}) == {}
        assert y.dtype == "float16" and y.numpy().tolist() == [[-0.0, -1, -2], [-3, -4, -5]]


MEASURED = """
import sys
from pathlib import Path
import numpy as np
from runtime.backends.ort import OrtEngine

def anonymous_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before = anonymous_kb()
engine = OrtEngine(Path(sys.argv[1]), threads=1, mapped=sys.argv[2] == "mapped")
engine.run({"x": np.ones((1, 4096), np.float32)})
print(anonymous_kb() - before)
"""


def test_mapped_weights_stay_in_their_file(tmp_path):
    weights = helper.make_tensor(
        "w", TensorProto.FLOAT, [4096, 4096], np.ones((4096, 4096), np.float32).tobytes(), True
    )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4096]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights])
    file = tmp_path / "g.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(file), save_as_external_data=True, location="g.onnx.data")

    def grown_kb(how):
        command = [sys.executable, "-c", MEASURED, str(file), how]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    assert grown_kb("packed") > 65_536
    assert grown_kb("mapped") < 65_536 / 2


def test_refusals(bundle):
    with pytest.raises(InputError, match="expected one of ort, openvino, trt, found 'cuda'"):
        Device("cuda").open(bundle, "vision")
    with pytest.raises(InputError, match="threads: expected at least 1, found 0"):
        Device(threads=0).open(bundle, "vision")
    with pytest.raises(BundleError, match="expected a graph 'text'"):
        Device().open(bundle, "text")
    for changed, option in (
        ({"provider": "cuda"}, "provider"),
        ({"threads": 2}, "threads"),
        ({"mapped": True}, "mapped"),
    ):
        with pytest.raises(
            InputError, match=f"{option}: backend 'trt' has none, it runs plans on the GPU; leave it out"
        ):
            Device("trt", **changed).open(bundle, "vision")
    with pytest.raises(BundleError, match="expected a graph 'text'"):
        Device("trt").open(bundle, "text")


def test_without_onnxruntime_the_extra_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "ort" not in available_backends()
    with pytest.raises(BackendUnavailable, match=r"pip install 'qforge\[cpu\]'"):
        Device().open(bundle, "vision")


def test_hyper_threads_and_quotas(tmp_path, monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        (tmp_path / f"cpu{cpu}").write_text(siblings + "\n")
    monkeypatch.setattr(cores, "TOPOLOGY", str(tmp_path / "cpu{}"))
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    assert cores.physical_cores() == 2
    for quota, expected in (("max 100000", 2), ("150000 100000", 2), ("100000 100000", 1), ("20000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert cores.physical_cores() == expected
    monkeypatch.setattr(cores, "TOPOLOGY", str(tmp_path / "none{}"))
    (tmp_path / "cpu.max").write_text("max 100000")
    assert cores.physical_cores() == 4
