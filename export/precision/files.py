"""ONNX graphs on disk: structure without weights, weights one at a time, and one way to write both.

A graph of several GB is never in memory whole: its structure is read alone, each weight is read, changed and written
behind the last. Node names are the same before and after, so that a report can name a node of the traced graph.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from export import trace
from export.trace import DATA_SUFFIX, check
from runtime.errors import CheckFailed

ALIGNMENT = 4096
"""Bytes that each weight in a data file starts at a multiple of, so that a runtime can map it."""


def read_structure(file: Path) -> onnx.ModelProto:
    """The graph; weights that lie beside it stay there. Every node has a name afterwards."""
    model = onnx.load(str(file), load_external_data=False)
    for place, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{place}"
    return model


def array_of(tensor: TensorProto, folder: Path) -> npt.NDArray[Any]:
    """A weight, read from the file beside the graph where it lies there."""
    return numpy_helper.to_array(tensor, base_dir=str(folder))


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's number of the element type of every tensor in the graph.

    Raises:
        CheckFailed: a tensor whose type shape inference cannot tell.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    present = {tensor.name for tensor in (*model.graph.initializer, *model.graph.input)}
    for node in model.graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise CheckFailed(f"'{name}' of node {node.name} ({node.op_type}): ONNX cannot tell its type")
            present.add(name)
    return {name: kind for name, kind in types.items() if name in present}  # notes outlive what they were about


def require_opset(model: onnx.ModelProto, least: int) -> None:
    """Raise the standard operators to `least`; none that qforge traces changed its meaning between opsets 20 and 23."""
    for opset in model.opset_import:
        if opset.domain == "" and opset.version < least:
            opset.version = least
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import))


def lift_constants(model: onnx.ModelProto) -> None:
    """Constant nodes with a tensor become initialisers: one kind of constant is enough to look at."""
    nodes = list[onnx.NodeProto]()
    for node in model.graph.node:
        value = next((a for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(value.t)
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class Weights:
    """Where the weights of a graph that is being rewritten go: beside it when they lay there before, else into it."""

    def __init__(self, file: Path, large: bool) -> None:
        self._data = file.with_name(file.name + DATA_SUFFIX)
        self._new = self._data.with_name(self._data.name + ".new")
        self._file: BinaryIO | None = self._new.open("wb") if large else None

    def tensor(self, array: npt.NDArray[Any], name: str) -> TensorProto:
        """The initialiser of that name; its bytes are on the disk already when this returns."""
        tensor = numpy_helper.from_array(array, name)
        if self._file is not None and array.nbytes >= ALIGNMENT:
            offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
            self._file.seek(offset)
            self._file.write(tensor.raw_data)
            set_external_data(tensor, self._data.name, offset, len(tensor.raw_data))
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
        return tensor

    def finish(self) -> None:
        """Put the new weights in the place of the old."""
        self._data.unlink(missing_ok=True)
        if self._file is not None:
            self._file.close()
            self._new.replace(self._data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._new.unlink(missing_ok=True)


def is_large(file: Path) -> bool:
    """Whether a graph's weights lie beside it."""
    return file.with_name(file.name + DATA_SUFFIX).exists()


def save(model: onnx.ModelProto, file: Path) -> None:
    """A graph in memory → one file up to the limit of `trace`, beyond it the weights in a plain file beside it."""
    data = file.with_name(file.name + DATA_SUFFIX)
    data.unlink(missing_ok=True)  # of the fp32 graph
    weights_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)  # ByteSize() fails beyond 2 GiB
    large = weights_bytes > trace.LARGEST_SINGLE_FILE_BYTES
    onnx.save(model, str(file), save_as_external_data=large, location=data.name if large else None)
    check(file)
