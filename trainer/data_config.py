"""The data section of a recipe: one name, one default, one place. pydantic only: reading a recipe never loads torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from runtime.settings import Settings


class DemoWorldConfig(Settings):
    """The procedurally drawn scenes."""

    train_scenes: PositiveInt = 6_000
    """Scenes of the train split."""
    val_scenes: PositiveInt = 200
    """Scenes watched during training."""
    test_scenes: PositiveInt = 400
    """Scenes reported on; no content of theirs occurs in the other splits."""
    questions_per_scene: PositiveInt = 6
    """Questions asked about each scene."""
    image_size: PositiveInt = 128
    """Side of a drawn picture (pixels)."""
    seed: NonNegativeInt = 0
    """Seed of the scenes."""


Format = Literal["manifest", "coco", "karpathy", "flickr30k", "vqav2", "records", "webdataset", "huggingface"]
"""How a data set is written; `trainer.sources` has a reader for each."""


class SourceConfig(Settings):
    """One data set, and its part in a mixture."""

    path: str
    """File, folder or shards (`cc3m/{000..331}.tar`), below `data.root`."""
    format: Format | None = None
    """How it is written; null: told by its content."""
    split: str | None = None
    """Which split of a file that has several: `train`, `train+restval` for two of them, `all`."""
    images: str | None = None
    """Folder of the images, below `data.root`; null: the folder of the file."""
    answers: str | None = None
    """VQAv2's annotation file, beside its question file in `path`, below `data.root`."""
    weight: PositiveFloat = 1.0
    """Share of a mixture, relative to the other sources' weights."""


def _as_sources(value: Any) -> Any:
    """A path alone, a section alone, or a list of both, as a list of sections."""
    listed = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in listed)


Sources = Annotated[
    tuple[SourceConfig, ...],
    BeforeValidator(_as_sources, json_schema_input_type=str | SourceConfig | tuple[str | SourceConfig, ...]),
    Field(min_length=1),
]
"""A path, or `{path, format, split, weight …}`, or a list of these that is mixed by weight."""


def _named(path: str) -> tuple[SourceConfig, ...]:
    return (SourceConfig(path=path),)


class AugmentConfig(Settings):
    """Random changes to training images. Any of them sends every image of every step through the frozen tower."""

    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] | None = None
    """Share of the area that a random resized crop keeps, from and to (`[0.5, 1.0]` as published); null: no crop."""
    flip: bool = False
    """Mirror every other image (as published); not for text that says left and right."""
    operations: NonNegativeInt = 0
    """RandAugment operations drawn per image (LAVIS draws 2 for Visual Genome); 0 switches it off."""
    magnitude: NonNegativeFloat = Field(default=5.0, le=10)
    """Strength of those operations, of 10."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        if self.crop_scale is not None and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale {list(self.crop_scale)} goes from more to less; put the smaller share first")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self.crop_scale is not None or self.flip or self.operations > 0


class FeaturesConfig(Settings):
    """Features of the frozen image encoder, kept on the disk from epoch to epoch and from run to run."""

    folder: Path | None = None
    """Folder that keeps them, in half precision, for any number of runs and image encoders; null: memory alone, exact.
    """
    limit_gb: PositiveFloat = 100.0
    """Most that the folder may hold (10^9 bytes); images beyond pass the encoder each time. ViT-g at 224 pixels: 0.72
    MB each."""


class DataConfig(Settings):
    """Where the image-text pairs come from: data sets below a folder, or the demo world."""

    root: Path | None = None
    """Folder of the data sets; absent: the demo world is drawn beside the run."""
    captions_train: Sources = _named("captions_train.jsonl")
    """Captions to train on: a path below `root`, a source, or a list of weighted sources."""
    captions_val: Sources | None = _named("captions_val.jsonl")
    """Captions watched during training; null: `holdout` of the training images."""
    captions_test: Sources = _named("captions_test.jsonl")
    """Captions reported on at the end; never trained on nor watched."""
    vqa_train: Sources = _named("vqa_train.jsonl")
    """Questions to train on."""
    vqa_val: Sources | None = _named("vqa_val.jsonl")
    """Questions watched during training; null: `holdout` of the training images."""
    vqa_test: Sources = _named("vqa_test.jsonl")
    """Questions reported on at the end."""
    holdout: float = Field(default=0.05, gt=0, lt=1)
    """Share of training images set aside for watching where a `*_val` is null."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images."""
    features: FeaturesConfig = FeaturesConfig()
    """Cache of the frozen image encoder's features; not for images that are changed at random."""
    demo: DemoWorldConfig = DemoWorldConfig()
    """The demo world, when `root` is absent."""

    @model_validator(mode="after")
    def _features_are_of_unchanged_images(self) -> "DataConfig":
        if self.features.folder is not None and self.augment.active:
            raise ValueError(
                "features.folder keeps what the image encoder makes of an image, which augment would change at every "
                "step; set features.folder to null, or switch crop_scale, flip and operations of augment off"
            )
        return self
