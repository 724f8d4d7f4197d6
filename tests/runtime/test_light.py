"""The runtime is light: no torch, transformers or onnx, and onnxruntime only when an engine opens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import BackendUnavailable, QforgeError, require

ROOT = Path(__file__).parents[2]
BLOCK = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx'))); "


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_everything_imports_without_torch():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted((ROOT / "runtime").rglob("*.py"))
    ]
    assert "runtime.backends.ort" in modules
    names = ", ".join(module.removesuffix(".__init__") for module in modules)
    result = python(f"{BLOCK} import {names}; assert 'onnxruntime' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_it_answers_without_torch(tiny_bundle):
    result = python(
        f"{BLOCK} import numpy, runtime; image = numpy.full((4, 4, 3), (9, 9, 200), numpy.uint8); "
        f"print(runtime.load({str(tiny_bundle)!r}).caption(image)[0].text)"
    )
    assert result.stdout == "a blue\n", result.stderr


def test_import_runtime_alone_loads_nothing_heavy():
    result = python(
        "import sys, runtime; heavy = {'PIL', 'pydantic', 'numpy', 'onnxruntime', 'tokenizers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    assert result.returncode == 0, result.stderr


def test_require_names_the_extra():
    assert require("json", extra="x", why="y").dumps(1) == "1"
    with pytest.raises(
        BackendUnavailable, match=r"^this needs 'no_such_module'. Install it: pip install 'qforge\[x\]'"
    ):
        require("no_such_module", extra="x", why="this")


def test_every_error_is_also_a_built_in():
    built_in = (ValueError, OSError, ImportError, MemoryError)
    family = [error for error in QforgeError.__subclasses__() if error.__module__ == QforgeError.__module__]
    assert len(family) >= 7
    odd = [error.__name__ for error in family if not issubclass(error, built_in)]
    assert odd == ["CheckFailed"], "a failed check has no built-in that fits"
