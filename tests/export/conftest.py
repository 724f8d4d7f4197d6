"""A tiny model with random weights, exported once per run in fp32 and in INT8, and real pictures to judge it on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from export.config import ExportConfig
from export.graphs import Graph, graphs_of
from export.pipeline import export_bundle
from runtime.answers import Request
from runtime.bundle import Bundle, read_bundle
from runtime.progress import Progress
from tests.export.family_exports import Family, family_exporter
from tests.tiny import widen, write_tiny_halves
from tests.traces import shared_operators as shared_operators
from trainer.blip2 import Blip2, new_blip2
from trainer.checkpoint import load_checkpoint, write_checkpoint
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import write_demo_world

QUIET = Progress(quiet=True)
CONFIG = ExportConfig(calibration_images=12, verification_images=6, max_batch=5, language_precision="int8")
WIDE = CONFIG.model_copy(update={"language_precision": "fp32", "fused": True, "image_sizes": (24, 20)})
FP32 = CONFIG.model_copy(update={"language_precision": "fp32"})
BOTH = FP32.model_copy(update={"heads": "both"})


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of manifests: 24 training images with captions and questions."""
    config = DemoWorldConfig(train_scenes=24, val_scenes=2, test_scenes=2, questions_per_scene=3, image_size=32)
    return write_demo_world(config, tmp_path_factory.mktemp("world") / "data", QUIET)


@pytest.fixture(scope="session")
def manifests(world: Path) -> list[Path]:
    return [world / "captions_train.jsonl", world / "vqa_train.jsonl"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Question-conditioned; weights large enough that image and question change the answers."""
    torch.set_num_threads(1)
    config = write_tiny_halves(tmp_path_factory.mktemp("halves")).model_copy(update={"max_new_tokens": 8})
    torch.manual_seed(1)
    model = new_blip2(config, question_conditioned=True)
    widen(model.bridge, 0.15, matrices_only=True)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    folder.mkdir()
    write_checkpoint(model, folder, stage="vqa", metrics={}, recipe_yaml="seed: 1\n")
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Blip2:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def graphs(model: Blip2) -> dict[str, Graph]:
    return graphs_of(model)


@dataclass(frozen=True)
class Export:
    """`export_bundle` with this module's checkpoint and pictures; keywords replace its arguments."""

    checkpoint: Path
    manifests: list[Path]
    fp32: Path | None = None

    def __call__(self, out: Path, config: ExportConfig = FP32, **changes: object) -> Path:
        arguments = {
            "precision": "fp32",
            "calibration": self.manifests,
            "recipe_yaml": "seed: 1\n",
            "reuse": self.fp32,
            "progress": QUIET,
        }
        return export_bundle(self.checkpoint, out, config, **(arguments | changes))


@pytest.fixture(scope="session")
def bundle_fp32(checkpoint: Path, manifests: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "fp32"
    return read_bundle(Export(checkpoint, manifests)(out))


@pytest.fixture(scope="session")
def export(checkpoint: Path, manifests: list[Path], bundle_fp32: Bundle) -> Export:
    """Reuses the traced graphs, so one more export takes about a second."""
    return Export(checkpoint, manifests, bundle_fp32.path)


FORMS = {
    "fp16": ("fp16", "fp16", "onnxruntime"),
    "bf16": ("bf16", "bf16", "onnxruntime"),
    "fp8": ("fp8", "int4", "onnxruntime"),
    "int8-tensorrt": ("int8", "int8", "tensorrt"),
    "fp8-tensorrt": ("fp8", "int4", "tensorrt"),
}
"""Name → precision, of the language model, target; fp32 and INT8 for ONNX Runtime have fixtures of their own."""


@pytest.fixture(scope="session")
def form_of(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """A row of `FORMS` as a bundle, exported when it is first asked for."""

    @cache
    def bundle(form: str) -> Bundle:
        precision, language, target = FORMS[form]
        config = FP32.model_copy(update={"language_precision": language, "target": target})
        return read_bundle(export(tmp_path_factory.mktemp(form) / "bundle", config, precision=precision))

    return bundle


@pytest.fixture(scope="session")
def bundle_wide(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Several image sizes, and a graph for captions; embed and language are taken over."""
    return read_bundle(export(tmp_path_factory.mktemp("bundles") / "wide", WIDE))


@pytest.fixture(scope="session")
def bundle_both(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Answers and searches; the answering graphs are those of `bundle_fp32`, the others are traced here."""
    return read_bundle(export(tmp_path_factory.mktemp("bundles") / "both", BOTH))


@pytest.fixture(scope="session")
def bundle_int8(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """INT8 throughout, the language model too."""
    return read_bundle(export(tmp_path_factory.mktemp("bundles") / "int8", CONFIG, precision="int8"))


@pytest.fixture(scope="session")
def images(world: Path) -> list[Path]:
    return sorted((world / "images").glob("train-*.png"))


@pytest.fixture(scope="session")
def asked(images: list[Path]) -> list[Request]:
    """24 images, three requests each: a caption, a question, and a prompt or question of another length."""
    found = []
    for number, image in enumerate(images):
        other = Request(image, "how many blue ones are there", "{}") if number % 2 else Request(image, prompt="two")
        found += [Request(image), Request(image, f"what is left of number {number}?"), other]
    return found


@pytest.fixture(scope="session")
def family(
    model: Blip2,
    bundle_fp32: Bundle,
    manifests: list[Path],
    images: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Family]:
    """Family by name, exported in fp32 when it is first asked for."""
    return family_exporter(model, bundle_fp32, manifests, images, tmp_path_factory.mktemp("families"))
