"""Blocks are found in the graph's structure, and a restored node computes exactly what was traced."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.calibration import calibration_feeds, draw
from export.gate.blocks import blocks_of, count_products, lowered_nodes
from export.gate.restore import restored
from export.gate.sensitivity import Parts, rank_blocks, rank_nodes
from export.graphs import Arrays, Graph
from export.precision.files import save
from export.precision.weights import write_nbits
from runtime.backends.ort import OrtEngine
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from tests.export.conftest import QUIET
from trainer.blip2 import Blip2

GRAPHS = ("vision", "qformer")


@pytest.fixture(scope="module")
def feeds(
    model: Blip2, graphs: dict[str, Graph], manifests: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Arrays]]:
    drawn = draw(model, manifests, calibration_images=3, verification_images=0, seed=5, progress=QUIET)
    found = calibration_feeds(model, graphs, drawn.calibration, tmp_path_factory.mktemp("feeds"))
    return {name: list(of_graph) for name, of_graph in found.items()}


def outputs(model: onnx.ModelProto, feed: Arrays, file: Path) -> Arrays:
    save(model, file)
    with OrtEngine(file) as engine:
        return engine.run(feed)


def pair(name: str, bundle_fp32: Bundle, bundle_int8: Bundle) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The traced graph, and the same as it is written before nodes are put together, which is when it is gated."""
    traced = onnx.load(bundle_fp32.graph(name))
    if name != "language":
        return traced, onnx.load(bundle_int8.graph(name))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "language.onnx"
        shutil.copyfile(bundle_fp32.graph(name), file)
        write_nbits(file, (), bits=8)
        return traced, onnx.load(file)


def test_blocks_are_those_of_a_transformer(bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    blocks = blocks_of("vision", *pair("vision", bundle_fp32, bundle_int8))
    kinds = [block.name for block in blocks]
    assert kinds == [
        "vision 1: stem",
        "vision 2: attention",
        "vision 3: feed-forward",
        "vision 4: attention",
        "vision 5: feed-forward",
    ]
    assert [len(block.nodes) for block in blocks] == [1, 4, 2, 4, 2], "a convolution; q, k, v, out; up and down"


@pytest.mark.parametrize("name", [*GRAPHS, "language"])
def test_blocks_hold_every_product_once(name: str, bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    traced, written = pair(name, bundle_fp32, bundle_int8)
    nodes = [node for block in blocks_of(name, traced, written) for node in block.nodes]
    assert sorted(nodes) == sorted(lowered_nodes(traced, written))
    assert len(nodes) == len(set(nodes)) == count_products([traced])
    assert not lowered_nodes(traced, traced)


@pytest.mark.parametrize("name", GRAPHS)
def test_all_restored_is_the_traced_graph_again(
    name: str, bundle_fp32: Bundle, bundle_int8: Bundle, feeds: dict[str, list[Arrays]], tmp_path: Path
) -> None:
    traced, written = pair(name, bundle_fp32, bundle_int8)
    model = restored(written, traced, lowered_nodes(traced, written))
    for feed in feeds[name]:
        expected = outputs(traced, feed, tmp_path / "traced.onnx")
        rounded = outputs(written, feed, tmp_path / "written.onnx")
        found = outputs(model, feed, tmp_path / "restored.onnx")
        for output, array in expected.items():
            scale = float(np.abs(array).max())
            assert np.abs(found[output] - array).max() < 0.2 * np.abs(rounded[output] - array).max() + 1e-5 * scale


def test_restored_weight_blocks_are_the_traced_language_model(
    bundle_fp32: Bundle, bundle_int8: Bundle, tmp_path: Path
) -> None:
    traced, written = pair("language", bundle_fp32, bundle_int8)
    model = restored(written, traced, lowered_nodes(traced, written))
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in traced.graph.node]


def test_one_node_is_restored_and_no_other(bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    traced, written = pair("vision", bundle_fp32, bundle_int8)
    every = lowered_nodes(traced, written)
    model = restored(written, traced, every[4:5])
    by_name = {node.name: node for node in model.graph.node}
    before = {node.name: node for node in traced.graph.node}
    assert by_name[every[4]].input[0] == before[every[4]].input[0], "it reads what it read, unrounded"
    small, large = (len(m.graph.node) for m in (model, written))
    assert small < large, "the pair in front of it is gone"


def test_a_tensor_that_is_not_there_is_named(bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    traced, written = pair("vision", bundle_fp32, bundle_int8)
    product = next(node for node in written.graph.node if node.op_type == "MatMul")
    name, product.output[0] = product.name, "renamed"
    with pytest.raises(CheckFailed, match=r"is not in the written graph"):
        restored(written, traced, [name])


def never(graph: str, keep: frozenset[str]) -> Path:
    raise AssertionError(f"{graph} can be mended, and was written anew with {keep}")


def test_a_graph_in_16_bits_is_written_anew_for_each_block(
    bundle_fp32: Bundle, feeds: dict[str, list[Arrays]], tmp_path: Path
) -> None:
    """Its tensors have another type, so no node can be put back among them; here one product rounds to FP16."""
    traced, asked = onnx.load(bundle_fp32.graph("vision")), list[frozenset[str]]()
    files = {name: tmp_path / f"{name}.onnx" for name in ("traced", "written")}
    written = rounded_to_fp16(traced)
    save(traced, files["traced"])
    save(written, files["written"])

    def rewrite(graph: str, keep: frozenset[str]) -> Path:
        asked.append(keep)
        return files["written"]

    parts = Parts({"vision": files["traced"]}, {"vision": files["written"]}, feeds, rewrite)
    (found,) = rank_blocks(parts, QUIET)
    assert asked == [frozenset()]
    assert 0 < found.error < 1e-2


def rounded_to_fp16(traced: onnx.ModelProto) -> onnx.ModelProto:
    """The first product's matrix stored in FP16 and cast back."""
    model = onnx.ModelProto()
    model.CopyFrom(traced)
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    half = onnx.numpy_helper.to_array(weight).astype(np.float16)
    weight.CopyFrom(onnx.numpy_helper.from_array(half, weight.name))
    cast = onnx.helper.make_node("Cast", [weight.name], [f"{weight.name}_back"], to=onnx.TensorProto.FLOAT)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = f"{name}_back" if name == weight.name else name
    model.graph.node.insert(0, cast)
    del model.graph.value_info[:]  # it says FP32 of the matrix
    return model


def test_the_block_that_was_broken_ranks_first(
    bundle_fp32: Bundle, bundle_int8: Bundle, feeds: dict[str, list[Arrays]], tmp_path: Path
) -> None:
    """A scale ten times too large on one product's weights."""
    traced, written = pair("vision", bundle_fp32, bundle_int8)
    victim = blocks_of("vision", traced, written)[2]
    made_by = {output: node for node in written.graph.node for output in node.output}
    by_name = {node.name: node for node in written.graph.node}
    weight = made_by[by_name[victim.nodes[1]].input[1]]
    scale = next(tensor for tensor in written.graph.initializer if tensor.name == weight.input[1])
    values = onnx.numpy_helper.to_array(scale) * 10
    scale.CopyFrom(onnx.numpy_helper.from_array(values, scale.name))
    files = {"traced": tmp_path / "traced.onnx", "written": tmp_path / "written.onnx"}
    save(traced, files["traced"])
    save(written, files["written"])
    parts = Parts({"vision": files["traced"]}, {"vision": files["written"]}, feeds, never)
    ranked = rank_blocks(parts, QUIET)
    assert ranked[0].block == victim
    assert ranked[0].error > 10 * ranked[1].error
    nodes = rank_nodes(parts, [victim, ranked[1].block], QUIET)
    assert nodes[0].block.nodes == (victim.nodes[1],)
