"""The engine's own logic on a fake GPU: real graphs, real bytes, no driver. What only a GPU can tell is not here."""

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime.backends.trt.cuda import CudaError
from runtime.backends.trt.engine import TrtEngine
from runtime.backends.trt.session import Session
from runtime.bundle import Bundle
from runtime.engine_manifest import EngineGraph, EngineProfile
from runtime.errors import BundleError, InputError
from runtime.manifest import FileEntry, TensorSpec
from runtime.pipeline import Pipeline
from runtime.replay import replay
from tests.runtime.trt.fakes import AXES, FakeCuda, FakeOpener, plan_of, with_axes

SIZES = {"B": 2, "S": 3, "P": 4, "P+S": 7, "T": 4}


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return with_axes(tiny_bundle)


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


def pixels(batch: int, seed: int = 0) -> dict[str, Any]:
    return {"pixels": np.random.default_rng(seed).random((batch, 3, 8, 8), np.float32)}


@pytest.mark.parametrize("graph", ["vision", "qformer", "embed", "language"])
def test_it_keeps_the_contract_of_every_backend(graph: str, bundle: Bundle, opener: FakeOpener) -> None:
    entry, named = bundle.manifest.graphs[graph], {AXES[axis]: size for axis, size in SIZES.items()}
    with opener.open(bundle, graph) as engine:
        assert engine.inputs() == {name: spec.shape for name, spec in entry.inputs.items()}
        assert engine.outputs() == {name: spec.shape for name, spec in entry.outputs.items()}
        feeds = {
            name: np.ones([named.get(size, size) for size in spec.shape], spec.dtype)
            for name, spec in entry.inputs.items()
        }
        if graph == "language":  # a step: one new position
            feeds["inputs_embeds"], feeds["attention_mask"] = feeds["inputs_embeds"][:, :1], np.ones((2, 5), np.int64)
        first, second = engine.run(feeds), engine.run({name: 0 * array for name, array in feeds.items()})
        truth = opener.plans[graph].onnx.run(feeds)
    assert list(first) == list(entry.outputs)
    for name, spec in entry.outputs.items():
        assert isinstance(first[name], np.ndarray) and first[name].dtype == spec.dtype
        np.testing.assert_array_equal(first[name], truth[name])
        assert not np.shares_memory(first[name], second[name])
    assert opener.cuda.memory == {} and opener.plans[graph].closed


def test_a_whole_bundle_answers_as_eager_did(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, opener: FakeOpener
) -> None:
    checks = replay(with_axes(make_tiny_bundle(tmp_path / "four", max_batch=4)), opener)  # type: ignore[arg-type]
    assert [(check.graph, check.ok) for check in checks] == [("vision/colours", True), ("chain", True)]
    assert opener.cuda.memory == {}


def test_runs_of_the_same_shapes_become_a_graph(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        for seed in range(5):
            (found,) = engine.run(pixels(2, seed)).values()
            np.testing.assert_allclose(found[:, 0], pixels(2, seed)["pixels"].mean(axis=(2, 3)), rtol=1e-6)
        counts = engine.counts
        assert (counts.captures, counts.replays, counts.eager, counts.unfit) == (1, 3, 2, 0)
        plain, captured = opener.plans["vision"].contexts
        assert plain.exact and captured.exact and plain.profile == captured.profile == 1
        engine.run(pixels(1))
        assert engine.counts.eager == 3  # other shapes are another graph
    assert opener.cuda.graphs == {}


def test_memory_that_moves_makes_graphs_worthless(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        for _ in range(3):
            engine.run(pixels(1))
        assert engine.counts.replays == 1
        engine.run(pixels(3))  # both blocks grow
        assert opener.cuda.graphs == {}
        for seed in range(3):
            (found,) = engine.run(pixels(1, seed)).values()
            np.testing.assert_allclose(found[:, 0], pixels(1, seed)["pixels"].mean(axis=(2, 3)), rtol=1e-6)
        assert (engine.counts.captures, engine.counts.replays) == (2, 2)


def test_blocks_grow_and_never_leak(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        engine.run(pixels(1))
        for batch in (3, 1, 2, 3, 1):
            engine.run(pixels(batch))
            assert len(opener.cuda.memory) == 3  # pixels, image_embeds, scratch
        held = opener.cuda.held
        for batch in (1, 2, 3):
            engine.run(pixels(batch))
        assert opener.cuda.held == held


def test_engines_share_the_scratch_of_the_neediest(bundle: Bundle) -> None:
    small, large = FakeOpener(settings={"scratch_bytes": 1000}), None
    vision = small.open(bundle, "vision")
    for _ in range(3):
        vision.run(pixels(1))
    small.settings["scratch_bytes"] = 5000
    large = small.open(bundle, "embed")
    small.settings["scratch_bytes"] = 200
    small.open(bundle, "qformer").close()
    assert (small.session.scratch.size, small.session.scratch.moves) == (5000, 2)
    assert sum(len(block) >= 1000 for block in small.cuda.memory.values()) == 1
    (found,) = vision.run(pixels(1, 4)).values()  # its graph had the old address in it
    np.testing.assert_allclose(found[:, 0], pixels(1, 4)["pixels"].mean(axis=(2, 3)), rtol=1e-6)
    assert vision.counts.replays == 1
    large.close()
    vision.run(pixels(1))
    vision.close()
    assert small.cuda.memory == {}


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        (
            {"pixels": np.zeros((4, 3, 8, 8), np.float32)},
            r"no profile for pixels \(4, 3, 8, 8\); it has batch-1: pixels",
        ),
        ({"pixels": np.zeros((1, 3, 9, 8), np.float32)}, r"expected shape \(batch, 3, 8, 8\), found \(1, 3, 9, 8\)"),
        ({"pixels": np.zeros((1, 3, 8), np.float32)}, r"expected shape \(batch, 3, 8, 8\), found \(1, 3, 8\)"),
        ({"pixels": np.zeros((1, 3, 8, 8))}, "input 'pixels': expected elements of float32, found float64"),
        ({}, r"expected inputs \['pixels'\], found \[\]"),
    ],
)
def test_feeds_that_do_not_fit(feeds: Any, words: str, bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        with pytest.raises(InputError, match=words):
            engine.run(feeds)
        engine.run(pixels(1))


def test_out_of_memory_is_that_request_only(bundle: Bundle) -> None:
    opener = FakeOpener(FakeCuda(limit=2500))
    with opener.open(bundle, "vision") as engine:
        engine.run(pixels(2))
        with pytest.raises(CudaError, match="out of memory"):
            engine.run(pixels(3))
        (found,) = engine.run(pixels(2, 5)).values()
        np.testing.assert_allclose(found[:, 0], pixels(2, 5)["pixels"].mean(axis=(2, 3)), rtol=1e-6)


def test_views_stay_on_the_device(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as vision, opener.open(bundle, "qformer") as qformer:
        seen = vision.buffer(9, "float32").view((2, 1, 3))
        assert vision.run(pixels(2), into={"image_embeds": seen}) == {}
        np.testing.assert_allclose(seen.numpy()[:, 0], pixels(2)["pixels"].mean(axis=(2, 3)), rtol=1e-6)
        text = {"question_ids": np.zeros((2, 1), np.int64), "question_mask": np.ones((2, 1), np.int64)}
        by_view = qformer.run({"image_embeds": seen, **text})
        by_copy = qformer.run({"image_embeds": seen.numpy(), **text})
        np.testing.assert_array_equal(by_view["prefix"], by_copy["prefix"])
        seen.assign(np.full((2, 1, 3), 2.0, np.float32))
        assert seen.numpy().tolist() == np.full((2, 1, 3), 2.0).tolist()
        assert (seen.shape, seen.dtype) == ((2, 1, 3), "float32")
        rows = vision.buffer(12, "float32").view((4, 1, 3))
        rows.assign(np.repeat(np.arange(4, dtype=np.float32), 3).reshape(4, 1, 3))
        rows.move([(3, 0), (0, 1), (1, 3)])
        assert rows.numpy()[:, 0, 0].tolist() == [1, 0, 2, 0]


def test_views_that_do_not_fit(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        buffer = engine.buffer(6, "float32")
        with pytest.raises(InputError, match=r"expected at most 6 elements, found \(7,\)"):
            buffer.view((7,))
        with pytest.raises(InputError, match=r"assign: expected shape \(6,\), found \(3,\)"):
            buffer.view((6,)).assign(np.zeros(3, np.float32))
        with pytest.raises(InputError, match="assign: expected elements of float32, found int64"):
            buffer.view((3,)).assign(np.zeros(3, np.int64))
        with pytest.raises(InputError, match=r"expected a view of shape \(1, 1, 3\), found \(3,\)"):
            engine.run(pixels(1), into={"image_embeds": buffer.view((3,))})
        with pytest.raises(InputError, match="expected a view of float32, found int64"):
            engine.run(pixels(1), into={"image_embeds": engine.buffer(3, "int64").view((1, 1, 3))})
        with pytest.raises(InputError, match=r"expected outputs among \['image_embeds'\], found \['other'\]"):
            engine.run(pixels(1), into={"other": buffer.view((3,))})
        elsewhere = FakeOpener().open(bundle, "vision").buffer(3, "float32").view((1, 1, 3))
        with pytest.raises(InputError, match="expected a view of this engine's buffers"):
            engine.run(pixels(1), into={"image_embeds": elsewhere})


def test_a_buffer_that_nobody_holds_is_given_back_at_the_next_turn(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        engine.run(pixels(1))
        held = len(opener.cuda.memory)
        view = engine.buffer(1000, "float16").view((10, 10))
        assert len(opener.cuda.memory) == held + 1
        del view
        gc.collect()
        assert len(opener.cuda.memory) == held + 1  # not at any moment: a capture may be under way
        engine.run(pixels(1))
        assert len(opener.cuda.memory) == held


def test_buffers_end_with_their_engine(bundle: Bundle, opener: FakeOpener) -> None:
    engine = opener.open(bundle, "vision")
    view = engine.buffer(3, "float32").view((3,))
    engine.close()
    assert opener.cuda.memory == {}
    with pytest.raises(InputError, match="a buffer of an engine that was closed"):
        view.numpy()


def test_threads_take_turns(bundle: Bundle, opener: FakeOpener) -> None:
    wrong = list[int]()
    with Pipeline(bundle, device=opener, cache_bytes=0) as pipeline:
        images = [np.full((8, 8, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 255, 0], [0, 0, 255])]

        def ask(row: int) -> None:
            for _ in range(5):
                if pipeline.caption(images[row])[0].text.split()[-1] != ("red", "green", "blue")[row]:
                    wrong.append(row)

        threads = [threading.Thread(target=ask, args=(row % 3,)) for row in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_what_the_first_run_compiled_is_kept_once_a_profile(bundle: Bundle, opener: FakeOpener) -> None:
    with opener.open(bundle, "vision") as engine:
        for batch in (1, 1, 2, 2, 1):
            engine.run(pixels(batch))
        assert opener.plans["vision"].compiled == 2


def test_a_plan_of_other_tensors_is_refused(bundle: Bundle, opener: FakeOpener) -> None:
    opener.open(bundle, "vision")
    plan = opener.plans["vision"]
    other = plan.stated.model_copy(update={"outputs": {"other": plan.stated.outputs["image_embeds"]}})
    with pytest.raises(BundleError, match=r"expected a plan with \['other', 'pixels'\], found \['image_embeds'"):
        TrtEngine(plan, other, "vision", opener.session)


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Path, EngineGraph]:
    """A cache of four places that a step writes in: `present` is `past` with `new` added at place `index`."""
    nodes = [
        helper.make_node("OneHot", ["index", "depth", "ends"], ["hot"], axis=-1),
        helper.make_node("Mul", ["hot", "new"], ["added"]),
        helper.make_node("Where", ["is_hot", "added", "past"], ["present"]),
        helper.make_node("Cast", ["hot"], ["is_hot"], to=TensorProto.BOOL),
        helper.make_node("ReduceSum", ["present"], ["logits"], keepdims=0),
    ]
    nodes[2], nodes[3] = nodes[3], nodes[2]
    values = {"past": (1, [4]), "new": (1, [1]), "index": (7, [1]), "present": (1, [1, 4]), "logits": (1, [])}
    ends = {name: helper.make_tensor_value_info(name, *spec) for name, spec in values.items()}
    constants = [
        helper.make_tensor("depth", TensorProto.INT64, [], [4]),
        helper.make_tensor("ends", TensorProto.FLOAT, [2], [0.0, 1.0]),
    ]
    ins, outs = [ends["past"], ends["new"], ends["index"]], [ends["logits"], ends["present"]]
    ins[0] = helper.make_tensor_value_info("past", 1, [1, 4])
    graph = helper.make_graph(nodes, "cached", ins, outs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "cached.onnx")
    spec = {"past": ("float32", (1, 4)), "new": ("float32", (1,)), "index": ("int64", (1,))}
    results = {"logits": ("float32", ()), "present": ("float32", (1, 4))}
    of = {name: TensorSpec(dtype=dtype, shape=shape) for name, (dtype, shape) in (spec | results).items()}
    stated = EngineGraph(
        plan=FileEntry(file="cached.plan", sha256="0" * 64, bytes=1),
        onnx_sha256="0" * 64,
        data_sha256=None,
        inputs={name: of[name] for name in spec},
        outputs={name: of[name] for name in results},
        profiles=(),
        build_s=1.0,
        peak_rss_bytes=1,
    )
    return tmp_path / "cached.onnx", stated


def test_a_cache_in_place_is_one_graph_whose_index_is_data(cached: tuple[Path, EngineGraph]) -> None:
    session = Session(cuda := FakeCuda())
    plan = plan_of(*cached, cuda, aliases={"present": "past"})
    with TrtEngine(plan, cached[1], "cached", session) as engine:
        cache = engine.buffer(4, "float32").view((1, 4))
        cache.assign(np.zeros((1, 4), np.float32))
        for index, value in enumerate((1.0, 2.0, 4.0, 8.0)):
            feeds = {"past": cache, "new": np.array([value], np.float32), "index": np.array([index])}
            found = engine.run(feeds, into={"present": cache})
            assert found["logits"] == sum((1.0, 2.0, 4.0, 8.0)[: index + 1])  # the proof spoilt no cache
        assert cache.numpy().tolist() == [[1.0, 2.0, 4.0, 8.0]]
        assert (engine.counts.captures, engine.counts.replays, engine.counts.unfit) == (1, 2, 0)
        other = engine.buffer(4, "float32").view((1, 4))
        with pytest.raises(InputError, match="'present' is updated in the memory of input 'past'; give one view for"):
            engine.run(feeds, into={"present": other})


def test_a_cache_that_is_not_in_place_needs_memory_of_its_own(cached: tuple[Path, EngineGraph]) -> None:
    session = Session(cuda := FakeCuda())
    with TrtEngine(plan_of(*cached, cuda), cached[1], "cached", session) as engine:
        cache = engine.buffer(4, "float32").view((1, 4))
        feeds = {"past": cache, "new": np.ones(1, np.float32), "index": np.array([0])}
        with pytest.raises(InputError, match="'present': expected memory of its own, found that of an input"):
            engine.run(feeds, into={"present": cache})


def test_a_plan_without_profiles_runs_at_its_fixed_sizes(cached: tuple[Path, EngineGraph]) -> None:
    session = Session(cuda := FakeCuda())
    with TrtEngine(plan_of(*cached, cuda), cached[1], "cached", session) as engine:
        past = np.ones((1, 4), np.float32)
        found = engine.run({"past": past, "new": np.full(1, 5.0, np.float32), "index": np.array([2])})
        assert found["present"].tolist() == [[1.0, 1.0, 5.0, 1.0]] and found["logits"] == 8.0


def test_profiles_are_tight_before_wide() -> None:
    from runtime.backends.trt.profiles import profile_for

    wide = EngineProfile(name="range", shapes={"x": ((1, 3), (4, 3), (4, 3))})
    exact = EngineProfile(name="batch-2", shapes={"x": ((2, 3), (2, 3), (2, 3))})
    specs = {"x": TensorSpec(dtype="float32", shape=("batch", 3))}
    for profiles in ((wide, exact), (exact, wide)):
        assert profile_for("g", specs, profiles, {"x": (2, 3)}) == profiles.index(exact)
        assert profile_for("g", specs, profiles, {"x": (3, 3)}) == profiles.index(wide)
    with pytest.raises(InputError, match=r"it has range: x \(1-4, 3\); batch-2: x \(2, 3\); build one with"):
        profile_for("g", specs, (wide, exact), {"x": (5, 3)})
