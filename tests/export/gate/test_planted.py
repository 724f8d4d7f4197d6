"""The whole gate: plain INT8 fails, a handful of products in fp32 mends it, and the bundle says which."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export.config import ExportConfig
from export.gate import gate as module
from export.gate.blocks import count_products, lowered_nodes
from export.gate.metric import Accuracy
from export.graphs import vision_graph
from export.precision.kept import ASKED
from runtime.backends import CPU
from runtime.bundle import Bundle, read_bundle
from runtime.dataset import Row
from runtime.errors import CheckFailed, InputError
from runtime.estimates import mean_score
from runtime.preprocess import preprocess
from runtime.progress import Progress
from tests.export.conftest import Export
from tests.export.gate.conftest import LAYER
from trainer.blip2 import Blip2

SETTINGS = {"calibration_images": 12, "verification_images": 4, "max_batch": 8}
LOOSE = {"max_error": 1.0, "min_cosine": 0.5, "differing_answers": 1.0}
"""The gate is to find it, not the tolerances."""


def config(held_out: Path, **gate: object) -> ExportConfig:
    known = {"max_drop": 0.5, "task": "agreement", "data": held_out}
    return ExportConfig.model_validate(SETTINGS | {"int8": LOOSE, "gate": known | gate})


class Features:
    """Stands for `Metric`: the share of images whose embeddings are within a fifth of eager's.

    The answers of a language model with random weights turn on any rounding; what it is fed does not.
    """

    name = "image embeddings within a fifth"

    def __init__(self, model: Blip2, rows: Sequence[Row], *_: object) -> None:
        images = dict.fromkeys(row.image for row in rows)
        self._pixels = [preprocess(image, model.preprocess)[None] for image in images]
        vision = vision_graph(model)
        self._eager = [vision.run_eager({"pixels": pixels})["image_embeds"] for pixels in self._pixels]
        self.items, self.eager = len(images), 100.0

    def measure(self, bundle: Bundle, progress: Progress) -> Accuracy:
        with CPU.open(bundle, "vision") as engine:
            found = [engine.run({"pixels": pixels})["image_embeds"] for pixels in self._pixels]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, self._eager, strict=True)]
        share = mean_score([float(error < 0.2) for error in errors], seed=0)
        value, low, high = (100 * (1 - share[end]) for end in ("value", "high", "low"))
        return Accuracy(100 - value, value, low, high, share["method"])


@pytest.fixture(scope="module")
def mended(planted: Export, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("mended") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Metric", Features)
        return read_bundle(planted(out, config(held_out, plot=True), precision="int8"))


def test_plain_int8_fails_and_few_products_mend_it(mended: Bundle, planted: Export) -> None:
    gate = json.loads(mended.file(module.REPORT).read_text())
    plain, chosen = gate["candidates"][0], gate["candidates"][gate["chosen"]]
    assert plain["what"] == "as written"
    assert plain["accuracy"]["drop"] > 0.5
    assert chosen["accuracy"]["drop"] <= 0.5
    assert gate["complete"]
    traced = [onnx.load(planted.fp32 / "onnx" / f"{name}.onnx") for name in ("vision", "qformer")]
    assert gate["products"] == count_products(traced) > 40
    assert 1 <= chosen["nodes_restored"] < 0.15 * gate["products"]
    worst = gate["blocks"][0]
    assert worst["name"] == f"vision {2 * LAYER + 3}: feed-forward", "where the outliers were planted"
    assert set(chosen["restored"]["vision"]) <= set(worst["nodes"])


def test_what_is_restored_is_in_the_file_and_in_the_reports(mended: Bundle, planted: Export) -> None:
    gate = json.loads(mended.file(module.REPORT).read_text())
    kept = json.loads(mended.file("precision.json").read_text())
    card = mended.file("README.md").read_text()
    for graph in ("vision", "qformer"):
        restored = gate["candidates"][gate["chosen"]]["restored"].get(graph, [])
        written = onnx.load(mended.graph(graph))
        rounded = {o for node in written.graph.node if node.op_type == "DequantizeLinear" for o in node.output}
        products = set(lowered_nodes(onnx.load(planted.fp32 / "onnx" / f"{graph}.onnx"), written)) | set(restored)
        in_int8 = {node.name for node in written.graph.node if node.name in products and rounded & set(node.input)}
        assert in_int8 == products - set(restored), "the restored ones read nothing that was rounded"
        assert sorted(node["node"] for node in kept[graph]["kept"] if node["why"] == ASKED) == restored
        assert all(f"`{node}`" in card for node in restored)
    assert "**in this bundle**" in card
    with Image.open(mended.file(module.PLOT)) as picture:
        assert picture.size[0] > 800


def test_every_candidate_is_recorded(mended: Bundle) -> None:
    gate = json.loads(mended.file(module.REPORT).read_text())
    assert len(gate["candidates"]) >= 4
    assert [one for one in gate["candidates"] if one["pareto"]]
    for one in gate["candidates"]:
        assert one["bytes"] > 0
        assert one["ms"] > 0 < one["fp32_ms"]
        assert one["accuracy"]["low"] <= one["accuracy"]["drop"] <= one["accuracy"]["high"]
    plain, everything = gate["candidates"][:2]
    assert (plain["nodes_restored"], everything["nodes_restored"]) == (0, gate["products"])
    assert plain["bytes"] < everything["bytes"]
    assert gate["blocks"] == sorted(gate["blocks"], key=lambda block: -block["error"])


def test_an_interrupted_search_leaves_the_old_bundle(
    mended: Bundle, planted: Export, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    out = tmp_path / "bundle"
    planted(out)
    before = read_bundle(out).manifest

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "Metric", Features)
    monkeypatch.setattr("export.gate.search.rank_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planted(out, config(held_out), precision="int8")
    assert read_bundle(out).manifest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_a_bundle_beyond_help_is_not_written(
    planted: Export, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 there is nothing to restore; the metric is made to fail."""
    monkeypatch.setattr("export.gate.metric.Accuracy.holds", lambda *_: False)
    with pytest.raises(CheckFailed, match="even with nothing in lower precision to restore; nothing was written"):
        planted(tmp_path / "out", config(held_out))
    assert not list(tmp_path.iterdir())


def test_a_drop_without_data_is_told_before_any_work(planted: Export, held_out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected held-out data to measure on"):
        planted(tmp_path / "out", config(held_out, data=None), precision="int8")
