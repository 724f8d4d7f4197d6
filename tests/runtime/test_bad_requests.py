"""Bad input costs its own request one clear sentence, and the next request nothing."""

import io
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

import qforge
from runtime.answers import Request
from runtime.backends.ort import OrtEngine
from runtime.errors import BundleError, ImageError, InputError, OutOfMemory
from runtime.model import Model
from runtime.text import MAX_CHARACTERS, require_text
from tests.runtime.conftest import FLOAT, INT64

ROOT = Path(__file__).parents[2]
RED = np.full((5, 7, 3), (250, 90, 10), np.uint8)
BEYOND = {
    "surrogate": ("what \udcff?", "expected UTF-8, found other bytes at character 6"),
    "nul": ("what\x00", r"control character U\+0000 at 5"),
    "escape": ("\x1b[31mwhat", r"control character U\+001B at 1"),
    "delete": ("what\x7f", r"control character U\+007F at 5"),
    "form feed": ("what\x0c", r"control character U\+000C at 5"),
    "endless": ("photo " * 20_000, "expected at most 100,000 characters, found 120,00"),
    "too long": ("photo " * 30, "positions, this bundle has 20"),
    "number": (7, "expected text, found int"),
}


@pytest.fixture(scope="module")
def model(tiny_bundle: Path):
    with qforge.load(tiny_bundle) as opened:
        yield opened


def works(model: Model) -> bool:
    return model.caption(RED)[0].text == "a red"


WAYS: dict[str, Callable[[Model, str], object]] = {
    "caption": lambda model, text: model.caption(RED, text),
    "vqa": lambda model, text: model.vqa(RED, text),
    "vqa with a prompt": lambda model, text: model.vqa(RED, "colour", text),
    "stream": lambda model, text: model.stream(Request(RED, text)),
    "chat": lambda model, text: model.chat(RED).ask(text),
    "chat with turns": lambda model, text: model.chat(RED, [("colour", text), "colour"]),
    "a question among others": lambda model, text: model.answer([Request(RED), Request(RED, text)]),
    "prefix": lambda model, text: model.embed(RED, kind="prefix", question=text),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", BEYOND)
def test_text_that_is_none(model: Model, way: str, text: str) -> None:
    given, sentence = BEYOND[text]
    if way == "vqa with a prompt" and isinstance(given, str):
        given += "{}"
    if text == "too long" and way in ("chat with turns", "prefix"):
        return  # a turn that does not fit is left out and counted; the Q-Former cuts what is too long for it
    with pytest.raises(InputError, match=sentence) as caught:
        WAYS[way](model, given)
    assert len(str(caught.value)) < 300, "one sentence, whatever was given"
    assert works(model)


def test_empty_and_blank() -> None:
    require_text("", "prompt")
    for blank in ("", " ", "\n\t"):
        with pytest.raises(InputError, match="question: expected words"):
            Request(RED, blank).own_prompt(caption="", vqa="{}")


def test_an_empty_prompt_is_a_prompt(model: Model) -> None:
    """BLIP-2 captions without any; blank ones are text too, as tabs and line ends are."""
    for prompt in ("", " ", "\n\tphoto of"):
        assert model.caption(RED, prompt)[0].text == "a red"
    for empty in ("", " . "):
        for ask in (lambda text: model.vqa(RED, text), lambda text: model.stream(Request(RED, text))):
            with pytest.raises(InputError, match="question: expected words"):
                ask(empty)
    assert model.vqa(RED, "opposite\n\tcolour").text == "a blue"


def test_the_longest_text_is_still_read() -> None:
    require_text("x" * MAX_CHARACTERS, "prompt")


@pytest.mark.parametrize("tokens", [0, -1, 9, 10**9])
def test_max_new_tokens_beyond_the_bundle(model: Model, tokens: int) -> None:
    ways: list[Callable[[], object]] = [
        lambda: model.caption(RED, max_new_tokens=tokens),
        lambda: model.vqa(RED, "colour", max_new_tokens=tokens),
        lambda: model.stream(Request(RED), max_new_tokens=tokens),
        lambda: model.chat(RED, ["colour"], max_new_tokens=tokens),
    ]
    for ask in ways:
        with pytest.raises(InputError, match="max_new_tokens: expected 1 to 8"):
            ask()
    assert works(model)


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"GIF89a",
        "nowhere.png",
        "no\x00where.png",
        "\udcff.png",
        Path(),
        None,
        7,
        ["a.png"],
        np.zeros((2, 2)),
        pytest.param(io.BytesIO(), id="BytesIO"),
    ],
    ids=repr,
)
def test_what_is_no_image(model: Model, image: object) -> None:
    ways: list[Callable[[], object]] = [
        lambda: model.caption([RED, image]),
        lambda: model.vqa(image, "colour"),
        lambda: model.stream(Request(image)),
        lambda: model.chat(image),
        lambda: model.embed([image]),
    ]
    for ask in ways:
        with pytest.raises(ImageError):
            ask()
    assert works(model)


def real_files() -> list[bytes]:
    """One picture in the common formats and modes."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (12, 17, 3), np.uint8))
    forms = [
        *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P")),
        *(
            ("GIF", "P"),
            ("TIFF", "RGB"),
            ("BMP", "RGB"),
            ("WEBP", "RGB"),
            ("PPM", "RGB"),
            ("ICO", "RGBA"),
            ("TGA", "RGB"),
        ),
    ]
    files = []
    for kind, mode in forms:
        file = io.BytesIO()
        picture.convert(mode).save(file, kind)
        files.append(file.getvalue())
    return files


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_bytes_and_damaged_files_are_an_answer_or_an_image_error(model: Model) -> None:
    """200 random strings, and every format cut short and with bytes changed, 200 of each."""
    rng = np.random.default_rng(1)
    whole = real_files()
    for file in whole:
        assert model.caption(file)[0].text.startswith("a ")
    given = [rng.bytes(int(rng.integers(0, 300))) for _ in range(200)]
    for number in range(200):
        file = whole[number % len(whole)]
        given.append(file[: int(rng.integers(0, len(file)))])
        changed = bytearray(file)
        for place in rng.integers(0, len(changed), 4):
            changed[place] = int(rng.integers(0, 256))
        given.append(bytes(changed))
    refused = 0
    for data in given:
        try:
            assert model.caption(data)[0].text.startswith("a ")
        except ImageError:
            refused += 1
    assert 300 < refused < 600
    assert works(model)


def test_no_memory_in_the_engine_costs_one_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime 1.31 words it; the error is a MemoryError too."""
    words = "[ONNXRuntimeError] : 1 : FAIL : Failed to allocate memory for requested buffer of size 4503599627370496"
    engine = model._pipeline._decoder._language
    session = engine._session

    class Full:
        def io_binding(self):
            raise RuntimeError(words)

        def run(self, *_):
            raise RuntimeError(words)

    for ask in (lambda: model.caption(RED), lambda: list(model.stream(Request(RED))), lambda: model.chat(RED).ask("a")):
        monkeypatch.setattr(engine, "_session", Full())
        with pytest.raises(MemoryError, match=r"not enough memory .*\(4,503,599,627,370,496 bytes more") as caught:
            ask()
        assert isinstance(caught.value, OutOfMemory)
        monkeypatch.setattr(engine, "_session", session)
        assert works(model)


def test_no_memory_in_numpy_costs_one_request(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        np.zeros((1 << 50,), np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(model._pipeline._encoder, "encode", full)
        with pytest.raises(MemoryError):
            model.caption(RED)
    assert works(model)


def test_no_memory_for_an_image_is_not_called_a_damaged_image(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("runtime.preprocess._to_rgb", full)
        with pytest.raises(MemoryError):
            model.caption(RED)
    assert works(model)


def write_expanding_graph(path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "expand",
        [helper.make_tensor_value_info("x", FLOAT, [1]), helper.make_tensor_value_info("shape", INT64, [1])],
        [helper.make_tensor_value_info("y", FLOAT, ["n"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_graph_that_asks_for_too_much(tmp_path: Path) -> None:
    """The real engine: what it raises is known, and it goes on."""
    with OrtEngine(write_expanding_graph(tmp_path / "graph.onnx"), threads=1) as engine:
        one = np.ones(1, np.float32)
        with pytest.raises(OutOfMemory, match="4,503,599,627,370,496 bytes more were asked for"):
            engine.run({"x": one, "shape": np.array([1 << 50])})
        assert engine.run({"x": one, "shape": np.array([3])})["y"].tolist() == [1.0, 1.0, 1.0]
        with pytest.raises(Exception, match="missing from input feed") as caught:
            engine.run({"z": one, "shape": np.array([3])})
        assert not isinstance(caught.value, MemoryError)


TRUNCATED = """
import sys, pathlib, numpy, qforge
from runtime.errors import BundleError
image = numpy.full((5, 7, 3), (250, 90, 10), numpy.uint8)
bundle = pathlib.Path(sys.argv[1])
model = qforge.load(bundle, cache_bytes=0)
print(model.caption(image)[0].text)
for damage in (lambda file: file.truncate(0), lambda file: file.write(b"?" * 8)):
    with (bundle / "onnx/embed.data").open("r+b") as file:
        damage(file)
    for ask in (lambda: model.caption(image), lambda: model.stream(qforge.Request(image)), lambda: model.embed(image)):
        try:
            ask()
            print("answered")
        except BundleError as error:
            print(error)
"""


def with_weights_beside(make_tiny_bundle: Callable[..., Path], path: Path) -> Path:
    """A bundle whose `embed` maps its table, as large models do."""
    import json

    from runtime.bundle import _digest, _render, sha256_of

    bundle = make_tiny_bundle(path)
    graph = bundle / "onnx/embed.onnx"
    model = onnx.load(graph)
    onnx.save(
        model, graph, save_as_external_data=True, location="embed.data", size_threshold=0, all_tensors_to_one_file=True
    )
    record = json.loads((bundle / "manifest.json").read_text())
    weights = bundle / "onnx/embed.data"
    entry = record["graphs"]["embed"]
    entry |= {"sha256": sha256_of(graph), "bytes": graph.stat().st_size}
    entry["data"] = {"file": "onnx/embed.data", "sha256": sha256_of(weights), "bytes": weights.stat().st_size}
    record["digest"] = _digest(record)
    (bundle / "manifest.json").write_text(_render(record))
    return bundle


def test_weights_written_into_while_loaded(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Mapped weights that are cut short end a process that reads them (SIGBUS): nobody reads them any more."""
    bundle = with_weights_beside(make_tiny_bundle, tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED, str(bundle)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first == "a red" and len(others) == 6
    assert all("embed.data: the file was written to while the bundle is loaded" in line for line in others)


def test_a_bundle_that_is_replaced_goes_on_with_what_was_loaded(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """A new export renames a whole folder into place; so does an atomic write of one file."""
    bundle = with_weights_beside(make_tiny_bundle, tmp_path / "bundle")
    with qforge.load(bundle, cache_bytes=0) as model:
        (tmp_path / "other").write_bytes(b"?" * 100)
        (tmp_path / "other").replace(bundle / "onnx/embed.data")
        assert works(model)
        bundle.rename(tmp_path / "gone")
        assert works(model)
    with pytest.raises(BundleError, match=r"embed\.data: the file was changed"):
        qforge.load(tmp_path / "gone")


def test_open_files_are_let_go(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = with_weights_beside(make_tiny_bundle, tmp_path / "bundle")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with qforge.load(bundle) as model:
            assert works(model)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2 < resource.getrlimit(resource.RLIMIT_NOFILE)[0]
