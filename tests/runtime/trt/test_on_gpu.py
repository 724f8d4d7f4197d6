"""The contract on a real GPU: plans built here, run here, equal to ONNX Runtime's CPU. Skips itself without one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.engines.build import build_bundle
from export.engines.builder import open_builder
from export.engines.targets import ComputeCapability
from runtime.backends import CPU, Device
from runtime.backends.trt.choice import lacks
from runtime.backends.trt.engine import TrtEngine
from runtime.bundle import Bundle
from runtime.engine_manifest import BuiltEngine, EngineName, EngineOptions
from runtime.gpu import compute_capability_here, installed_engines
from runtime.progress import Progress
from runtime.replay import replay
from tests.runtime.trt.fakes import with_axes


def built(path: Path, engine: EngineName, capability: tuple[int, int]) -> tuple[Bundle, BuiltEngine]:
    """The tiny bundle with plans for a GPU."""
    bundle, gpus = with_axes(path), (ComputeCapability(*capability),)
    made = build_bundle(bundle, open_builder(engine), gpus, options=EngineOptions(), progress=Progress(quiet=True))
    return bundle, made


def test_the_bundle_of_this_test_builds_without_a_gpu(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx, which the dev extra installs")
    _, made = built(make_tiny_bundle(tmp_path / "bundle", max_batch=4), "tensorrt-rtx", (8, 6))
    assert sorted(made.manifest.graphs) == ["embed", "language", "qformer", "vision"]
    assert made.checked_plan("vision").stat().st_size > 1000


@pytest.mark.gpu
@pytest.mark.skipif(lacks() is not None, reason=f"needs {lacks()}")
def test_a_bundle_on_the_gpu_here(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    capability = compute_capability_here()
    assert capability is not None
    bundle, _ = built(make_tiny_bundle(tmp_path / "bundle", max_batch=4), next(iter(installed_engines())), capability)
    assert all(check.ok for check in replay(bundle, Device("trt")))
    feeds = [{"pixels": np.random.default_rng(seed).random((2, 3, 8, 8), np.float32)} for seed in range(4)]
    with Device("trt").open(bundle, "vision") as engine, CPU.open(bundle, "vision") as truth:
        for feed in feeds:
            found, expected = engine.run(feed)["image_embeds"], truth.run(feed)["image_embeds"]
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert isinstance(engine, TrtEngine) and engine.counts.replays >= 2 and engine.counts.unfit == 0
    assert list((tmp_path / "cache" / "qforge" / "checked").iterdir())
