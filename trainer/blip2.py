"""The composition: vision tower → bridge → frozen language model, with both tokenizers."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from runtime.errors import CheckpointError
from runtime.preprocess import PreprocessSettings
from trainer.bridge import PARTS, Bridge, Part
from trainer.config import ModelConfig, SpeakingConfig, StageConfig
from trainer.language import Style, end_tokens, load_language, pad_token, style_of
from trainer.mapped import map_weights
from trainer.towers import VisionTower, load_text_tokenizer, load_tokenizer, load_vision


# Shape letters: B images, N image tokens, E image width, Q queries, D language width, T text tokens
class Blip2(nn.Module):
    """A BLIP-2-style model. `bridge` is what trains; the vision tower does too once it is unfrozen.

    A model for retrieval alone has no language model and no tokenizer of one; a published stage-2 model has no text
    tokenizer. The bridge says so before either is used.
    """

    def __init__(
        self,
        config: ModelConfig,
        vision: VisionTower,
        language_model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        text_tokenizer: PreTrainedTokenizerBase | None,
        question_conditioned: bool,
        parts: Collection[Part] = PARTS,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.language_model: Any = language_model  # untyped, as all of transformers; None is met by bridge.need
        self.tokenizer: Any = tokenizer
        self.text_tokenizer: Any = text_tokenizer
        self.question_conditioned = question_conditioned
        self.language_dropout = False
        """Whether the frozen language model's dropout is on in training (LAVIS' habit)."""
        self.bridge = Bridge(
            config.qformer,
            image_width=vision.width,
            language_width=None if language_model is None else language_model.get_input_embeddings().embedding_dim,
            vocabulary=_vocabulary(config, text_tokenizer),
            parts=parts,
            image_norm_eps=config.image_norm_eps,
        )

    @property
    def preprocess(self) -> PreprocessSettings:
        """How an image becomes pixels for this model."""
        return self.vision.preprocess

    @property
    def style(self) -> Style:
        """Kind of language model."""
        return style_of(self.language_model)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text of the language model; the first is what training teaches it to say."""
        return end_tokens(self.tokenizer, self.config.end_token_ids)

    @property
    def pad_token_id(self) -> int:
        """Filler of the language model's short rows; the mask hides it."""
        return pad_token(self.tokenizer, self.end_token_ids[0])

    @property
    def start_token_id(self) -> int | None:
        """What an encoder-decoder's decoder is fed first; None for a decoder-only model."""
        return self.language_model.generation_config.decoder_start_token_id

    def train(self, mode: bool = True) -> "Blip2":
        """Frozen halves stay in eval mode: their dropout would only blur what the bridge learns from."""
        super().train(mode)
        if self.language_model is not None:
            self.language_model.train(mode and self.language_dropout)
        return self

    def prepare(self, config: StageConfig) -> None:
        """Unfreeze what a stage trains beside the bridge."""
        if config.train_vision:
            self.vision.unfreeze(checkpointing=config.vision_checkpointing)
        self.language_dropout = isinstance(config, SpeakingConfig) and config.language_dropout

    def trained(self) -> nn.ModuleDict:
        """The modules that train, by name: what a resume point holds."""
        return nn.ModuleDict({"bridge": self.bridge} | ({"vision": self.vision} if self.vision.trained else {}))

    def encode_image(self, pixels_BCHW: Tensor) -> Tensor:
        """Image features [B, N, E] after the trainable LayerNorm."""
        return self.bridge.post_layernorm(self.vision(pixels_BCHW))

    def query_prefix(
        self, image_embeds_BNE: Tensor, question_ids_BT: Tensor | None = None, question_mask_BT: Tensor | None = None
    ) -> Tensor:
        """Soft tokens [B, Q, D] for the language model."""
        return self.bridge.prefix(image_embeds_BNE, question_ids_BT, question_mask_BT)


@dataclass(frozen=True)
class TextBatch:
    """Token ids and mask (1 = token, 0 = padding), both int64 [B, T]."""

    ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "TextBatch":
        """The same on another device."""
        return TextBatch(self.ids.to(device), self.mask.to(device))

    def padded(self, length: int) -> "TextBatch":
        """With padding up to `length` tokens; what fills it is hidden by the mask."""
        more = length - self.ids.shape[1]
        return TextBatch(F.pad(self.ids, (0, more)), F.pad(self.mask, (0, more)))

    def trimmed(self) -> "TextBatch":
        """As long as its longest text."""
        longest = int(self.mask.sum(1).max())
        return TextBatch(self.ids[:, :longest], self.mask[:, :longest])


def text_batch(model: Blip2, texts: list[str]) -> TextBatch:
    """Tokens of the Q-Former's text side: [CLS] text [SEP], right-padded; a long text is cut and keeps its [SEP]."""
    coded = model.text_tokenizer(
        texts, padding=True, truncation=True, max_length=model.config.qformer.max_text_tokens, return_tensors="pt"
    )
    device = model.bridge.query_tokens.device
    return TextBatch(coded["input_ids"].to(device), coded["attention_mask"].to(device))


def new_blip2(
    config: ModelConfig, question_conditioned: bool, parts: Collection[Part] = PARTS, mapped_beside: Path | None = None
) -> Blip2:
    """A model with the halves the recipe names and a fresh bridge (seed it with `torch.manual_seed`).

    With `mapped_beside` the halves' weights lie in files on the disk of that path (`trainer.mapped`), so that a half
    is in memory only while it is loaded or computed with.
    """
    vision, language = load_vision(config.vision, config.vision_layer, config.image_size), None
    texts, rows = config.text_tokenizer, config.qformer.vocabulary
    if mapped_beside is not None:
        map_weights(vision, mapped_beside)
    if config.language is not None:
        language = load_language(config.language)
        if mapped_beside is not None:
            map_weights(language, mapped_beside)
    return Blip2(
        config,
        vision,
        language,
        None if config.language is None else load_tokenizer(config.language, "language"),
        None if texts is None else load_text_tokenizer(texts, rows),
        question_conditioned,
        parts,
    )


def _vocabulary(config: ModelConfig, text_tokenizer: Any) -> int:
    """Rows of the Q-Former's word embeddings; 0 when there is no text side to embed."""
    tokens = 0 if text_tokenizer is None else len(text_tokenizer)
    rows = config.qformer.vocabulary or tokens
    if tokens > rows:
        raise CheckpointError(
            f"{config.text_tokenizer} has {tokens} tokens, but qformer.vocabulary says {rows} embedding rows; "
            f"take the tokenizer the Q-Former was trained with"
        )
    return rows
