"""Bundles of both styles in the forms that TensorRT reads, and TensorRT-RTX, which builds them without a GPU."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from export import facts
from export.config import ExportConfig
from export.engines.builder import Builder, open_builder
from export.graphs import Arrays, Graph, graphs_of
from export.precision.plan import write_precision, writers_for
from export.trace import describe, trace
from runtime.bundle import Bundle, read_bundle, write_manifest
from runtime.encoder_decoder import SAID_MASK
from runtime.precision import LanguagePrecision, Precision
from runtime.reference import REFERENCE, read_reference
from runtime.speaker import LANGUAGE_GRAPHS
from tests.export.conftest import QUIET
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


@dataclass(frozen=True)
class Traced:
    """Graphs in fp32, and what they are written into another precision with."""

    folder: Path
    graphs: dict[str, Graph]
    feeds: dict[str, list[Arrays]]


@pytest.fixture(scope="session")
def flan_traced(flan: Blip2, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """Its encoder and decoder."""
    graphs = {name: graph for name, graph in graphs_of(flan).items() if name in LANGUAGE_GRAPHS[flan.style]}
    folder = tmp_path_factory.mktemp("flan-fp32")
    for graph in graphs.values():
        trace(graph, folder)
    return Traced(folder, graphs, spoken(graphs["encoder"], graphs["decoder"]))


@pytest.fixture(scope="session")
def flan_of(
    flan: Blip2, flan_traced: Traced, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[LanguagePrecision], Bundle]:
    """Both in a precision, written for TensorRT."""

    @cache
    def form(precision: LanguagePrecision) -> Bundle:
        folder, graphs = tmp_path_factory.mktemp(f"flan-{precision}"), flan_traced.graphs
        writers = writers_for(graphs, "fp16", precision, ExportConfig(target="tensorrt"))
        write_precision(folder, flan_traced.folder, writers, flan_traced.feeds, {}, QUIET)
        return bundled(folder, flan, tuple(graphs), language_precision=precision)

    return form


def spoken(encoder: Graph, decoder: Graph) -> dict[str, list[Arrays]]:
    """What both are fed while two rows of unequal length are read and two tokens said, as eager PyTorch computes it."""
    rng, width = np.random.default_rng(0), encoder.inputs["inputs_embeds"].example.shape[-1]

    def embeds(positions: int) -> np.ndarray:
        return rng.normal(size=(2, positions, width)).astype(np.float32)

    mask = np.ones((2, 9), np.int64)
    mask[1, :3] = 0
    read: Arrays = {"inputs_embeds": embeds(9), "attention_mask": mask}
    seen = encoder.run_eager(read)
    cross = {name: seen[name] for name in decoder.inputs if name.startswith("cross_")}
    past = {
        name: np.zeros((2, plan.example.shape[1], 0, plan.example.shape[3]), np.float32)
        for name, plan in decoder.inputs.items()
        if name.startswith("past_")
    }
    steps = list[Arrays]()
    for before in range(2):
        said_mask = {SAID_MASK: np.ones((2, before + 1), np.int64)}
        steps.append({"inputs_embeds": embeds(1), "attention_mask": mask, **said_mask, **past, **cross})
        said = decoder.run_eager(steps[-1])
        past = {name: said[name.replace("past_", "present_")] for name in past}
    return {"encoder": [read], "decoder": steps}


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Bundle, tuple[str, ...], Precision], Bundle]:
    """Graphs of an fp32 bundle in a precision, written for TensorRT on the real inputs that the bundle recorded."""

    @cache
    def written(source: Path, names: tuple[str, ...], precision: Precision) -> Bundle:
        bundle = read_bundle(source)
        feeds: dict[str, list[Arrays]] = {}
        for case in read_reference(bundle.file(REFERENCE)).cases:
            feeds.setdefault(case.graph, []).append(case.inputs)
        folder = tmp_path_factory.mktemp(f"{source.name}-{precision}")
        writers = writers_for(names, precision, "fp16", ExportConfig(target="tensorrt"))
        write_precision(folder, source, writers, feeds, {}, QUIET)
        for name in ("README.md", REFERENCE):
            shutil.copyfile(bundle.file(name), folder / name)
        manifest = bundle.manifest
        kept = ("model", "language_precision", "limits", "preprocess", "prompts", "generation", "made_by")
        graphs = {name: describe(folder / "onnx" / f"{name}.onnx") for name in names}
        stated = {name: getattr(manifest, name) for name in kept}
        write_manifest(folder, precision=precision, target="tensorrt", graphs=graphs, **stated)
        return read_bundle(folder)

    return lambda bundle, names, precision: written(bundle.path, names, precision)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Bundle], Bundle]:
    """A bundle of one's own, to build into or to spoil."""

    def copy(bundle: Bundle) -> Bundle:
        shutil.copytree(bundle.path, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines"))
        return read_bundle(tmp_path / "bundle")

    return copy
