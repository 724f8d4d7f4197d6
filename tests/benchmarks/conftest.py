"""A tiny untrained model on a tiny world, exported for real, once per test run."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from export.config import ExportConfig
from export.pipeline import export_bundle
from runtime.progress import Progress
from tests.tiny import write_tiny_halves
from tests.traces import shared_operators as shared_operators
from trainer.blip2 import new_blip2
from trainer.checkpoint import write_checkpoint
from trainer.data_config import DemoWorldConfig
from trainer.demo_world import write_demo_world

WORLD = DemoWorldConfig(train_scenes=48, val_scenes=12, test_scenes=12, questions_per_scene=3, image_size=32)


class TinyExport(NamedTuple):
    """Folders."""

    bundle: Path
    checkpoint: Path
    data: Path


@pytest.fixture(scope="session")
def tiny_export(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    """An FP32 bundle, the checkpoint it was made from, and the manifests."""
    root, quiet = tmp_path_factory.mktemp("export"), Progress(quiet=True)
    data = write_demo_world(WORLD, root / "data", quiet)
    torch.manual_seed(0)
    model = new_blip2(write_tiny_halves(root / "halves"), question_conditioned=True).eval()
    (root / "checkpoint").mkdir()
    write_checkpoint(model, root / "checkpoint", stage="vqa", metrics={}, recipe_yaml="")
    bundle = export_bundle(
        root / "checkpoint",
        root / "bundle-fp32",
        ExportConfig(verification_images=8, max_batch=4),
        precision="fp32",
        calibration=[data / "vqa_train.jsonl"],
        recipe_yaml="",
        reuse=None,
        progress=quiet,
    )
    return TinyExport(bundle, root / "checkpoint", data)
