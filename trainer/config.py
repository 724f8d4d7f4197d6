"""Every training dial on one screen: one name, one default, one place.

Defaults are BLIP-2's published values (arXiv 2301.12597, section 4.1 and tables 7-9) where the paper states
one; a recipe says only what differs. pydantic only: reading a recipe never loads torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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

DEMO = "demo"
"""A source that names the small frozen halves shipped in `trainer/demo_halves/`."""
DEMO_T5 = "demo-t5"
"""A language model that names the shipped encoder-decoder; `demo` is decoder-only."""
DEMO_FOLDERS = {
    ("vision", DEMO): "vision",
    ("language", DEMO): "language",
    ("language", DEMO_T5): "language_t5",
    ("text", DEMO): "text",
}
"""Half and source → folder below `trainer/demo_halves/`."""

StageName = Literal["stage1", "stage2", "caption", "vqa", "retrieval"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""In the order in which they are trained."""
STARTS_FROM: dict[StageName, StageName | None] = {
    "stage1": None,
    "stage2": "stage1",
    "caption": "stage2",
    "vqa": "stage2",
    "retrieval": "stage1",
}
"""Whose bridge a stage goes on with, as published: fine-tunes that speak start from stage 2, retrieval from stage 1."""


class QFormerConfig(Settings):
    """Sizes of the querying transformer (BERT-base with 32 queries as published)."""

    queries: PositiveInt = 32
    """Learned query vectors; as many soft tokens reach the language model."""
    width: PositiveInt = 768
    """Hidden size."""
    layers: PositiveInt = 12
    """Transformer layers."""
    heads: PositiveInt = 12
    """Attention heads; must divide `width`."""
    ffn_width: PositiveInt = 3072
    """Inner width of both feed-forward networks (query and text)."""
    cross_attention_frequency: PositiveInt = 2
    """Every n-th layer, counted from the first, attends to the image."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout of hidden states and attention weights in training."""
    contrastive_width: PositiveInt = 256
    """Width of the shared image-text space of ITC."""
    max_text_tokens: PositiveInt = 32
    """Longest text (tokens) the Q-Former reads; longer text is cut, its end token kept."""
    text_positions: PositiveInt = 512
    """Rows of the text position table (BERT's number)."""
    vocabulary: PositiveInt | None = None
    """Rows of the word embeddings; null: as many as the text tokenizer has tokens."""
    layer_norm_eps: PositiveFloat = 1e-12
    """Epsilon of every LayerNorm in the Q-Former and of the generation head (BERT's number)."""
    activation: str = "gelu"
    """Non-linearity of both feed-forward networks and the generation head, by transformers' name (ACT2FN)."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "QFormerConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; choose heads that divide it")
        if self.max_text_tokens > self.text_positions:
            raise ValueError(
                f"max_text_tokens {self.max_text_tokens} is more than text_positions {self.text_positions}"
            )
        return self


class DemoHalvesConfig(Settings):
    """Pre-training of the small frozen halves on the demo world; used only when `rebuild` is true."""

    rebuild: bool = False
    """Pre-train the halves in this run instead of taking the shipped ones."""
    scenes: PositiveInt = 20_000
    """Training scenes drawn for the image encoder."""
    told_scenes: PositiveInt = 30_000
    """Training scenes told to the language model, in about eight documents each."""
    vision_steps: PositiveInt = 2_500
    """Optimiser steps of the image encoder."""
    language_steps: PositiveInt = 4_000
    """Optimiser steps of the decoder-only language model."""
    note_steps: NonNegativeInt = 1_000
    """The first of them, on notes alone."""
    vision_batch_size: PositiveInt = 64
    """Pictures in a step."""
    language_batch_size: PositiveInt = 96
    """Documents in a step of the decoder-only language model."""
    t5_steps: PositiveInt = 7_000
    """Optimiser steps of the encoder-decoder."""
    t5_page_steps: NonNegativeInt = 150
    """The first of them, on one kind of notes alone, and as many on the next, until each had its turn."""
    t5_note_steps: NonNegativeInt = 1_000
    """Those that follow, on notes of all kinds."""
    t5_batch_size: PositiveInt = 48
    """Documents in a step of the encoder-decoder."""
    vision_learning_rate: PositiveFloat = 1.5e-3
    """Peak rate of the image encoder."""
    language_learning_rate: PositiveFloat = 1e-3
    """Peak rate of the language model."""
    seed: NonNegativeInt = 0
    """Seed of weights, scenes and order."""


class ModelConfig(Settings):
    """Which halves are bridged, and by what."""

    vision: str = DEMO
    """Image encoder: a local folder or hub id in Hugging Face format, or `demo`. `./x` is inside the checkpoint."""
    vision_layer: int = -1
    """Hidden state handed to the Q-Former: -1 is the last layer's (before the tower's own final norm, if it has one),
    -2 the penultimate (BLIP-2's choice for CLIP)."""
    image_size: PositiveInt | None = None
    """Side of the pixels (224 to 490 as published); position embeddings are interpolated; null: the tower's own."""
    image_norm_eps: PositiveFloat = 1e-5
    """Epsilon of the trained LayerNorm on image features (LAVIS 1e-5; a Hugging Face BLIP-2 has 1e-6)."""
    language: str | None = DEMO
    """Frozen language model, decoder-only or encoder-decoder: a local folder or hub id, `demo` (OPT-like) or `demo-t5`
    (T5-like); null: none, for retrieval alone."""
    text_tokenizer: str | None = DEMO
    """Tokenizer of the Q-Former's text side (a BERT folder as published), or `demo`; null: no text side."""
    qformer: QFormerConfig = QFormerConfig()
    """The bridge that is trained."""
    qformer_init: str | None = None
    """Folder or hub id of a BERT (with its masked-language head) that a fresh Q-Former starts from, as published;
    null: from random weights."""
    caption_prompt: str = ""
    """Text the language model continues with a caption."""
    vqa_prompt: str = "Question: {} Answer:"
    """Text the language model continues with an answer; `{}` is the question."""
    qformer_reads: Literal["question", "prompt"] = "question"
    """What a conditioned Q-Former is given: the bare question, or the whole prompt (InstructBLIP), of captions too."""
    end_token_ids: tuple[NonNegativeInt, ...] | None = Field(default=None, min_length=1)
    """Tokens of the language model that end a text, the first is trained; null: its tokenizer's end token."""
    max_new_tokens: PositiveInt = 32
    """Longest caption or answer (tokens) unless a request says otherwise."""
    demo_halves: DemoHalvesConfig = DemoHalvesConfig()
    """How the shipped halves were made, and whether to make them again."""

    def shipped_halves(self) -> dict[str, str]:
        """Key → folder below `trainer/demo_halves/`, of the keys that name a shipped half."""
        named = {
            "vision": ("vision", self.vision),
            "language": ("language", self.language),
            "text_tokenizer": ("text", self.text_tokenizer),
        }
        return {key: DEMO_FOLDERS[half] for key, half in named.items() if half in DEMO_FOLDERS}

    @model_validator(mode="after")
    def _one_slot(self) -> "ModelConfig":
        if self.vqa_prompt.count("{}") != 1:
            raise ValueError(f"vqa_prompt {self.vqa_prompt!r} needs exactly one {{}} for the question")
        return self


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
    demo: DemoWorldConfig = DemoWorldConfig()
    """The demo world, when `root` is absent."""


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
