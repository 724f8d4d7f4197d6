"""A graph is copied exactly when nothing that it is made from has changed."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from export import calibrate, pipeline, reuse
from export.graphs import Graph, graphs_of
from export.precision import plan
from runtime.bundle import Bundle, read_bundle
from runtime.errors import BundleError
from runtime.progress import Progress
from tests.export.conftest import CONFIG, Export
from tests.export.test_pipeline import damaged, must_not_run
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint


class Notes(Progress):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that are traced from now on."""
    traced, real = list[str](), pipeline.trace

    def trace(graph: Graph, folder: Path) -> Path:
        traced.append(graph.name)
        return real(graph, folder)

    monkeypatch.setattr(pipeline, "trace", trace)
    return traced


def test_another_checkpoint_with_one_part_changed(
    export: Export, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, traced, notes = damaged(checkpoint, tmp_path / "other", value=0.5), watched(monkeypatch), Notes()
    out = Export(other, export.manifests, export.fp32)(tmp_path / "out", progress=notes)
    assert traced == ["qformer"]
    assert notes.told == [f"{export.fp32}: unchanged and taken from there: vision, embed, language"]
    old, new = read_bundle(export.fp32).manifest.graphs, read_bundle(out).manifest.graphs
    assert [name for name in new if new[name].sha256 != old[name].sha256] == ["qformer"]
    assert [name for name in new if new[name].made_from != old[name].made_from] == ["qformer"]


def test_exporting_again_to_the_same_place_makes_nothing(
    bundle_int8: Bundle, checkpoint: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INT8 too: neither traced, nor calibrated, nor quantised."""
    out, notes = shutil.copytree(bundle_int8.path, tmp_path / "out"), Notes()
    for module, name in ((pipeline, "trace"), (pipeline, "judge_graphs"), (calibrate, "calibration_feeds")):
        monkeypatch.setattr(module, name, must_not_run)
    monkeypatch.setattr(plan, "take", must_not_run)
    Export(checkpoint, export.manifests)(out, CONFIG, precision="int8", progress=notes)
    assert notes.told == [f"{out}: unchanged and taken from there: vision, qformer, embed, language"]
    assert read_bundle(out).manifest == bundle_int8.manifest


def test_other_calibration_is_another_graph(
    bundle_int8: Bundle, checkpoint: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, traced = shutil.copytree(bundle_int8.path, tmp_path / "out"), watched(monkeypatch)
    fewer = CONFIG.model_copy(update={"calibration_images": 11})
    export(out, fewer, precision="int8")
    assert traced == []  # the fp32 graphs were at hand
    old, new = bundle_int8.manifest.graphs, read_bundle(out).manifest.graphs
    assert {name for name in new if new[name].made_from != old[name].made_from} == {"vision", "qformer", "language"}
    assert new["vision"].sha256 != old["vision"].sha256


def test_a_file_changed_by_hand_is_not_taken(
    bundle_fp32: Bundle, checkpoint: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited, notes = shutil.copytree(bundle_fp32.path, tmp_path / "edited"), Notes()
    with (edited / "onnx/embed.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"embed\.onnx: the file was changed"):
        export(tmp_path / "out", reuse=edited)
    assert not (tmp_path / "out").exists()
    traced = watched(monkeypatch)
    Export(checkpoint, export.manifests, bundle_fp32.path)(edited, progress=notes)  # and replaced, which mends it
    assert traced == [] and "nothing of the old bundle is taken over" in notes.told[0]
    assert read_bundle(edited).manifest == bundle_fp32.manifest


def test_a_bundle_without_hashes_is_traced_again(bundle_fp32: Bundle, tmp_path: Path) -> None:
    """Bundles written before the hash existed load, and nothing of them is copied."""
    entry = bundle_fp32.manifest.graphs["embed"]
    old = bundle_fp32.manifest.model_copy(update={"graphs": {"embed": entry.model_copy(update={"made_from": None})}})
    known = reuse.Sources((Bundle(bundle_fp32.path, old),), Notes())
    assert known.copy({"embed": str(entry.made_from)}, tmp_path) == frozenset()


def test_the_hash_is_of_the_graph_and_of_nothing_else(model: Blip2, checkpoint: Path) -> None:
    again = graphs_of(load_checkpoint(checkpoint))
    hashes = {name: reuse.traced_from(graph) for name, graph in graphs_of(model).items()}
    assert hashes == {name: reuse.traced_from(graph) for name, graph in again.items()}
    assert len(set(hashes.values())) == len(hashes)


@pytest.mark.parametrize("change", ["weight", "layer", "epsilon", "axis", "attention"])
def test_every_kind_of_change_is_another_hash(change: str, checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    graph = graphs_of(model)["vision"]
    before = reuse.traced_from(graph)
    if change == "weight":
        with torch.no_grad():
            next(graph.module.parameters()).view(-1)[0] += 1e-3
    elif change == "layer":
        model.vision.layer = -2
    elif change == "epsilon":
        next(part for part in graph.module.modules() if isinstance(part, nn.LayerNorm)).eps = 1e-3
    elif change == "axis":
        graph.inputs["pixels"].varying[2] = "height"
    else:
        model.vision.model.config._attn_implementation = "eager"
    assert reuse.traced_from(graph) != before
