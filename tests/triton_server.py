"""A stand-in for Triton: it serves a model repository with onnxruntime and loads the Python step as its backend does.

`module` is what the step imports as `triton_python_backend_utils`; requests over BLS run the ONNX files of the
repository, and are refused when a tensor does not fit the model's config.pbtxt.
"""

import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime

NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64}
TENSOR = re.compile(r'name: "(\w+)" data_type: (\w+) dims: \[ ([-\d, ]*) \]( optional: true)?')


@dataclass
class Config:
    """What a config.pbtxt says."""

    text: str
    max_batch: int
    inputs: dict[str, tuple[str, list[int]]]
    outputs: dict[str, tuple[str, list[int]]]

    @property
    def dynamic(self) -> bool:
        return "dynamic_batching" in self.text


def read_config(model: Path) -> Config:
    text = (model / "config.pbtxt").read_text()
    assert re.search(rf'^name: "{model.name}"$', text, re.MULTILINE)
    assert text.count("{") == text.count("}") and text.count("[") == text.count("]")
    parts = {}
    for kind in ("input", "output"):
        block = re.search(rf"^{kind} \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        assert block is not None, text
        found = TENSOR.findall(block.group(1))
        assert len(found) == block.group(1).count("name:")
        parts[kind] = {name: (kind_, [int(size) for size in dims.split(",")]) for name, kind_, dims, _ in found}
    batch = re.search(r"^max_batch_size: (\d+)$", text, re.MULTILINE)
    assert batch is not None
    return Config(text, int(batch.group(1)), parts["input"], parts["output"])


class TritonModelException(Exception):
    """As Triton's."""


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


@dataclass
class Server:
    """Serves the ONNX models below `repository`."""

    repository: Path
    runs: list[tuple[str, int]] = field(default_factory=list)
    """(model, rows) of every request over BLS."""
    fails: set[str] = field(default_factory=set)
    """Models that answer with an error."""

    def __post_init__(self) -> None:
        self._sessions: dict[str, Any] = {}
        self.module = ModuleType("triton_python_backend_utils")
        server = self

        class InferenceRequest:
            def __init__(self, *, model_name: str, requested_output_names: list[str], inputs: list[Tensor], **_: Any):
                self.model, self.names, self.inputs = model_name, requested_output_names, inputs

            def exec(self) -> InferenceResponse:
                return server.run(self.model, self.names, {tensor.name(): tensor.as_numpy() for tensor in self.inputs})

        def by_name(holder: Any, name: str) -> Tensor | None:
            return next((tensor for tensor in holder.tensors if tensor.name() == name), None)

        for name, value in {
            "Tensor": Tensor,
            "InferenceRequest": InferenceRequest,
            "InferenceResponse": InferenceResponse,
            "TritonError": TritonError,
            "TritonModelException": TritonModelException,
            "PreferredMemory": lambda kind, device: (kind, device),
            "TRITONSERVER_MEMORY_CPU": 0,
            "get_input_tensor_by_name": by_name,
            "get_output_tensor_by_name": by_name,
        }.items():
            setattr(self.module, name, value)

    def run(self, model: str, names: list[str], feeds: dict[str, Any]) -> InferenceResponse:
        config = read_config(self.repository / model)
        assert set(feeds) == set(config.inputs)
        for name, array in feeds.items():
            kind, dims = config.inputs[name]
            sizes = array.shape[1:] if config.max_batch else array.shape
            assert array.dtype == NUMPY[kind], name
            assert len(sizes) == len(dims) and all(want in (-1, got) for want, got in zip(dims, sizes, strict=True))
            assert not config.max_batch or len(array) <= config.max_batch
        self.runs.append((model, len(next(iter(feeds.values())))))
        if model in self.fails:
            return InferenceResponse([], TritonError("out of memory"))
        if model not in self._sessions:
            self._sessions[model] = onnxruntime.InferenceSession(str(self.repository / model / "1/model.onnx"))
        arrays = self._sessions[model].run(names, feeds)
        return InferenceResponse([Tensor(name, array) for name, array in zip(names, arrays, strict=True)])

    def load(self, name: str = "qforge") -> Any:
        """The step's TritonPythonModel, initialised as the Python backend does it."""
        file, path = self.repository / name / "1/model.py", list(sys.path)
        cache = re.search(r'key: "cache_bytes" value: { string_value: "(\d+)" }', read_config(file.parents[1]).text)
        assert cache is not None
        sys.modules[self.module.__name__] = self.module
        try:
            spec = importlib.util.spec_from_file_location("model_under_test", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = path
            del sys.modules[self.module.__name__]
        model = module.TritonPythonModel()
        parameters = {"cache_bytes": {"string_value": cache.group(1)}}
        model.initialize({"model_name": name, "model_config": json.dumps({"parameters": parameters})})
        return model


class Asked:
    """A request to the step: rows of images, with or without questions."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = [Tensor(name, array) for name, array in tensors.items()]


def texts(values: list[str | bytes]) -> Any:
    """A [batch, 1] text tensor."""
    coded = [value.encode() if isinstance(value, str) else value for value in values]
    return np.array([[value] for value in coded], dtype=np.object_)


def said(response: InferenceResponse) -> list[str]:
    """The texts of a response that is no error."""
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    return [value.decode() for value in response.tensors[0].as_numpy().reshape(-1)]
