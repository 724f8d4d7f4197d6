"""Bundles of both styles in the forms that TensorRT reads, and TensorRT-RTX, which builds them without a GPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from export import facts
from export.config import ExportConfig
from export.engines.builder import Builder, open_builder
from export.graphs import Graph, graphs_of
from export.precision.half import write_half
from export.trace import describe, trace
from runtime.bundle import Bundle, read_bundle, write_manifest
from tests.families import write_family
from trainer.blip2 import Blip2, new_blip2

CONFIG = ExportConfig(max_batch=5)


@pytest.fixture(scope="session")
def rtx() -> Builder:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which the dev extra installs on Linux and Windows")
    return open_builder("tensorrt-rtx")


def bundled(folder: Path, model: Blip2, names: tuple[str, ...], **changes: object) -> Bundle:
    """A bundle of ONNX files that lie in `folder` already."""
    (folder / "README.md").write_text("a test\n", encoding="utf-8")
    settings = {
        "model": facts.model_facts(model, "generate"),
        "precision": "fp16",
        "language_precision": "fp16",
        "target": "tensorrt",
        "limits": facts.limits(model, CONFIG, "generate"),
        "preprocess": model.preprocess,
        "prompts": facts.prompts(model, "generate"),
        "generation": facts.generation(model, "generate"),
        "graphs": {name: describe(folder / "onnx" / f"{name}.onnx") for name in names},
        "made_by": {"qforge": "a test"},
    }
    write_manifest(folder, **(settings | changes))
    return read_bundle(folder)


@pytest.fixture(scope="session")
def flan(model: Blip2, tmp_path_factory: pytest.TempPathFactory) -> Blip2:
    """Encoder-decoder: the gated T5 of tests/families.py behind the tiny vision tower."""
    config = write_family("flan", model.config, tmp_path_factory.mktemp("flan") / "language")
    torch.manual_seed(3)
    return new_blip2(config, question_conditioned=True).eval()


@pytest.fixture(scope="session")
def flan_fp16(flan: Blip2, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("flan-fp16")
    names = ("encoder", "decoder")
    graphs: dict[str, Graph] = graphs_of(flan)
    for name in names:
        example = {key: plan.example.numpy() for key, plan in graphs[name].inputs.items()}
        write_half(trace(graphs[name], folder), [example], (), low="fp16", bridge=False)
    return bundled(folder, flan, names)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Bundle], Bundle]:
    """A bundle of one's own, to build into or to spoil."""

    def copy(bundle: Bundle) -> Bundle:
        shutil.copytree(bundle.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
        return read_bundle(tmp_path / "bundle")

    return copy
