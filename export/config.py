"""Every export setting: one name, one default, one place. pydantic only: reading a recipe never loads torch."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from runtime.precision import LanguagePrecision, Precision, Target
from runtime.settings import Settings

Heads = Literal["generate", "retrieval", "both"]


class Tolerance(Settings):
    """How far a graph may be from eager PyTorch; a bundle that misses any of it is not written."""

    max_error: NonNegativeFloat
    """Largest error of an output, as a fraction of eager's largest value in it."""
    min_cosine: float = Field(ge=0, le=1)
    """Smallest cosine between an output and eager's."""
    differing_answers: float = Field(ge=0, le=1)
    """Share of greedy answers whose tokens may differ from eager's."""


class ExportConfig(Settings):
    """What is written into a bundle, and on how much data it is checked."""

    precisions: tuple[Precision, ...] = Field(default=("fp32", "int8"), min_length=1)
    """Bundles that `qforge run` makes, one folder each (`bundle-fp32`, `bundle-int8`)."""
    language_precision: LanguagePrecision = "fp32"
    """Numeric type of the language model; the vision graph and the Q-Former take the bundle's precision."""
    target: Target = "onnxruntime"
    """Who the graphs are written for."""
    heads: Heads | None = None
    """What the bundle can do: generate (caption, vqa), retrieval (index, search), or both; null: what the checkpoint's
    last stage trained. Stage 2 and the fine-tunes on captions or questions move the Q-Former and leave the retrieval
    heads behind, so searching with such a checkpoint works less well than with its stage 1."""
    calibration_images: PositiveInt = 128
    """Images that INT8 activation ranges are measured on; fewer in the manifests is an error."""
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
    def _reference_fits_a_batch(self) -> "ExportConfig":
        if self.reference_items > self.max_batch:
            raise ValueError(f"reference_items {self.reference_items} exceeds max_batch {self.max_batch}; lower it")
        return self
