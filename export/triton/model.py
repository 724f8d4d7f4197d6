"""The step that Triton's Python backend runs: image and question in, text out, the graphs asked for over BLS.

This file is copied into the repository, beside the `runtime` package whose encoder and decode loop it drives; neither
knows that an engine is a call to another model of the same server. A request's rows, and the requests of one call,
are answered as one batch.

    IMAGE [1] encoded bytes, or PIXELS [height, width, 3] uint8; QUESTION [1] and PROMPT [1] text, absent or "" for none
    -> TEXT [1]
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the runtime package that lies beside this file in a repository

from runtime.answers import Request  # noqa: E402
from runtime.backends.host import HostEngine  # noqa: E402
from runtime.bundle import MANIFEST, Bundle  # noqa: E402
from runtime.closing import Closing  # noqa: E402
from runtime.errors import InputError, QforgeError  # noqa: E402
from runtime.manifest import GraphEntry, Manifest  # noqa: E402
from runtime.pipeline import Pipeline  # noqa: E402

REFUSALS = (QforgeError, UnicodeDecodeError, pb_utils.TritonModelException)
"""What a request can be to blame for, or the server; it is told in the response."""


class ServedGraph(Closing, HostEngine):
    """A graph that the server holds; satisfies `runtime.backends.Engine`."""

    def __init__(self, model_name: str, entry: GraphEntry) -> None:
        self._model_name, self._entry = model_name, entry

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every input; a varying size is a name."""
        return {name: spec.shape for name, spec in self._entry.inputs.items()}

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name → shape of every output; a varying size is a name."""
        return {name: spec.shape for name, spec in self._entry.outputs.items()}

    def compute(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """All outputs for all inputs; TritonModelException with the server's words when it could not."""
        names = list(self._entry.outputs)
        response = pb_utils.InferenceRequest(
            model_name=self._model_name,
            requested_output_names=names,
            inputs=[pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in feeds.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{self._model_name}: {response.error().message()}")
        found = {name: pb_utils.get_output_tensor_by_name(response, name) for name in names}
        return {name: np.array(tensor.as_numpy()) for name, tensor in found.items()}  # ours beyond the response

    def close(self) -> None:
        """Nothing: the server holds the graph."""


class Server:
    """Opens the graphs of a bundle as models of this server, named after the chaining one."""

    in_place = False
    """See `runtime.backends.Opener`."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def open(self, bundle: Bundle, graph_name: str) -> ServedGraph:
        """`vision` of the model `qforge` is the model `qforge_vision`."""
        return ServedGraph(f"{self._model_name}_{graph_name}", bundle.manifest.graphs[graph_name])


class TritonPythonModel:
    """What the Python backend looks for in this file."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the bundle's settings and tokenizers; the graphs are the server's."""
        settings = HERE / "bundle"
        manifest = Manifest.model_validate_json((settings / MANIFEST).read_bytes())
        parameters = json.loads(args["model_config"])["parameters"]
        self._pipeline = Pipeline(
            Bundle(settings, manifest),
            device=Server(args["model_name"]),
            cache_bytes=int(parameters["cache_bytes"]["string_value"]),
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order; one that cannot be answered does not cost the others their answer."""
        try:
            asked = [_rows(request) for request in requests]
            texts = self._answer([row for rows in asked for row in rows])
        except REFUSALS:
            return [self._alone(request) for request in requests]
        responses = []
        for rows in asked:
            responses.append(_response(texts[: len(rows)]))
            texts = texts[len(rows) :]
        return responses

    def finalize(self) -> None:
        """Free what is held."""
        self._pipeline.close()

    def _alone(self, request: Any) -> Any:
        try:
            return _response(self._answer(_rows(request)))
        except REFUSALS as error:
            return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(str(error)))

    def _answer(self, rows: Sequence[Request]) -> list[str]:
        return [answer.text for answer in self._pipeline.answer(rows)]


def _rows(request: Any) -> list[Request]:
    """What one request asks, row by row; InputError when it has no image, or two."""
    pixels_BHWC, files = _array(request, "PIXELS"), _values(request, "IMAGE")
    if (pixels_BHWC is None) == (not files):
        raise InputError("expected either IMAGE or PIXELS, found " + ("both" if files else "neither"))
    images = files if pixels_BHWC is None else list(pixels_BHWC)
    questions, prompts = (_values(request, name) or [b""] * len(images) for name in ("QUESTION", "PROMPT"))
    return [
        Request(image, question.decode("utf-8") or None, prompt.decode("utf-8") or None)
        for image, question, prompt in zip(images, questions, prompts, strict=True)
    ]


def _array(request: Any, name: str) -> npt.NDArray[Any] | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else np.array(tensor.as_numpy())


def _values(request: Any, name: str) -> list[bytes]:
    """The bytes of each row of a [batch, 1] text tensor; none when the request has no such tensor."""
    array = _array(request, name)
    return [] if array is None else [bytes(value) for value in array.reshape(-1)]


def _response(texts: Sequence[str]) -> Any:
    values = np.array([[text.encode("utf-8")] for text in texts], dtype=np.object_)
    return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("TEXT", values)])
