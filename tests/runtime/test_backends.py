"""One contract for every backend that is installed here."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime.backends import Device, available_backends, cores
from runtime.bundle import read_bundle
from runtime.errors import BackendUnavailable, BundleError, InputError

SIZES = {"B": 2, "S": 3, "P": 4, "P+S": 7, "T": 5}


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return read_bundle(tiny_bundle)


def test_onnxruntime_is_present():
    assert "ort" in available_backends()


@pytest.mark.parametrize("graph", ["vision", "qformer", "embed", "language"])
@pytest.mark.parametrize("backend", ["ort"])  # trt: tests/runtime/trt, which stands in for the GPU
@pytest.mark.parametrize("mapped", [False, True])
def test_a_backend_keeps_the_contract(bundle, backend, graph, mapped):
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
    with pytest.raises(InputError, match="expected one of ort, trt, found 'cuda'"):
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
