"""The training stages of a recipe: every dial of the optimiser and the losses, with its only default.

Defaults are BLIP-2's published values (arXiv 2301.12597, section 4.1 and tables 7-9) where the paper states one; a
recipe says only what differs. pydantic only: reading a recipe never loads torch.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from runtime.settings import Settings
from trainer.config import STAGES, ModelConfig

OF_THE_LOG = frozenset({"log_every", "tensorboard", "save_every"})
"""Settings of a stage that change no weight and no measurement: what is finished stays so when they change, and what is
not goes on. `eval_every` is none of them: it says which measurements metrics.json holds."""


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a recipe (JSON-able, by name) without what of a stage does not decide its result."""
    return {
        name: {key: value for key, value in section.items() if key not in OF_THE_LOG} if name in STAGES else section
        for name, section in settings.items()
    }


class StageConfig(Settings):
    """What all stages share: length, batch, optimiser (AdamW, warm-up, cosine per step), precision."""

    steps: PositiveInt
    """Optimiser steps."""
    batch_size: PositiveInt
    """Image-text pairs in a step, over all processes together."""
    learning_rate: PositiveFloat = 1e-4
    """Peak rate."""
    min_learning_rate: NonNegativeFloat = 1e-5
    """Rate at the end of the cosine."""
    warmup_steps: NonNegativeInt = 2_000
    """Steps of linear warm-up from zero."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW, first moment."""
    beta2: float = Field(default=0.98, ge=0, lt=1)
    """AdamW, second moment."""
    weight_decay: NonNegativeFloat = 0.05
    """Decay of matrices; vectors, scalars, embeddings and queries are not decayed."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 switches clipping off."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Autocast type of the forward pass (fp16 with a loss scale); weights and optimiser stay fp32."""
    accumulation: PositiveInt = 1
    """Parts in which each process takes its rows, one after the other, for a batch that does not fit into memory; the
    contrastive batch stays the whole one."""
    shard: tuple[Literal["vision", "language"], ...] = ()
    """Halves whose layers are shared out among the processes (FSDP2), for what does not fit on one device."""
    compile: bool = False
    """Compile the frozen halves (torch.compile): faster steps after a slow first one."""
    eval_every: PositiveInt = 1_000
    """Steps between held-out metrics (always measured at the end)."""
    eval_items: PositiveInt = 256
    """Held-out items per measurement."""
    save_every: PositiveInt = 1_000
    """Steps between resume points."""
    log_every: PositiveInt = 10
    """Steps between lines of training.jsonl (the first and the last step have one too); no finished stage is trained
    again for it."""
    tensorboard: bool = False
    """Write the log's numbers for TensorBoard too, into `tensorboard/` of the checkpoint; no finished stage is trained
    again for it."""
    warmup_learning_rate: NonNegativeFloat = 0.0
    """Rate that warm-up begins with."""
    projection_rate: PositiveFloat = 1.0
    """Rate of the projection into the language model, in units of `learning_rate`."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average of the trained weights, which is then what is measured and saved; 0: none.
    """
    image_size: PositiveInt | None = None
    """Side of the pixels in this stage, positions interpolated from the tower's own; null: `model.image_size`."""
    train_vision: bool = False
    """Train the image encoder too; the checkpoint then holds it."""
    vision_rate: PositiveFloat = 1.0
    """Rate of the trained image encoder's last layer, in units of `learning_rate`."""
    vision_layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Rate of each layer of the trained image encoder in units of the next one's; embeddings have the lowest."""
    vision_checkpointing: bool = False
    """Compute the trained image encoder's activations again in the backward pass instead of keeping them."""

    @model_validator(mode="after")
    def _vision_is_trained(self) -> "StageConfig":
        for name in ("vision_rate", "vision_layer_decay", "vision_checkpointing"):
            if not self.train_vision and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for a trained image encoder; set train_vision too, or leave it out")
        return self

    @model_validator(mode="after")
    def _scale_is_whole(self) -> "StageConfig":
        if self.precision == "fp16" and self.train_vision and "vision" in self.shard:
            raise ValueError("a trained image encoder that is sharded has no fp16 loss scale; set precision to bf16")
        return self

    def adapted(self, model: ModelConfig) -> ModelConfig:
        """The model section as this stage trains it."""
        return model if self.image_size is None else model.model_copy(update={"image_size": self.image_size})


class Stage1Config(StageConfig):
    """Representation learning with a frozen image encoder: ITC + ITM + ITG."""

    steps: PositiveInt = 250_000
    batch_size: PositiveInt = 1_680
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Smoothing of the ITC and ITG targets."""
    itc_weight: NonNegativeFloat = 1.0
    """Weight of image-text contrast; 0 switches it off."""
    itm_weight: NonNegativeFloat = 1.0
    """Weight of image-text matching; 0 switches it off."""
    itg_weight: NonNegativeFloat = 1.0
    """Weight of image-grounded text generation; 0 switches it off."""
    itc_key_gradient: bool = True
    """Whether ITC's gradient also reaches the features that an anchor is compared with, on all processes, as the loss
    has it; false is LAVIS' way (image features then learn as image-to-text anchors alone, texts likewise)."""
    itc_queue: NonNegativeInt = 0
    """Pairs of past steps that ITC compares with, encoded by a momentum encoder (57,600 in BLIP); 0: neither. At least
    `batch_size`."""
    itc_momentum: float = Field(default=0.995, ge=0, lt=1)
    """Share of itself that the momentum encoder keeps in a step."""
    temperature_range: tuple[PositiveFloat, PositiveFloat] | None = None
    """Limits the learned temperature is held to ([0.001, 0.5] in BLIP); null: none, as BLIP-2."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Stage1Config":
        if not (self.itc_weight or self.itm_weight or self.itg_weight):
            raise ValueError("itc_weight, itm_weight and itg_weight are all 0; give one of them a weight")
        if 0 < self.itc_queue < self.batch_size:
            raise ValueError(
                f"itc_queue {self.itc_queue} holds less than a batch ({self.batch_size}); 0 switches it off"
            )
        if self.itc_queue and not self.itc_weight:
            raise ValueError("itc_queue serves ITC, but itc_weight is 0")
        if self.temperature_range is not None and self.temperature_range[0] > self.temperature_range[1]:
            raise ValueError(f"temperature_range {list(self.temperature_range)}: expected the smaller limit first")
        return self


class SpeakingConfig(StageConfig):
    """What stages share that learn through the language model."""

    language_dropout: bool = False
    """Keep the frozen language model's dropout on in training, as LAVIS does; off, it is in eval mode."""


class Stage2Config(SpeakingConfig):
    """Generative learning with a frozen language model, captions only."""

    steps: PositiveInt = 80_000
    batch_size: PositiveInt = 1_920
    min_learning_rate: NonNegativeFloat = 5e-5
    itc_weight: NonNegativeFloat = 0.0
    """Weight of image-text contrast kept beside the language model's loss, so that the queries stay aligned; 0: none.
    """
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Smoothing of the ITC targets."""


class CaptionConfig(SpeakingConfig):
    """Fine-tune on captions behind a prompt (COCO, paper table 7: 5 epochs of 566,747 captions)."""

    steps: PositiveInt = 11_070
    batch_size: PositiveInt = 256
    learning_rate: PositiveFloat = 1e-5
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 1_000
    beta2: float = Field(default=0.999, ge=0, lt=1)
    prompt: str = "a photo of"
    """Text that the language model continues with a caption; it becomes the checkpoint's `caption_prompt`."""

    def adapted(self, model: ModelConfig) -> ModelConfig:
        """With this stage's prompt, which is then the model's."""
        return super().adapted(model).model_copy(update={"caption_prompt": self.prompt})


class VqaConfig(SpeakingConfig):
    """Fine-tune in which the question conditions the Q-Former (VQAv2, paper table 8), on dialogues too."""

    steps: PositiveInt = 20_000
    batch_size: PositiveInt = 128
    learning_rate: PositiveFloat = 1e-5
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 1_000
    beta2: float = Field(default=0.999, ge=0, lt=1)
    caption_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Share of each batch that stays image captioning, so that one model keeps both skills."""
    dialogue_tokens: PositiveInt = 256
    """Longest prompt (tokens) of a dialogue; its oldest turns that do not fit are left out, as in `qforge chat`."""


class RetrievalConfig(Stage1Config):
    """Fine-tune of stage 1's objective for search (COCO, paper table 9: 5 epochs), measured with re-ranking."""

    steps: PositiveInt = 12_651
    batch_size: PositiveInt = 224
    learning_rate: PositiveFloat = 1e-5
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 1_000
    beta2: float = Field(default=0.999, ge=0, lt=1)
    candidates: int = Field(default=128, ge=10)
    """How many of each ITC ranking are ranked again by ITM logit + ITC cosine when the held-out rows are measured."""
