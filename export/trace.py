"""Module → ONNX file: traced once, in fp32, with names and sizes that the bundle promises.

`torch.onnx.export(dynamo=True)` at the graph's own opset. Weights stay in the one file up to 1 GiB, beyond that in a
plain file beside it; protobuf ends at 2 GiB.
"""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import Tensor, nn

from export.graphs import Graph
from export.quiet import quiet
from runtime.bundle import GraphFiles
from runtime.errors import CheckFailed
from runtime.manifest import TensorSpec

LARGEST_SINGLE_FILE_BYTES = 1 << 30
LARGEST_TABLE_BYTES = 1 << 24
"""Of a graph that looks up rows: beside the graph an engine maps its weights, and has in memory only what it read."""
ONNX_FOLDER = "onnx"
DATA_SUFFIX = ".data"


class _Flat(nn.Module):
    """Any number of tensors as one tuple: the exporter then takes one plain list of varying axes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(*tensors)


def trace(graph: Graph, folder: Path) -> Path:
    """Write `folder/onnx/NAME.onnx` (with `NAME.onnx.data` when it is large), checked; returns its path."""
    file = folder / ONNX_FOLDER / f"{graph.name}.onnx"
    file.parent.mkdir(exist_ok=True)
    varying = torch.export.Dim.DYNAMIC  # an axis that tracing would freeze is an error, never silently fixed
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            _Flat(graph.module).eval(),
            tuple(plan.example.clone() for plan in graph.inputs.values()),  # one tensor twice would become one input
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=(tuple(dict.fromkeys(plan.varying, varying) for plan in graph.inputs.values()),),
            opset_version=graph.opset,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise CheckFailed(f"graph '{graph.name}': torch {torch.__version__} traced nothing; report this model")
    _name_axes(program, graph)
    _forget_origin(program.model)
    constants = (value.const_value for value in program.model.graph.initializers.values())
    weights_bytes = sum(int(constant.nbytes) for constant in constants if constant is not None)
    largest = LARGEST_TABLE_BYTES if graph.looks_up else LARGEST_SINGLE_FILE_BYTES
    program.save(file, external_data=weights_bytes > largest)
    check(file)
    return file


def check(file: Path) -> None:
    """onnx's own checker with shape inference; CheckFailed when it objects."""
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckFailed(f"{file.name}: expected a valid ONNX graph, the checker found: {error}") from error


def describe(file: Path) -> GraphFiles:
    """Names, types and shapes of a graph for the manifest; a size that varies is named."""
    model = onnx.load(str(file), load_external_data=False)
    data = file.with_name(file.name + DATA_SUFFIX)
    return GraphFiles(
        file=f"{ONNX_FOLDER}/{file.name}",
        inputs={value.name: _spec(value) for value in model.graph.input},
        outputs={value.name: _spec(value) for value in model.graph.output},
        data=f"{ONNX_FOLDER}/{data.name}" if data.exists() else None,
        on_cpu=all(tensor.data_type != onnx.TensorProto.BFLOAT16 for tensor in model.graph.initializer),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(dtype=str(dtype), shape=tuple(size.dim_param or size.dim_value for size in tensor.shape.dim))


def _name_axes(program: torch.onnx.ONNXProgram, graph: Graph) -> None:
    """The exporter calls sizes s15, s43 …; give them the table's names everywhere in the graph."""
    traced = program.model.graph
    names: dict[str | onnx_ir.SymbolicDim, str] = {}
    for value, plan in zip(traced.inputs, graph.inputs.values(), strict=True):
        names |= {str(_shape(value)[axis]): name for axis, name in plan.varying.items()}
    program.rename_axes(names)
    for value, varying in zip(traced.outputs, graph.outputs.values(), strict=True):
        value.shape = onnx_ir.Shape([varying.get(axis, size) for axis, size in enumerate(_shape(value))])


def _shape(value: onnx_ir.Value) -> onnx_ir.Shape:
    if value.shape is None:
        raise CheckFailed(f"'{value.name}': torch {torch.__version__} traced it without a shape; report this model")
    return value.shape


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes on where each node came from: source lines and folders of the machine that traced."""
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
