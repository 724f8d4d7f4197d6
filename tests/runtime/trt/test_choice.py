"""The plan that fits is taken, and what does not fit is one sentence with a way out. No GPU is needed to say so."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qforge.cli import app
from runtime.backends import Device, available_backends
from runtime.backends.trt import choice
from runtime.backends.trt.choice import fitting, lacks, unfit
from runtime.bundle import Bundle, read_bundle
from runtime.engine_manifest import EngineManifest, read_engine
from runtime.errors import BackendUnavailable, BundleError, CheckFailed
from tests.runtime.trt import fakes

RTX: dict[Any, str] = {"tensorrt-rtx": "1.7.1.116"}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    return read_bundle(tmp_path / "bundle")


def add_plans(bundle: Bundle, folder: str, graphs: tuple[str, ...] = ("vision", "qformer"), **changed: Any) -> None:
    """Plans of any bytes, with a manifest."""
    path = bundle.path / "engines" / folder
    path.mkdir(parents=True)
    entries = {}
    for name in graphs:
        content = f"plan of {name}".encode()
        (path / f"{name}.plan").write_bytes(content)
        said = fakes.stated(bundle, name, ()).model_dump(mode="json")
        said["plan"] = {"file": f"{name}.plan", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        entries[name] = said
    record = {
        "format": 1,
        "bundle_digest": bundle.manifest.digest,
        "engine": "tensorrt-rtx",
        "builder_version": "1.7.1.116",
        "platform": "linux-x86_64",
        "compute_capabilities": ["8.6"],
        "options": {},
        "graphs": entries,
    }
    (path / "engine.json").write_text(json.dumps(record | changed))


@pytest.fixture(autouse=True)
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.platform, "system", lambda: "Linux")
    monkeypatch.setattr(choice.platform, "machine", lambda: "x86_64")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    def here(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(choice, "compute_capability_here", lambda: capability)

    return here


def test_without_a_gpu_the_alternatives_are_named(bundle: Bundle, gpu: Any) -> None:
    gpu(None)
    with pytest.raises(BackendUnavailable, match=r"found none here; run with --backend ort, or .*; plans for an"):
        Device("trt").open(bundle, "vision")
    add_plans(bundle, "a", compute_capabilities=["8.6", "8.9"])
    with pytest.raises(BackendUnavailable, match=r"with one \(its plans are for compute capability 8.6, 8.9"):
        Device("trt").open(bundle, "vision")
    assert "trt" not in available_backends() and lacks() == "an NVIDIA GPU with its driver"


def test_without_packages_the_install_is_named(bundle: Bundle, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((8, 6))
    monkeypatch.setattr(choice, "installed_engines", lambda: {})
    with pytest.raises(BackendUnavailable, match=r"backend 'trt' needs TensorRT: pip install 'qforge\[trt,tensorrt\]'"):
        Device("trt").open(bundle, "vision")
    monkeypatch.setattr(choice, "installed_engines", lambda: RTX)
    monkeypatch.setattr(choice, "BINDINGS", "no_such_package")
    with pytest.raises(BackendUnavailable, match=r"needs cuda-bindings: pip install 'qforge\[trt\]'"):
        Device("trt").open(bundle, "vision")


def test_no_plan_names_the_command(bundle: Bundle) -> None:
    command = rf"qforge build {bundle.path} --engine tensorrt-rtx --compute-capability 8.6"
    with pytest.raises(BundleError, match=f"here \\(compute capability 8.6\\), found none; build them: {command}"):
        fitting(bundle, (8, 6), RTX)
    add_plans(bundle, "ada", compute_capabilities=["8.9"])
    add_plans(bundle, "windows", platform="windows-amd64")
    add_plans(bundle, "big", engine="tensorrt")
    add_plans(bundle, "foreign", bundle_digest="0" * 64)
    with pytest.raises(BundleError) as error:
        fitting(bundle, (8, 6), RTX)
    for reason in (
        "ada is for compute capability 8.9",
        "windows is for windows-amd64, not linux-x86_64",
        "big needs tensorrt: pip install 'qforge[trt,tensorrt]'",
        "expected plans of this bundle",
    ):
        assert reason in str(error.value)


def test_the_plan_for_this_gpu_is_taken(bundle: Bundle) -> None:
    add_plans(bundle, "several", compute_capabilities=["8.6", "8.9"])
    add_plans(bundle, "one")
    add_plans(bundle, "tensorrt", engine="tensorrt", builder_version="11.4.0")
    assert fitting(bundle, (8, 6), RTX).path.name == "one"
    assert fitting(bundle, (8, 9), RTX).path.name == "several"
    assert fitting(bundle, (8, 6), {**RTX, "tensorrt": "11.4.0"}).path.name == "tensorrt"


@pytest.mark.parametrize(
    ("changed", "installed", "loads"),
    [
        ({}, {"tensorrt-rtx": "1.7.1.116"}, True),
        ({}, {"tensorrt-rtx": "1.8"}, True),
        ({}, {"tensorrt-rtx": "1.6.9"}, False),
        ({}, {"tensorrt-rtx": "2.0"}, False),
        ({"engine": "tensorrt", "builder_version": "11.4.0"}, {"tensorrt": "11.4.0"}, True),
        ({"engine": "tensorrt", "builder_version": "11.4.0"}, {"tensorrt": "11.5.0"}, False),
        (
            {"engine": "tensorrt", "builder_version": "11.4.0", "options": {"version_compatible": True}},
            {"tensorrt": "11.5.0"},
            True,
        ),
        (
            {"engine": "tensorrt", "builder_version": "11.4.0", "options": {"version_compatible": True}},
            {"tensorrt": "11.3.0"},
            False,
        ),
    ],
)
def test_versions(changed: Any, installed: Any, loads: bool, bundle: Bundle) -> None:
    add_plans(bundle, "plans", **changed)
    reason = unfit(read_engine(bundle, bundle.path / "engines" / "plans").manifest, (8, 6), installed)
    assert reason is None if loads else str(reason).startswith("was built by tensorrt")


def test_a_plan_for_all_gpus_from_ampere_on(bundle: Bundle) -> None:
    versions: Any = {"engine": "tensorrt", "builder_version": "11.4.0"}
    add_plans(bundle, "plans", **versions, options={"hardware_compatibility": "ampere-plus"})
    manifest: EngineManifest = read_engine(bundle, bundle.path / "engines" / "plans").manifest
    assert unfit(manifest, (9, 0), {"tensorrt": "11.4.0"}) is None
    assert unfit(manifest, (7, 5), {"tensorrt": "11.4.0"}) == "is for compute capability 8.6"


@pytest.fixture
def fake_gpu(bundle: Bundle, gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> fakes.FakeCuda:
    """A GPU of compute capability 8.6 on which plans compute what their graphs do."""
    gpu((8, 6))
    add_plans(bundle, "plans", ("vision", "qformer"))
    cuda = fakes.FakeCuda()
    session = fakes.Session(cuda)
    monkeypatch.setattr(choice, "installed_engines", lambda: RTX)
    monkeypatch.setattr(choice, "session_here", lambda: session)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load(file: Path, engine: str, compiled: Path) -> fakes.FakePlan:
        assert (engine, compiled.parent) == ("tensorrt-rtx", tmp_path / "cache" / "qforge" / "compiled")
        name = file.read_bytes().decode().removeprefix("plan of ")
        return fakes.plan_of(bundle.graph(name), fakes.stated(bundle, name, ()), cuda)

    monkeypatch.setattr(choice, "TensorRtPlan", load)
    return cuda


def test_a_device_opens_the_plan_and_asks_it_once(bundle: Bundle, fake_gpu: fakes.FakeCuda, tmp_path: Path) -> None:
    # plans without profiles have fixed sizes, so these take what they are given
    with pytest.raises(CheckFailed, match=r"vision/colours on Fake RTX, c0ffee, driver for CUDA 13\.0 by tensorrt-rtx"):
        fake_gpu_gives_nonsense(bundle, fake_gpu)
    assert fake_gpu.memory == {}
    Device("trt").open(bundle, "vision").close()
    runs = fake_gpu.log.count("synchronize")
    Device("trt").open(bundle, "vision").close()
    assert fake_gpu.log.count("synchronize") == runs + 1  # closing alone: nothing was replayed
    assert len(list((tmp_path / "cache" / "qforge" / "checked").iterdir())) == 1


def fake_gpu_gives_nonsense(bundle: Bundle, cuda: fakes.FakeCuda) -> None:
    right, cuda.submit = cuda.submit, lambda work: None  # type: ignore[method-assign]
    try:
        Device("trt").open(bundle, "vision")
    finally:
        cuda.submit = right  # type: ignore[method-assign]


def test_every_graph_needs_a_plan(bundle: Bundle, fake_gpu: fakes.FakeCuda) -> None:
    with pytest.raises(BundleError, match=r"expected a plan of graph 'embed', found \['qformer', 'vision'\]; build it"):
        Device("trt").open(bundle, "embed")


def test_a_changed_plan_is_refused(bundle: Bundle, fake_gpu: fakes.FakeCuda) -> None:
    (bundle.path / "engines" / "plans" / "vision.plan").write_bytes(b"plan of qforme")
    with pytest.raises(BundleError, match="the plan was changed: expected SHA-256"):
        Device("trt").open(bundle, "vision")


@pytest.mark.parametrize(
    "words", [("caption", "BUNDLE", "x.png"), ("verify", "BUNDLE"), ("vqa", "BUNDLE", "x.png", "what?")]
)
def test_verbs_say_it_too(words: tuple[str, ...], bundle: Bundle, gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(None)
    said = [str(bundle.path) if word == "BUNDLE" else word for word in words]
    assert app([*said, "--backend", "trt"], prog_name="qforge", standalone_mode=False) == 2
    assert "backend 'trt' needs an NVIDIA GPU with its driver, found none here" in capsys.readouterr().err


def test_doctor_says_what_is_missing(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu(None)
    assert app(["doctor"], prog_name="qforge", standalone_mode=False) == 0
    assert "(--backend trt): needs an NVIDIA GPU with its driver" in capsys.readouterr().out
