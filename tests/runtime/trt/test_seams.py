"""The two seams call what NVIDIA's modules really have; bytes of every type survive the way to the device and back."""

import ast
import inspect
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from runtime.backends.trt import cuda, plan
from runtime.backends.trt.cuda import Cuda, CudaRuntime
from runtime.backends.trt.elements import ITEM_BYTES, bytes_of, packed, unpacked
from runtime.errors import BackendUnavailable, BundleError, InputError
from runtime.gpu import compute_capability_here
from runtime.precision import carried


def attributes_of(module: ModuleType, *owners: str) -> set[str]:
    """Every `owner.name` in the source of a module, chains included: `trt.Logger.ERROR` gives both."""
    found = set[str]()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute):
            owner, _, rest = next(
                ((o, "", ast.unparse(node)[len(o) + 1 :]) for o in owners if ast.unparse(node).startswith(f"{o}.")),
                ("", "", ""),
            )
            if owner:
                found.add(rest)
    return found


def has(thing: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def test_cuda_bindings_have_every_name_that_is_called() -> None:
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install 'qforge[trt]'")
    names = attributes_of(cuda, "self._cudart")
    assert len(names) > 20
    assert [name for name in sorted(names) if not has(cudart, name)] == []
    assert {"name", "uuid", "major", "minor"} <= set(dir(cudart.cudaDeviceProp()))
    assert len(bytes(cudart.cudaDeviceProp().uuid.bytes)) == 16


def test_tensorrt_has_every_name_that_is_called() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which the dev extra installs")
    of = {
        "self._trt": trt,
        "trt": trt,
        "self._engine": trt.ICudaEngine,
        "runtime": trt.Runtime,
        "config": trt.IRuntimeConfig,
        "self._cache": trt.IRuntimeCache,
        "self._context": trt.IExecutionContext,
    }
    for owner, thing in of.items():
        names = attributes_of(plan, owner)
        assert names, owner
        assert [name for name in sorted(names) if not has(thing, name)] == [], owner
    assert hasattr(trt.IExecutionContext, "is_stream_capturable")  # asked for by getattr


def test_the_runtime_is_a_cuda() -> None:
    wanted = {name for name, value in vars(Cuda).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert len(wanted) == 16
    for name in wanted:
        assert inspect.signature(getattr(CudaRuntime, name)) == inspect.signature(getattr(Cuda, name)), name


@pytest.mark.skipif(compute_capability_here() is not None, reason="a GPU is here")
def test_without_a_gpu_cuda_says_so() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install 'qforge[trt]'")
    with pytest.raises(BackendUnavailable, match=r"needs an NVIDIA GPU with its driver: CUDA says: .*--backend ort"):
        CudaRuntime()


def test_a_plan_that_cannot_be_loaded_is_one_sentence(tmp_path: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which the dev extra installs")
    (tmp_path / "vision.plan").write_bytes(b"no plan" * 20)
    with pytest.raises(BundleError, match=r"vision\.plan: tensorrt-rtx 1\.\S+ cannot load this plan: .*; build it"):
        plan.TensorRtPlan(tmp_path / "vision.plan", "tensorrt-rtx", tmp_path / "compiled")


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_type_survives(dtype: str) -> None:
    array = (np.random.default_rng(0).normal(size=(2, 3)) * 4).astype(carried(dtype))
    content = packed(array, dtype, "a tensor")
    assert content.dtype == np.uint8 and content.nbytes == bytes_of((2, 3), dtype)
    found = unpacked(content, (2, 3), dtype)
    assert found.dtype == array.dtype
    np.testing.assert_allclose(found, array, rtol=2**-8 if dtype == "bfloat16" else 0)
    assert not np.shares_memory(found, content)


def test_bfloat16_rounds_as_the_standard_does() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    found = unpacked(packed(values, "bfloat16", "x"), (8,), "bfloat16")
    # a tie goes to the even neighbour; beyond the largest number is infinity
    np.testing.assert_array_equal(found, np.array([1.0, 1.0, 1.015625, -0.0, np.inf, -np.inf, np.nan, np.inf]))


def test_other_types_are_refused() -> None:
    with pytest.raises(InputError, match=r"dtype: expected one of float32, .*, found 'float64'"):
        bytes_of((1,), "float64")
