"""Every benchmark setting: one name, one default, one place. pydantic only: reading a recipe never loads torch."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from runtime.provider import Provider
from runtime.settings import Settings


class BenchConfig(Settings):
    """How much is measured, how often, and what fails the gate."""

    items: PositiveInt | None = None
    """Test items of each task on which answers are scored and compared, evenly spaced; null takes all."""
    scoring_batch: PositiveInt = 64
    """Requests answered together while scoring."""
    threads: PositiveInt | None = None
    """CPU threads of PyTorch and of every engine alike; null takes the physical cores this process may use."""
    provider: Provider = "cpu"
    """What computes the bundles' graphs (cpu, cuda, tensorrt, openvino); eager PyTorch stays on the CPU."""
    batch_sizes: tuple[PositiveInt, ...] = (1, 8)
    """Requests per call whose latency is measured."""
    latency_calls: PositiveInt = 40
    """Timed calls per pipeline, task and batch size; every sample is kept."""
    warmup: NonNegativeInt = 3
    """Calls before the clock starts."""
    fresh_starts: NonNegativeInt = 3
    """New processes per pipeline in which cold start and peak memory are measured; 0 leaves both out."""
    fresh_items: PositiveInt = 8
    """Requests each of those processes answers, one at a time."""
    picture_items: PositiveInt = 6
    """Test images shown beside their answers in the report's picture."""
    max_drop: NonNegativeFloat = 1.0
    """Points of accuracy (percent) that a quantised bundle may lose against eager PyTorch."""
    seed: NonNegativeInt = 0
    """Seed of the image swap and of the bootstrap."""
