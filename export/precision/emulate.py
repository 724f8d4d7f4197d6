"""What a graph of 16-bit types computes, computed in fp32: every 16-bit tensor is rounded as the type would round it.

ONNX Runtime's CPU has no BF16 arithmetic, and it runs FP16 nodes in fp32 without rounding between them (1.31: two
products with 90,000 between them give no infinity). So neither can be judged by running it. Here each node computes in
fp32 and its result goes through a Cast to the 16-bit type and back; FP16 then overflows where a GPU would.
"""

import shutil
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from export.precision.cast import store
from export.precision.files import element_types, read_structure
from export.trace import check
from runtime.bundle import Bundle

SIXTEEN_BITS = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def stand_in(bundle: Bundle, folder: Path) -> tuple[Bundle, frozenset[str]]:
    """A copy of the bundle that computes on a CPU what this one does on a GPU, and the graphs that differ in it.

    It is the bundle itself, and none, where no graph has 16-bit types.
    """
    low = frozenset(name for name in bundle.manifest.graphs if has_sixteen_bits(bundle.graph(name)))
    if not low:
        return bundle, low
    shutil.copytree(bundle.path, folder, copy_function=shutil.copyfile)
    graphs = {name: entry.model_copy(update={"on_cpu": True}) for name, entry in bundle.manifest.graphs.items()}
    copy = Bundle(folder, bundle.manifest.model_copy(update={"graphs": graphs}))
    for name in low:
        emulate(copy.graph(name))
    return copy, low


def has_sixteen_bits(file: Path) -> bool:
    """Whether anything in a graph is FP16 or BF16: it then enters as a constant, by a Cast or through an input."""
    graph = read_structure(file).graph
    casts = {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    ends = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    return bool(SIXTEEN_BITS & {*casts, *ends, *(tensor.data_type for tensor in graph.initializer)})


def emulate(file: Path) -> None:
    """Rewrite a graph in place; its inputs and outputs keep their names and types."""
    model = read_structure(file)
    types = element_types(model)
    low = {name: kind for name, kind in types.items() if kind in SIXTEEN_BITS}
    stored = {tensor.name for tensor in model.graph.initializer}
    constants = {f"{name}_wide": (name, int(TensorProto.FLOAT)) for name in low if name in stored}
    outputs, nodes = {value.name for value in model.graph.output}, list[onnx.NodeProto]()
    for value in model.graph.input:
        if value.name in low:
            nodes.append(_cast(value.name, f"{value.name}_wide", TensorProto.FLOAT))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in SIXTEEN_BITS:
                attribute.i = TensorProto.FLOAT
        for place, name in enumerate(node.input):
            if name in low:
                node.input[place] = f"{name}_wide"
        nodes.append(node)
        for place, name in enumerate(node.output):
            if name in low:
                node.output[place] = f"{name}_exact"
                rounded = name if name in outputs else f"{name}_rounded"
                nodes.append(_cast(f"{name}_exact", rounded, low[name]))
                nodes.append(_cast(rounded, f"{name}_wide", TensorProto.FLOAT))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    store(model, file, constants)
    check(file)


def _cast(source: str, to_name: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [to_name], name=f"emulate_{to_name}", to=kind)
