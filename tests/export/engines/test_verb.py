"""`qforge build`: plans and their manifest appear together, or the bundle stays as it was."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from export.engines import build as story
from export.engines.builder import Builder
from export.engines.log import Interrupted, interruptible, monitor_of
from export.engines.plan import Built
from qforge import cli, doctor
from qforge.gone import GONE, explained
from qforge.verbs_build import build
from qforge.verbs_bundle import inspect
from runtime.bundle import GraphFiles, read_bundle, write_manifest
from runtime.engine_manifest import engine_folders, read_engine
from runtime.errors import CheckFailed, InputError, OutOfSpace
from runtime.manifest import TensorSpec
from tests.runtime.conftest import write_tiny_bundle

OPTIONS = {"optimization_level": 1}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Four graphs written by hand, their axes named as the exporter names them."""
    folder = write_tiny_bundle(tmp_path / "bundle")
    manifest = read_bundle(folder).manifest
    names = {"B": "batch", "T": "tokens", "S": "new", "P": "past"}

    def named(specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        def shape(spec: TensorSpec) -> tuple[int | str, ...]:
            return tuple(names.get(size, size) if isinstance(size, str) else size for size in spec.shape)

        return {name: TensorSpec(dtype=spec.dtype, shape=shape(spec)) for name, spec in specs.items()}

    kept = ("model", "precision", "language_precision", "target", "limits", "preprocess", "prompts", "generation")
    graphs = {
        name: GraphFiles(graph.file, named(graph.inputs), named(graph.outputs), None)
        for name, graph in manifest.graphs.items()
    }
    write_manifest(folder, graphs=graphs, made_by={"tests": "1"}, **{name: getattr(manifest, name) for name in kept})
    return folder


def built(
    bundle: Path, gpus: tuple[str, ...] = ("8.6",), graphs: tuple[str, ...] = ("vision",), **more: object
) -> Path:
    settings = {"batches": (1,), "timing_cache": None, "options": OPTIONS} | more
    outcome = build(bundle, "tensorrt-rtx", gpus, graphs, **settings)
    return Path(outcome.data["engine"])


def test_plans_and_manifest(bundle: Path, rtx: Builder) -> None:
    folder = built(bundle, ("8.9", "8.6"))
    assert folder == bundle / "engines" / "tensorrt-rtx-sm86-sm89"
    engine = read_engine(read_bundle(bundle), folder)
    manifest, graph = engine.manifest, engine.manifest.graphs["vision"]
    assert manifest.builder_version == rtx.version
    assert manifest.compute_capabilities == ("8.6", "8.9")
    assert manifest.options.optimization_level == 1
    assert [profile.name for profile in graph.profiles] == ["batch-1", "range"]
    assert graph.inputs["pixels"].dtype == "float32"
    assert graph.plan.bytes == engine.plan("vision").stat().st_size > 1000
    assert graph.build_s > 0
    assert graph.peak_rss_bytes > 1 << 20
    found = inspect(bundle)
    assert "engine tensorrt-rtx-sm86-sm89: tensorrt-rtx" in found.text
    assert found.data["engines"][0]["manifest"]["graphs"]["vision"]["plan"]["sha256"] == graph.plan.sha256


def test_a_foreign_engine_is_named_by_inspect(bundle: Path) -> None:
    (bundle / "engines" / "tensorrt-sm90").mkdir(parents=True)
    found = inspect(bundle)
    assert "engine tensorrt-sm90: refused: " in found.text
    assert "expected an engine with engine.json" in found.data["engines"][0]["error"]


def test_an_older_engine_is_replaced_when_the_new_one_is_whole(
    bundle: Path, rtx: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in built(bundle).iterdir()}
    folder = bundle / "engines" / "tensorrt-rtx-sm86"
    whole = story.build_graph

    def full(file: Path, name: str, *rest: object, **more: object) -> Built:
        if name == "qformer":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(file, name, *rest, **more)

    monkeypatch.setattr(story, "build_graph", full)
    with pytest.raises(OutOfSpace, match="nothing half-written was kept"):
        built(bundle, graphs=("vision", "qformer"), options={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def interrupted(*_: object, **__: object) -> Built:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "build_graph", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(bundle, options={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in (bundle / "engines").iterdir()] == ["tensorrt-rtx-sm86"]
    monkeypatch.setattr(story, "build_graph", whole)
    built(bundle, options={"optimization_level": 0})
    (engine,) = engine_folders(read_bundle(bundle))
    assert read_engine(read_bundle(bundle), engine).manifest.options.optimization_level == 0


def test_ctrl_c_stops_the_builder(bundle: Path, rtx: Builder) -> None:
    """The builder asks between its steps; its answer is a plan that it does not make."""

    def press(share: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    manifest = read_bundle(bundle).manifest
    with pytest.raises(KeyboardInterrupt):
        story.build_graph(
            bundle / "onnx" / "vision.onnx",
            "vision",
            rtx,
            rtx.capabilities(()),
            story.profiles_of("vision", manifest, (1,)),
            story.EngineOptions(),
            moved=press,
        )


def test_progress_is_that_of_the_outermost_phase(rtx: Builder) -> None:
    shares = list[float]()
    monitor = monitor_of(rtx.trt, shares.append, Interrupted())
    monitor.phase_start("all", None, 4)
    monitor.phase_start("part", "all", 100)
    assert monitor.step_complete("part", 50)
    assert monitor.step_complete("all", 1)
    monitor.phase_finish("part")
    monitor.phase_finish("all")
    assert shares == [0.5, 1.0]
    with pytest.raises(KeyboardInterrupt), interruptible() as noted:
        noted.pressed = True


def test_a_graph_that_the_parser_cannot_read(tmp_path: Path, rtx: Builder) -> None:
    """What no rule foresaw arrives as the parser's own words, with the node."""
    node = helper.make_node("Odd", ["x"], ["y"], name="odd-one", domain="example")
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2,)) for name in "xy"]
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path / "odd.onnx")
    with pytest.raises(
        CheckFailed, match=r"graph 'vision': node 'odd-one' \(Odd\): .*tensorrt-rtx 1\.\S+ cannot read it"
    ):
        story.build_graph(tmp_path / "odd.onnx", "vision", rtx, rtx.capabilities(()), (), story.EngineOptions())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"graphs": ("visoin",)}, "--graph: expected some of vision, qformer, embed, language, found 'visoin'"),
        ({"batches": (9,)}, r"--batch: expected 1 to 3 \(this bundle's limit\), found 9"),
        ({"gpus": ("9.0",)}, "found 9.0; build with --engine tensorrt on that GPU"),
        ({"options": {"optimization_level": 7}}, "--optimization-level: .*expected an optimization level from 0 to 5"),
        ({"options": {"workspace_mib": 0}}, "--workspace-mib: Input should be greater than 0"),
        ({"options": {"fp16": True}}, "--fp16: TensorRT 11 takes no precision from its builder"),
        ({"timing_cache": Path("times")}, "--timing-cache: tensorrt-rtx cannot"),
    ],
)
def test_what_cannot_be_is_refused_before_building(
    more: dict[str, object], words: str, bundle: Path, rtx: Builder
) -> None:
    with pytest.raises(InputError, match=words):
        built(bundle, **more)
    assert not (bundle / "engines").exists()


@pytest.mark.parametrize("option", ["--fp16", "--int8", "--best", "--calib", "--strip-plan", "--precision"])
def test_options_of_tensorrt_10_are_explained(option: str) -> None:
    message = explained(f"No such option: {option}", "qforge build")
    assert message.endswith(GONE[option])
    assert message.startswith(f"No such option: {option}. ")
    assert explained(f"No such option: {option}", "qforge caption") == f"No such option: {option}"
    assert explained("No such option: --grph", "qforge build") == "No such option: --grph"


def test_the_command_explains_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["qforge", "build", "bundle", "--engine", "tensorrt", "--fp16"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "the numeric type is written in the graphs" in said
    assert "--precision fp16 --target tensorrt" in said


def test_doctor_names_the_builders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_engines", lambda: {"tensorrt-rtx": "1.7.1", "tensorrt": "11.4"})
    monkeypatch.setattr(doctor, "compute_capability_here", lambda: None)
    found = doctor.doctor()
    assert "build engines with tensorrt-rtx 1.7.1: for compute capability 7.5, 8.0, 8.6, 8.9, 12.0, 12.1" in found.text
    assert "build engines with tensorrt 11.4: needs an NVIDIA GPU and its driver" in found.text
    assert found.data["builders"]["tensorrt"] == {"version": "11.4", "compute_capabilities": []}
    monkeypatch.setattr(doctor, "compute_capability_here", lambda: (9, 0))
    assert "build engines with tensorrt 11.4: for compute capability 9.0" in doctor.doctor().text
    monkeypatch.setattr(doctor, "installed_engines", dict)
    assert (
        "build engines with tensorrt-rtx: needs it: pip install 'qforge[export,tensorrt-rtx]'" in doctor.doctor().text
    )


def test_json_names_every_plan(bundle: Path, rtx: Builder) -> None:
    outcome = build(bundle, "tensorrt-rtx", (), ("vision",), (1,), None, OPTIONS)
    data = json.loads(json.dumps(outcome.data))
    assert data["manifest"]["compute_capabilities"] == ["8.6", "8.9", "12.0", "12.1"]
    assert set(data["manifest"]["graphs"]) == {"vision"}
    assert "vision: " in outcome.text


def test_a_copied_bundle_keeps_its_engines(bundle: Path, rtx: Builder, tmp_path: Path) -> None:
    built(bundle)
    shutil.copytree(bundle, tmp_path / "copy")
    copy = read_bundle(tmp_path / "copy")
    assert [read_engine(copy, folder).path.name for folder in engine_folders(copy)] == ["tensorrt-rtx-sm86"]
