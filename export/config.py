"""Every export setting: one name, one default, one place. pydantic only: reading a recipe never loads torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from runtime.precision import LanguagePrecision, Precision, RangeMethod, Target
from runtime.settings import Settings

Heads = Literal["generate", "retrieval", "both"]
GateTask = Literal["caption", "vqa", "retrieval", "agreement"]
"""What the accuracy gate measures; agreement: share of greedy answers that are eager's, where there are no labels."""


class Tolerance(Settings):
    """How far a graph may be from eager PyTorch; a bundle that misses any of it is not written."""

    max_error: NonNegativeFloat
    """Largest error of an output, as a fraction of eager's largest value in it."""
    min_cosine: float = Field(ge=0, le=1)
    """Smallest cosine between an output and eager's."""
    differing_answers: float = Field(ge=0, le=1)
    """Share of greedy answers whose tokens may differ from eager's."""


class GateConfig(Settings):
    """How much accuracy a bundle may lose against eager PyTorch, and on which held-out items that is measured."""

    max_drop: NonNegativeFloat | None = None
    """Points (percent) of the task's metric that may be lost; where more are lost, nodes are put back to a higher
    precision until it holds, and where that does not help, nothing is written. null: not measured."""
    task: GateTask | None = None
    """What is measured."""
    data: Path | None = None
    """Manifest of held-out items; none of its images may be calibrated on. null: a run takes its validation split."""
    items: PositiveInt | None = 400
    """Items at most, chosen by seed; null: all of them."""
    seed: NonNegativeInt = 0
    """Seed of the choice and of the interval."""
    candidates: int = Field(default=40, ge=2)
    """Bundles that the search may measure at most: the one as written, the one with everything restored, and more."""
    plot: bool | None = None
    """`pareto.png` beside the table of all candidates, which needs matplotlib; null: where that is installed."""

    @model_validator(mode="after")
    def _has_a_limit(self) -> "GateConfig":
        if self.max_drop is None and (self.data is not None or self.task is not None):
            raise ValueError("data and task are of use with max_drop alone; set it, or leave them out")
        return self


class ExportConfig(Settings):
    """What is written into a bundle, and on how much data it is checked."""

    precisions: tuple[Precision, ...] = Field(default=("fp32", "int8"), min_length=1)
    """Bundles that `qforge run` makes, one folder each (`bundle-fp32`, `bundle-int8`)."""
    language_precision: LanguagePrecision = "fp32"
    """Numeric type of the language model; the vision graph and the Q-Former take the bundle's precision."""
    target: Target = "onnxruntime"
    """Who the graphs are written for."""
    static_cache: bool = False
    """Write a second decoder beside the portable one, whose cache has a fixed size and is updated in place: for GPU
    engines, in FP16 or BF16. It holds the decoder's weights once more."""
    range_method: RangeMethod = "minmax"
    """How ranges of INT8 and FP8 activations are found."""
    smooth_quant: float | None = Field(default=0.95, ge=0, le=1)
    """Strength of SmoothQuant in INT8: how much of an activation's outliers moves into the weights; null: none."""
    heads: Heads | None = None
    """What the bundle can do: generate (caption, vqa), retrieval (index, search), or both; null: what the checkpoint's
    last stage trained. Stage 2 and the fine-tunes on captions or questions move the Q-Former and leave the retrieval
    heads behind, so searching with such a checkpoint works less well than with its stage 1."""
    fused: bool = False
    """Whether captions get a graph of their own, vision and Q-Former in one; the bundle grows by both. Only for models
    whose Q-Former reads nothing for a caption."""
    image_sizes: tuple[PositiveInt, ...] = ()
    """Sides (pixels) of square images that the bundle reads beside the trained one, for captions and answers: one
    vision graph for all, its positions interpolated (bicubic) inside. Each size is verified."""
    calibration_images: PositiveInt = 128
    """Images that ranges are measured on (int8, fp8 and fp16); fewer in the manifests is an error."""
    verification_images: PositiveInt = 32
    """Other images on which every graph and every answer is compared with eager; fewer is an error."""
    seed: NonNegativeInt = 0
    """Seed of which images are drawn."""
    reference_items: PositiveInt = 4
    """Requests recorded with eager's outputs in `reference.npz`, which `qforge verify` replays."""
    max_batch: PositiveInt = 8
    """Largest batch (requests) the graphs are run and checked with."""
    max_positions: PositiveInt | None = None
    """Positions (image, prompt and answer) of the language model; null: all it was made for, 512 if it states none."""
    gate: GateConfig = GateConfig()
    """The accuracy gate."""
    fp32: Tolerance = Tolerance(max_error=1e-4, min_cosine=0.99999, differing_answers=0.0)
    """For graphs in fp32: the order of additions may differ, an answer may not."""
    fp16: Tolerance = Tolerance(max_error=0.02, min_cosine=0.9999, differing_answers=0.1)
    """For graphs in FP16: eleven bits of mantissa."""
    bf16: Tolerance = Tolerance(max_error=0.1, min_cosine=0.999, differing_answers=0.25)
    """For graphs in BF16: eight bits of mantissa."""
    int8: Tolerance = Tolerance(max_error=0.3, min_cosine=0.98, differing_answers=0.5)
    """For graphs in INT8: refuses what is broken; what it costs in accuracy is the benchmark's to judge."""
    fp8: Tolerance = Tolerance(max_error=0.3, min_cosine=0.98, differing_answers=0.5)
    """For graphs in FP8 (E4M3)."""
    int4: Tolerance = Tolerance(max_error=0.5, min_cosine=0.9, differing_answers=1.0)
    """For a language model of INT4 weights: a round-off of 1/15 of each block's range."""

    def tolerance(self, precision: Precision | LanguagePrecision) -> Tolerance:
        """How far a graph of this type may be from eager PyTorch."""
        return {
            "fp32": self.fp32,
            "fp16": self.fp16,
            "bf16": self.bf16,
            "int8": self.int8,
            "fp8": self.fp8,
            "int4": self.int4,
        }[precision]

    @model_validator(mode="after")
    def _static_cache_is_for_engines(self) -> "ExportConfig":
        if self.static_cache and (self.target != "tensorrt" or self.language_precision not in ("fp16", "bf16")):
            raise ValueError(
                f"static_cache needs target tensorrt and language_precision fp16 or bf16, found {self.target} and "
                f"{self.language_precision}; change them or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _reference_fits_a_batch(self) -> "ExportConfig":
        if self.reference_items > self.max_batch:
            raise ValueError(f"reference_items {self.reference_items} exceeds max_batch {self.max_batch}; lower it")
        return self
