"""The model section of a recipe: which halves are bridged, and by what; one name, one default, one place.

Defaults are BLIP-2's published values (arXiv 2301.12597, section 4.1) where the paper states one. The data section is
in trainer/data_config.py, the stages are in trainer/stage_config.py. pydantic only: reading a recipe never loads torch.
"""

from typing import Literal, get_args

from pydantic import (
    Field,
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
