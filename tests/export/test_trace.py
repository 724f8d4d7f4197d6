"""The traced files: valid, named as promised, equal to PyTorch at every size, free of the machine that made them."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export import trace
from export.graphs import Graph
from runtime.backends import CPU, Device
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from tests.plain import assert_plain

TOLERANCE = 2e-5
"""fp32 on both sides; only the order of additions differs (values are of the order 1)."""
NAMES = ("vision", "qformer", "embed", "language")


@pytest.mark.parametrize("kind", ["fp32", "int8", "wide"])
def test_every_graph_is_plain_onnx(kind: str, request: pytest.FixtureRequest) -> None:
    """Encoder-decoders and retrieval graphs are asked the same where they are exported."""
    bundle: Bundle = request.getfixturevalue(f"bundle_{kind}")
    assert_plain(bundle)
    for name in bundle.manifest.graphs:
        model = onnx.load(bundle.graph(name), load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20


@pytest.mark.parametrize("name", NAMES)
def test_names_and_sizes_are_those_of_the_table(name: str, graphs: dict[str, Graph], bundle_fp32: Bundle) -> None:
    entry, graph = bundle_fp32.manifest.graphs[name], graphs[name]
    assert list(entry.inputs) == list(graph.inputs)
    assert list(entry.outputs) == list(graph.outputs)
    for tensor, plan in graph.inputs.items():
        shape = entry.inputs[tensor].shape
        assert {axis: size for axis, size in enumerate(shape) if isinstance(size, str)} == plan.varying
    for tensor, varying in graph.outputs.items():
        shape = entry.outputs[tensor].shape
        assert {axis: size for axis, size in enumerate(shape) if isinstance(size, str)} == varying
    with CPU.open(bundle_fp32, name) as engine:
        assert engine.inputs() == {tensor: spec.shape for tensor, spec in entry.inputs.items()}
        assert engine.outputs() == {tensor: spec.shape for tensor, spec in entry.outputs.items()}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_this_machine_is_in_the_file(name: str, bundle_fp32: Bundle, bundle_int8: Bundle) -> None:
    for bundle in (bundle_fp32, bundle_int8):
        data = bundle.graph(name).read_bytes()
        for secret in (b".py", str(Path.home()).encode(), str(Path.cwd()).encode(), str(bundle.path.parent).encode()):
            assert secret not in data


@pytest.mark.parametrize("rows", [1, 4])
def test_vision_and_embed_equal_eager(rows: int, graphs: dict[str, Graph], bundle_fp32: Bundle) -> None:
    rng = np.random.default_rng(rows)
    pixels = {"pixels": rng.normal(size=(rows, 3, 16, 16)).astype(np.float32)}
    assert_equal_to_eager(graphs["vision"], bundle_fp32, pixels)
    assert_equal_to_eager(graphs["embed"], bundle_fp32, {"input_ids": rng.integers(0, 50, (rows, rows))})


@pytest.mark.parametrize("mask", [[[0]], [[1]], [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]])
def test_qformer_equals_eager(mask: list[list[int]], graphs: dict[str, Graph], bundle_fp32: Bundle) -> None:
    rng, mask_BT = np.random.default_rng(0), np.array(mask)
    feeds = {
        "image_embeds": rng.normal(size=(len(mask), 17, 32)).astype(np.float32),
        "question_ids": rng.integers(0, 100, mask_BT.shape),
        "question_mask": mask_BT,
    }
    assert_equal_to_eager(graphs["qformer"], bundle_fp32, feeds)


@pytest.mark.parametrize(
    ("past", "new", "pads"),
    [(0, 1, [0]), (0, 6, [0]), (0, 6, [0, 2, 5]), (7, 1, [0, 3, 6]), (4, 3, [0, 1])],
    ids=["one token", "prefill", "padded prefill", "padded step", "several at once"],
)
def test_language_equals_eager(
    past: int, new: int, pads: list[int], graphs: dict[str, Graph], bundle_fp32: Bundle
) -> None:
    rng = np.random.default_rng(0)
    mask = np.array([[int(place >= hidden) for place in range(past + new)] for hidden in pads])
    feeds = {"inputs_embeds": rng.normal(size=(len(pads), new, 32)).astype(np.float32), "attention_mask": mask}
    for name, plan in graphs["language"].inputs.items():
        if name.startswith("past_"):
            _, heads, _, width = plan.example.shape
            feeds[name] = rng.normal(size=(len(pads), heads, past, width)).astype(np.float32)
    assert_equal_to_eager(graphs["language"], bundle_fp32, feeds)


def assert_equal_to_eager(graph: Graph, bundle: Bundle, feeds: dict[str, np.ndarray]) -> None:
    """Outputs at padded positions are nobody's: they are left out."""
    expected = graph.run_eager(feeds)
    with Device(threads=1).open(bundle, graph.name) as engine:
        found = engine.run(feeds)
    assert found.keys() == expected.keys()
    for name in expected:
        seen = feeds["attention_mask"][:, None, :, None] if name.startswith("present_") else 1
        np.testing.assert_allclose(found[name] * seen, expected[name] * seen, atol=TOLERANCE)


def test_large_weights_go_into_a_plain_file_beside_the_graph(
    graphs: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "LARGEST_TABLE_BYTES", 0)
    monkeypatch.setattr(trace, "LARGEST_SINGLE_FILE_BYTES", 1 << 40)
    (tmp_path / "onnx").mkdir()
    file = trace.trace(graphs["embed"], tmp_path)
    assert not trace.describe(trace.trace(graphs["qformer"], tmp_path)).data, "what is computed with may stay inside"
    data = tmp_path / "onnx" / "embed.onnx.data"
    assert data.is_file()
    assert not data.is_symlink()
    assert file.stat().st_size < data.stat().st_size
    assert trace.describe(file).data == "onnx/embed.onnx.data"
    ids = np.array([[1, 2, 3]])
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    session = onnxruntime.InferenceSession(str(moved / "onnx" / "embed.onnx"))
    np.testing.assert_array_equal(
        session.run(None, {"input_ids": ids})[0], graphs["embed"].run_eager({"input_ids": ids})["inputs_embeds"]
    )


def test_tracing_twice_gives_the_same_bytes(graphs: dict[str, Graph], bundle_fp32: Bundle, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    again = trace.trace(graphs["vision"], tmp_path)
    assert again.read_bytes() == bundle_fp32.graph("vision").read_bytes()


def test_an_invalid_graph_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["nowhere"], ["out"])
    output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "broken", [], [output])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "broken.onnx")
    with pytest.raises(CheckFailed, match=r"broken\.onnx: expected a valid ONNX graph"):
        trace.check(tmp_path / "broken.onnx")
