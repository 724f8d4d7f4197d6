"""The Triton repository: described as the graphs are, and answering what the pipeline answers."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import runtime
from export.triton.repository import write_repository
from runtime.answers import Request
from runtime.bundle import Bundle, read_bundle
from runtime.engine_manifest import EngineGraph, EngineManifest, EngineOptions, EngineProfile
from runtime.errors import BundleError, InputError
from runtime.manifest import FileEntry
from runtime.pipeline import Pipeline
from tests.runtime.conftest import write_tiny_bundle
from tests.triton_server import Asked, Server, read_config, said, texts

TYPES = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT64: "TYPE_INT64"}
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def repository(bundle_fp32: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(bundle_fp32, tmp_path_factory.mktemp("triton") / "models")


@pytest.fixture(scope="module")
def images(world: Path) -> list[Path]:
    return sorted((world / "images").rglob("*.png"))[:4]


def assert_described(folder: Path, graph: Path, *, max_batch: int) -> None:
    """config.pbtxt against the graph itself: names in order, types, ranks, fixed sizes, batching."""
    config, model = read_config(folder), onnx.load(graph, load_external_data=False).graph
    cached = any(value.name.startswith("past_") for value in model.input)
    assert config.dynamic is not cached
    assert config.max_batch == (0 if cached else max_batch)
    for stated, values in ((config.inputs, model.input), (config.outputs, model.output)):
        assert list(stated) == [value.name for value in values]
        for value in values:
            kind, dims = stated[value.name]
            tensor = value.type.tensor_type
            sizes = [size.dim_value or -1 for size in tensor.shape.dim]
            assert kind == TYPES[tensor.elem_type]
            assert dims == (sizes if cached else sizes[1:])
            assert cached or sizes[0] == -1


def test_every_graph_is_described_and_copied(repository: Path, bundle_fp32: Bundle) -> None:
    names = {f"qforge_{name}" for name in bundle_fp32.manifest.graphs} | {"qforge"}
    assert {path.name for path in repository.iterdir()} == names | {"README.md"}
    for name, entry in bundle_fp32.manifest.graphs.items():
        file = repository / f"qforge_{name}/1/model.onnx"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == entry.sha256
        assert_described(repository / f"qforge_{name}", file, max_batch=5)


def test_the_step_is_described(repository: Path) -> None:
    config = read_config(repository / "qforge")
    assert config.dynamic and config.max_batch == 5
    assert set(config.inputs) == {"IMAGE", "PIXELS", "QUESTION", "PROMPT"}
    assert config.outputs == {"TEXT": ("TYPE_STRING", [1])}
    assert config.text.count("optional: true") == 4


def test_it_answers_as_the_pipeline_does(repository: Path, bundle_fp32: Bundle, images: list[Path]) -> None:
    """Four requests of one call: bytes and pixels, one row and two, with question, prompt and neither."""
    server = Server(repository)
    step = server.load()
    files = [path.read_bytes() for path in images]
    pixels = np.asarray(Image.open(images[2]).convert("RGB"))
    responses = step.execute(
        [
            Asked(IMAGE=texts([files[0]])),
            Asked(IMAGE=texts(files[:2]), QUESTION=texts(["what colour is the circle?", ""])),
            Asked(PIXELS=pixels[None]),
            Asked(IMAGE=texts([files[3]]), PROMPT=texts(["a"])),
        ]
    )
    requests = [
        Request(images[0]),
        Request(images[0], "what colour is the circle?"),
        Request(images[1]),
        Request(images[2]),
        Request(images[3], prompt="a"),
    ]
    with Pipeline(bundle_fp32, cache_bytes=0) as pipeline:
        expected = [answer.text for answer in pipeline.answer(requests)]
    assert [text for response in responses for text in said(response)] == expected
    assert len(set(expected)) > 1
    assert ("qforge_vision", 4) in server.runs, "distinct images of one call are one batch"
    before = len(server.runs)
    step.execute([Asked(IMAGE=texts([files[0]]))])
    assert not [name for name, _ in server.runs[before:] if name == "qforge_vision"], "the query cache serves it"
    step.finalize()


def test_a_bad_request_does_not_cost_the_others_their_answer(repository: Path, images: list[Path]) -> None:
    step, good = Server(repository).load(), texts([images[0].read_bytes()])
    bad = [
        Asked(IMAGE=texts([b"no image"])),
        Asked(QUESTION=texts(["what?"])),
        Asked(IMAGE=good, PIXELS=np.zeros((1, 4, 4, 3), np.uint8)),
        Asked(IMAGE=good, QUESTION=texts([b"\xff\xfe"])),
    ]
    responses = step.execute([Asked(IMAGE=good), *bad])
    assert said(responses[0])
    told = [response.error().message() for response in responses[1:]]
    for message, words in zip(told, ("expected an image", "found neither", "found both", "can't decode"), strict=True):
        assert words in message


def test_an_error_of_the_server_is_told(repository: Path, images: list[Path]) -> None:
    (response,) = (
        Server(repository, fails={"qforge_qformer"}).load().execute([Asked(IMAGE=texts([images[0].read_bytes()]))])
    )
    assert response.error().message() == "qforge_qformer: out of memory"


def test_it_runs_alone(tmp_path: Path) -> None:
    """Copied away, with our packages out of reach and only what its README asks for: the hand-made bundle answers."""
    repository = write_repository(read_bundle(write_tiny_bundle(tmp_path / "bundle")), tmp_path / "models")
    shutil.copyfile(ROOT / "tests/triton_server.py", tmp_path / "triton_server.py")
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'rich', 'yaml', 'typer', 'export', 'qforge', 'trainer'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np\nfrom pathlib import Path\nfrom triton_server import Asked, Server, said\n"
        "red = np.zeros((1, 8, 8, 3), np.uint8); red[..., 0] = 255\n"
        f"step = Server(Path({str(repository)!r})).load()\n"
        "print(said(step.execute([Asked(PIXELS=red)])[0]), sys.modules['runtime'].__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["['a", "red']", str(repository / "qforge/1/runtime/__init__.py")]


def built(bundle: Bundle, name: str, engine: str, graphs: list[str]) -> None:
    """Stand-ins for plans, with the description that `qforge build` writes."""
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    described = {}
    for graph in graphs:
        entry, plan = bundle.manifest.graphs[graph], f"plan of {graph}".encode()
        (folder / f"{graph}.plan").write_bytes(plan)
        described[graph] = EngineGraph(
            plan=FileEntry(file=f"{graph}.plan", sha256=hashlib.sha256(plan).hexdigest(), bytes=len(plan)),
            onnx_sha256=entry.sha256,
            data_sha256=None,
            inputs=entry.inputs,
            outputs=entry.outputs,
            profiles=tuple(EngineProfile(name=f"batch-{rows}", shapes={}) for rows in (1, 5)),
            build_s=1.0,
            peak_rss_bytes=1,
        )
    manifest = EngineManifest(
        format=1,
        bundle_digest=bundle.manifest.digest,
        engine=engine,
        builder_version="11.4",
        platform="linux-x86_64",
        compute_capabilities=("8.6",),
        options=EngineOptions(),
        graphs=described,
    )
    (folder / "engine.json").write_text(manifest.model_dump_json())


def test_tensorrt_plans(bundle_fp32: Bundle, tmp_path: Path) -> None:
    bundle = read_bundle(shutil.copytree(bundle_fp32.path, tmp_path / "bundle"))
    names = list(bundle.manifest.graphs)
    with pytest.raises(InputError, match=r"one set of TensorRT plans .* found none; build them on the server's GPU"):
        write_repository(bundle, tmp_path / "models", engine="tensorrt")
    built(bundle, "rtx", "tensorrt-rtx", names)
    with pytest.raises(InputError, match=r"found rtx \(tensorrt-rtx\)"):
        write_repository(bundle, tmp_path / "models", engine="tensorrt")
    built(bundle, "some", "tensorrt", names[:2])
    built(bundle, "sm86", "tensorrt", names)
    out = write_repository(bundle, tmp_path / "models", engine="tensorrt")
    assert sorted(path.name for path in (out / "qforge_vision/1").iterdir()) == ["model.plan"]
    assert (out / "qforge_vision/1/model.plan").read_bytes() == b"plan of vision"
    text = read_config(out / "qforge_vision").text
    assert 'platform: "tensorrt_plan"' in text
    assert 'instance_group [ { count: 1 kind: KIND_GPU profile: [ "0", "1" ] } ]' in text
    assert_described(out / "qforge_language", bundle.graph("language"), max_batch=5)
    (bundle.path / "engines/sm86/vision.plan").write_bytes(b"plan of fiction")
    with pytest.raises(BundleError, match=r"vision\.plan: the plan was changed"):
        write_repository(bundle, out, engine="tensorrt")


def test_limits_of_the_flags(bundle_fp32: Bundle, tmp_path: Path) -> None:
    out = write_repository(bundle_fp32, tmp_path / "models", max_batch=2, instances=3)
    config = read_config(out / "qforge_vision")
    assert config.max_batch == 2 and "instance_group [ { count: 3 kind: KIND_AUTO } ]" in config.text
    for wrong in (0, 6):
        with pytest.raises(InputError, match=rf"--max-batch: expected 1 to 5 .* found {wrong}"):
            write_repository(bundle_fp32, out, max_batch=wrong)
    with pytest.raises(InputError, match="--instances: expected at least 1, found 0"):
        write_repository(bundle_fp32, out, instances=0)
    assert read_config(out / "qforge_vision").max_batch == 2


def test_a_folder_of_others_is_not_replaced(bundle_fp32: Bundle, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.pbtxt").write_text("dear to someone")
    with pytest.raises(InputError, match="found other files"):
        write_repository(bundle_fp32, tmp_path / "theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "config.pbtxt"]


def test_the_version_of_the_runtime_is_the_one_here(repository: Path) -> None:
    copied, own = repository / "qforge/1/runtime", Path(str(runtime.__file__)).parent
    for file in own.rglob("*.py"):
        assert (copied / file.relative_to(own)).read_bytes() == file.read_bytes()
