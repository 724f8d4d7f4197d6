"""Prepared graphs: the same numbers from another file; used where they fit, refused where they were changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import Device
from runtime.backends.ort import OrtEngine
from runtime.bundle import PREPARED, Bundle, read_bundle
from runtime.errors import BundleError
from runtime.prepare import prepare
from runtime.prepared import RECORD, fits_here, prepared_graph, read_prepared
from runtime.progress import Progress
from runtime.reference import REFERENCE, read_reference
from runtime.replay import replay

QUIET = Progress(quiet=True)


@pytest.fixture(params=["bundle_fp32", "bundle_int8"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    exported: Bundle = request.getfixturevalue(request.param)
    bundle = read_bundle(shutil.copytree(exported.path, tmp_path / "bundle"))
    prepare(bundle, QUIET)
    return read_bundle(bundle.path)


def test_every_graph_gives_the_same_numbers(prepared: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = list[str](), OrtEngine.__init__

    def noted(self: OrtEngine, model: Path, *args: Any, **options: Any) -> None:
        opened.append(model.parent.name)
        real(self, model, *args, **options)

    monkeypatch.setattr(OrtEngine, "__init__", noted)
    cases = read_reference(prepared.file(REFERENCE)).cases
    assert {case.graph for case in cases} == set(prepared.manifest.graphs)
    for case in cases:
        with Device().open(prepared, case.graph) as engine, OrtEngine(prepared.graph(case.graph)) as plain:
            found, expected = engine.run(case.inputs), plain.run(case.inputs)
            assert (engine.inputs(), engine.outputs()) == (plain.inputs(), plain.outputs())
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * float(np.abs(array).max()), err_msg=name)
    record = read_prepared(prepared)
    assert record is not None
    assert opened == [
        folder for case in cases for folder in (PREPARED if case.graph in record.graphs else "onnx", "onnx")
    ]
    assert set(record.graphs) | set(record.left_out) == set(prepared.manifest.graphs)
    assert set(record.left_out) <= {"language"}, "its tiny head has an odd number of columns"
    assert all(check.ok for check in replay(prepared))


@pytest.mark.parametrize("field", ["bundle_digest", "onnxruntime", "processor"])
def test_another_machines_graphs_are_left_alone(prepared: Bundle, field: str) -> None:
    file = prepared.path / PREPARED / RECORD
    assert prepared_graph(prepared, "vision") == prepared.path / PREPARED / "vision.onnx"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: "another"}))
    record = read_prepared(prepared)
    assert record is not None
    assert not fits_here(record, prepared)
    assert prepared_graph(prepared, "vision") is None
    assert all(check.ok for check in replay(prepared))


def test_a_changed_byte_is_refused(prepared: Bundle) -> None:
    file = max((prepared.path / PREPARED).glob("*.data"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{file.name}: the file was changed: .*qforge prepare"):
        Device().open(prepared, file.name.removesuffix(".onnx.data"))
    file.unlink()
    with pytest.raises(BundleError, match=r"lists this file, found none in its folder; .*qforge prepare"):
        Device().open(prepared, file.name.removesuffix(".onnx.data"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "expected JSON"),
        ('{"format": 9}', "expected format 1, found 9"),
        ('{"format": 1}', "bundle_digest: Field"),
    ],
)
def test_a_damaged_record_is_refused(prepared: Bundle, text: str, says: str) -> None:
    (prepared.path / PREPARED / RECORD).write_text(text)
    with pytest.raises(BundleError, match=f"{says}.*qforge prepare"):
        Device().open(prepared, "vision")


def test_a_graph_that_computes_otherwise_is_left_out(
    bundle_fp32: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(shutil.copytree(bundle_fp32.path, tmp_path / "bundle"))
    run = OrtEngine.run

    def wrong(self: OrtEngine, feeds: Any, into: Any = None) -> Any:
        return {
            name: array * 1.001 if "pixels" in feeds and len(made) % 2 else array
            for name, array in run(self, feeds, into).items()
            if made.append(name) is None
        }

    made = list[str]()
    monkeypatch.setattr(OrtEngine, "run", wrong)
    prepared = prepare(bundle, QUIET)
    assert set(prepared.left_out) == {"vision"}
    assert "other numbers (error 0.001" in prepared.left_out["vision"]
    assert not list((bundle.path / PREPARED).glob("vision*"))
    assert prepared_graph(bundle, "vision") is None
    assert prepared_graph(bundle, "qformer") is not None


def test_prepared_again_where_it_was(prepared: Bundle) -> None:
    before = read_prepared(prepared)
    again = prepare(prepared, QUIET)
    assert before is not None
    assert set(again.graphs) == set(before.graphs) > {"vision", "qformer"}
    assert not [path for path in prepared.path.iterdir() if path.name.startswith(".")]
