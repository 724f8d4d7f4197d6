"""A plan is loaded only when it is what this bundle had built; nothing here needs a builder."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import Bundle, read_bundle
from runtime.engine_manifest import EngineProfile, engine_folders, read_engine
from runtime.errors import BundleError

NAME = "tensorrt-rtx-sm86"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """With one engine, whose plan is any bytes: the reader looks at no plan's inside."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    made, folder, plan = read_bundle(tmp_path / "bundle"), tmp_path / "bundle" / "engines" / NAME, b"a plan"
    folder.mkdir(parents=True)
    (folder / "vision.plan").write_bytes(plan)
    entry = made.manifest.graphs["vision"]
    record = {
        "format": 1,
        "bundle_digest": made.manifest.digest,
        "engine": "tensorrt-rtx",
        "builder_version": "1.7.1",
        "platform": "linux-x86_64",
        "compute_capabilities": ["8.6"],
        "options": {},
        "graphs": {
            "vision": {
                "plan": {"file": "vision.plan", "sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)},
                "onnx_sha256": entry.sha256,
                "data_sha256": None,
                "inputs": {name: spec.model_dump() for name, spec in entry.inputs.items()},
                "outputs": {name: spec.model_dump() for name, spec in entry.outputs.items()},
                "profiles": [],
                "build_s": 1.0,
                "peak_rss_bytes": 1,
            }
        },
    }
    (folder / "engine.json").write_text(json.dumps(record))
    return made


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> Path:
    folder = bundle.path / "engines" / NAME
    record = json.loads((folder / "engine.json").read_text())
    change(record)
    (folder / "engine.json").write_text(json.dumps(record))
    return folder


def test_an_engine_of_the_bundle_is_found(bundle: Bundle) -> None:
    (folder,) = engine_folders(read_bundle(bundle.path))
    engine = read_engine(bundle, folder)
    assert engine.plan("vision").read_bytes() == b"a plan"
    with pytest.raises(BundleError, match=r"expected a plan of graph 'qformer', found \['vision'\]; build it: qforge"):
        engine.plan("qformer")


def test_a_build_under_way_is_none(bundle: Bundle) -> None:
    (bundle.path / "engines" / ".tensorrt-sm90.1234abcd.tmp").mkdir()
    assert [folder.name for folder in engine_folders(bundle)] == [NAME]


def test_a_bundle_without_engines_has_none(tiny_bundle: Path) -> None:
    assert engine_folders(read_bundle(tiny_bundle)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(bundle_digest="0" * 64), "expected plans of this bundle .* found those of another"),
        (lambda r: r.update(format=2), r"engine\.json: expected format 1, found 2; upgrade qforge or build it again"),
        (lambda r: r.update(engine="tvm"), r"engine\.json: engine: Input should be 'tensorrt' or 'tensorrt-rtx'"),
        (lambda r: r["graphs"]["vision"].update(onnx_sha256="1" * 64), "'vision' was built from another ONNX file"),
        (lambda r: r["graphs"].update(extra=r["graphs"]["vision"]), "'extra' was built from another ONNX file"),
        (lambda r: r["graphs"]["vision"]["plan"].update(sha256="2" * 64), "the plan was changed: expected SHA-256 222"),
        (lambda r: r["graphs"]["vision"]["plan"].update(file="../../manifest.json"), "expected plans in this folder"),
        (lambda r: r["graphs"]["vision"]["plan"].update(file="gone.plan"), r"gone\.plan: engine\.json lists this plan"),
        (lambda r: r.clear(), "expected format 1, found None"),
    ],
)
def test_a_foreign_engine_is_refused(change: Callable[[dict[str, Any]], object], words: str, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=words):
        read_engine(bundle, edit(bundle, change))


def test_a_changed_plan_is_refused(bundle: Bundle) -> None:
    plan = bundle.path / "engines" / NAME / "vision.plan"
    plan.write_bytes(b"b plan")
    with pytest.raises(BundleError, match="the plan was changed: expected SHA-256"):
        read_engine(bundle, plan.parent)
    read_engine(bundle, plan.parent, check_hashes=False)
    plan.write_bytes(b"half")
    with pytest.raises(BundleError, match="the plan was changed: expected bytes 6, found 4"):
        read_engine(bundle, plan.parent, check_hashes=False)


def test_a_folder_without_a_manifest_is_refused(bundle: Bundle) -> None:
    folder = bundle.path / "engines" / NAME
    (folder / "engine.json").write_text("{")
    with pytest.raises(BundleError, match="expected JSON, found other data; build it again"):
        read_engine(bundle, folder)
    (folder / "engine.json").unlink()
    with pytest.raises(BundleError, match=r"expected an engine with engine\.json, found none; remove it or build"):
        read_engine(bundle, folder)


def test_a_profile_holds_its_shapes_and_no_others() -> None:
    profile = EngineProfile(name="range", shapes={"x": ((1, 3), (2, 3), (4, 3))})
    assert profile.holds({"x": (1, 3)})
    assert profile.holds({"x": (4, 3), "fixed": (7,)})
    assert not profile.holds({"x": (5, 3)})
    assert not profile.holds({"x": (1, 3, 1)})
