"""A bundle is taken whole and unchanged, or refused with the name of what is wrong."""

import json
import shutil

import pytest

from runtime.bundle import ENGINES, MANIFEST, _digest, _render, read_bundle
from runtime.errors import BundleError, CheckFailed, QforgeError
from runtime.manifest import Manifest


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def rewrite(bundle, **changes):
    """Change manifest keys and sign again: a manifest that is foreign, not damaged."""
    record = json.loads((bundle / MANIFEST).read_text()) | changes
    record["digest"] = _digest(record)
    (bundle / MANIFEST).write_text(_render(record))


def all_files(bundle):
    return sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())


def test_reads_what_was_written(bundle):
    read = read_bundle(bundle)
    manifest = read.manifest
    assert sorted(manifest.graphs) == ["embed", "language", "qformer", "vision"]
    assert read.graph("vision") == bundle / "onnx/vision.onnx"
    assert manifest.graphs["vision"].bytes == (bundle / "onnx/vision.onnx").stat().st_size
    assert manifest.graphs["vision"].inputs["pixels"].shape == ("B", 3, 8, 8)
    assert set(manifest.files) == {"tokenizer.json", "qformer_tokenizer.json", "reference.npz"}
    assert read_bundle(str(bundle)).manifest == manifest


def test_one_changed_byte_in_any_file_is_named(bundle):
    files = all_files(bundle)
    assert len(files) == 8
    for name in files:
        path = bundle / name
        data = path.read_bytes()
        for position in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(BundleError) as caught:
                read_bundle(bundle)
            assert str(path) in str(caught.value)
        path.write_bytes(data)
    read_bundle(bundle)


def test_every_byte_of_the_manifest_counts(bundle):
    path = bundle / MANIFEST
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        for other in (data[position] ^ 1, ord(" ")):
            if other == data[position]:
                continue
            path.write_bytes(data[:position] + bytes([other]) + data[position + 1 :])
            with pytest.raises(BundleError, match=MANIFEST):
                read_bundle(bundle, check_hashes=False)
    path.write_bytes(data + b"\n")
    with pytest.raises(BundleError, match="changed"):
        read_bundle(bundle)


def test_a_changed_file_shows_both_hashes(bundle):
    expected = read_bundle(bundle).manifest.files["tokenizer.json"]
    (bundle / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=f"expected SHA-256 {expected}, found 44136fa355b3678a"):
        read_bundle(bundle)
    read_bundle(bundle, check_hashes=False)


def test_a_missing_file_is_named(bundle):
    for name in all_files(bundle):
        aside = bundle.parent / "aside"
        (bundle / name).rename(aside)
        for check_hashes in (True, False):
            with pytest.raises(BundleError, match=name if name != MANIFEST else f"expected a bundle with {MANIFEST}"):
                read_bundle(bundle, check_hashes)
        aside.rename(bundle / name)


def test_unknown_formats_are_refused(bundle):
    for unknown in (3, 0, "1", None, 1.5):
        rewrite(bundle, format=unknown)
        with pytest.raises(BundleError, match=r"expected format 1 or 2.*upgrade qforge or export again"):
            read_bundle(bundle)


def test_paths_outside_the_bundle_are_refused(bundle, tmp_path):
    outside = tmp_path / "outside.onnx"
    shutil.copy(bundle / "onnx/vision.onnx", outside)
    graphs = json.loads((bundle / MANIFEST).read_text())["graphs"]
    for path in ("../outside.onnx", str(outside), str(bundle / "onnx/vision.onnx"), "onnx/../../outside.onnx"):
        rewrite(bundle, graphs=graphs | {"vision": graphs["vision"] | {"file": path}})
        with pytest.raises(BundleError, match="expected paths inside the bundle"):
            read_bundle(bundle)


def test_a_link_out_of_the_bundle_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside.onnx"
    (bundle / "onnx/vision.onnx").rename(outside)
    (bundle / "onnx/vision.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="expected paths inside the bundle"):
        read_bundle(bundle)


def test_unlisted_files_are_refused_except_engines(bundle):
    (bundle / ENGINES).mkdir()
    (bundle / ENGINES / "vision.plan").write_text("built here")
    read_bundle(bundle)
    (bundle / "onnx/extra.onnx").write_text("")
    with pytest.raises(BundleError, match=r"extra\.onnx: expected only files that manifest\.json lists"):
        read_bundle(bundle)


def test_folders_that_are_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"expected a bundle with manifest\.json"):
        read_bundle(tmp_path / "nowhere")
    for text, sentence in (("{", "expected JSON"), ("[1]", "expected a JSON object"), ("{}", "expected format 1 or 2")):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(BundleError, match=sentence):
            read_bundle(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleError, match="expected JSON"):
        read_bundle(tmp_path)


def test_a_signed_manifest_with_a_wrong_field_names_it(bundle):
    rewrite(bundle, precision="fp4")
    with pytest.raises(BundleError, match=r"manifest\.json: precision: Input should be 'fp32', 'fp16'"):
        read_bundle(bundle)


def test_unknown_graph(bundle):
    with pytest.raises(BundleError, match="expected a graph 'text', found"):
        read_bundle(bundle).graph("text")


def test_manifest_fields_are_a_promise():
    assert set(Manifest.model_fields) == {
        "format", "digest", "model", "precision", "language_precision", "target", "limits", "preprocess", "prompts",
        "generation", "graphs", "files", "made_by",
    }, "changing the manifest means raising `format` and teaching the reader the old one"  # fmt: skip


def test_exit_codes():
    assert (QforgeError.exit_code, BundleError.exit_code, CheckFailed.exit_code) == (2, 2, 1)


def test_a_bundle_of_format_1_is_read(bundle):
    record = json.loads((bundle / MANIFEST).read_text())
    del record["target"]
    (bundle / MANIFEST).write_text(_render(record))
    rewrite(bundle, format=1)
    assert read_bundle(bundle).manifest.target == "onnxruntime"
