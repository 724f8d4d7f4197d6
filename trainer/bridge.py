"""What is trained: LayerNorm on the image, queries, Q-Former, its heads, and the projection into the language model.

Every stage of ours keeps all of it (a stage-2 checkpoint still has its text side, heads and temperature), so a VQA
fine-tune can follow stage 2 and stage 1 can resume. A published checkpoint lacks parts of it: those are then not made,
and whoever needs one is told which and where to get it. Key names follow transformers' `Blip2` models; what those
drop has names of its own: `temperature`, `itg_head`.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.errors import CheckpointError
from trainer.config import QFormerConfig
from trainer.packed import (
    Lookers,
    Packing,
    first_pass_packing,
    keys_of_features,
    matching_packing,
    packed_pass,
    said_and_compared,
)
from trainer.qformer import ImageKeys, QFormer, activation, padding_mask

INITIAL_TEMPERATURE = 0.07
INITIAL_STD = 0.02
BERT_WIDTH = 768

Part = Literal["text", "contrast", "matching", "generation", "temperature", "language"]
"""What a bridge may lack. text: embeddings and text FFN; contrast, matching, generation: the heads of ITC, ITM and
ITG; temperature: of ITC; language: the projection into the language model."""
PARTS: tuple[Part, ...] = get_args(Part)
_PART_OF_KEY: dict[str, Part] = {
    r"embeddings\.": "text",
    r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.": "text",
    r"(vision|text)_projection\.": "contrast",
    r"itm_head\.": "matching",
    r"itg_head\.": "generation",
    r"temperature$": "temperature",
    r"language_projection\.": "language",
}
_Made = TypeVar("_Made")


def part_of(key: str) -> Part | None:
    """The part that a key of the bridge belongs to; None for what every bridge has (norm, queries, query side)."""
    return next((part for pattern, part in _PART_OF_KEY.items() if re.match(pattern, key)), None)


# Shape letters: B images or rows, Q queries, T text tokens, N image tokens, E image width, H Q-Former width,
# C contrastive width, D language width, V text vocabulary; packed (trainer/packed.py): R rows, M text tokens,
# P tokens that predict one
@dataclass(frozen=True)
class FirstPass:
    """Outcome of the pass that ITC and ITG share."""

    image_BQC: Tensor
    """Unit-length features of the queries, which have seen no text."""
    text_BC: Tensor | None
    """Unit-length features of the texts, which have seen nothing else; None without contrast."""
    logits_PV: Tensor | None
    """ITG logits of the P tokens that speak of a next one, row by row; None without generation."""


class TextEmbeddings(nn.Module):
    """Word plus position embeddings of the Q-Former's text side; LayerNorm follows in the Q-Former."""

    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.position_embeddings = nn.Embedding(positions, width)

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return self.word_embeddings(ids_BT) + self.position_embeddings(positions_T)


class GenerationHead(nn.Module):
    """BERT's masked-language head (dense, GELU, LayerNorm); the decoder is tied to the word embeddings."""

    def __init__(self, config: QFormerConfig, vocabulary: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.activation = activation(config.activation)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, text_BTH: Tensor, word_embeddings_VH: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        return F.linear(self.LayerNorm(self.activation(self.dense(text_BTH))), word_embeddings_VH, self.bias)


class Bridge(nn.Module):
    """Frozen image features in; contrastive features, matching logits, text logits or language-model prefix out."""

    def __init__(
        self,
        config: QFormerConfig,
        *,
        image_width: int,
        language_width: int | None,
        vocabulary: int,
        parts: Collection[Part] = PARTS,
        image_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.config = config
        self.parts = frozenset(parts) - ({"language"} if language_width is None else set())
        width, contrastive = config.width, config.contrastive_width
        self.post_layernorm = nn.LayerNorm(image_width, eps=image_norm_eps)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.queries, width))
        text, contrast = "text" in self.parts, "contrast" in self.parts
        self.embeddings = TextEmbeddings(vocabulary, config.text_positions, width) if text else None
        self.qformer = QFormer(config, image_width, reads_text=text)
        self.vision_projection = nn.Linear(width, contrastive) if contrast else None
        self.text_projection = nn.Linear(width, contrastive) if contrast else None
        self.itm_head = nn.Linear(width, 2) if "matching" in self.parts else None
        self.itg_head = GenerationHead(config, vocabulary) if "generation" in self.parts else None
        has_temperature = "temperature" in self.parts
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE)) if has_temperature else None
        speaks = "language" in self.parts and language_width is not None
        self.language_projection = nn.Linear(width, language_width or 0) if speaks else None
        self.initialise()

    def initialise(self) -> None:
        """As BERT, also for the queries (zeros would make them identical); the query FFN copies the text FFN.

        N(0, 0.02) at BERT's width; narrower matrices get proportionally more, so that what passes through them keeps
        its size (with a fixed 0.02 a width of 128 starts nearly deaf: attention is uniform for hundreds of steps).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD * math.sqrt(BERT_WIDTH / module.in_features))
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.query_tokens, std=INITIAL_STD)
        for layer in self.qformer.encoder.layers():
            if layer.intermediate is None or layer.output is None:
                continue
            layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
            layer.output_query.load_state_dict(layer.output.state_dict())

    def need(self, *parts: Part) -> None:
        """Refuse, before any work, what this bridge cannot do; CheckpointError names the part and its remedy."""
        for part in parts:
            if part not in self.parts:
                raise CheckpointError(_without(part))

    def _have(self, part: Part, made: _Made | None) -> _Made:
        if made is None:
            raise CheckpointError(_without(part))
        return made

    def image_keys(self, image_embeds_BNE: Tensor) -> ImageKeys:
        """Keys and values of normalised image features, projected once."""
        return self.qformer.image_keys(image_embeds_BNE)

    def _queries(self, rows: int) -> Tensor:
        queries = self.query_tokens.expand(rows, -1, -1)
        # A view of a parameter asks for gradients without grad mode too, and has no function for PyTorch's counters.
        return queries if torch.is_grad_enabled() else queries.detach()

    def _embedded(self, ids_BT: Tensor) -> Tensor:
        embedded: Tensor = self._have("text", self.embeddings)(ids_BT)
        return embedded

    def text_features(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Unit-length text features [B, C] from the first token; the text sees itself only."""
        _, text_BTH = self.qformer(None, self._embedded(ids_BT), padding_mask(mask_BT, 0), None)
        return self._contrastive_text(text_BTH[:, 0])

    def image_features(self, keys: ImageKeys, rows: int) -> Tensor:
        """Image features [B, Q, C], unit length."""
        return self._contrastive(self.qformer(self._queries(rows), None, None, keys)[0])

    def over_temperature(self, similarities_BB: Tensor) -> Tensor:
        """Cosines divided by the learned temperature: the logits of ITC."""
        return similarities_BB / self._have("temperature", self.temperature)

    @torch.no_grad()
    def hold_temperature(self, least: float, most: float) -> None:
        """Put the temperature back within these limits, as ALBEF and BLIP do before each step."""
        self._have("temperature", self.temperature).clamp_(least, most)

    def _contrastive(self, query_BQH: Tensor) -> Tensor:
        return F.normalize(self._have("contrast", self.vision_projection)(query_BQH).float(), dim=-1)

    def _contrastive_text(self, first_BH: Tensor) -> Tensor:
        return F.normalize(self._have("contrast", self.text_projection)(first_BH).float(), dim=-1)

    def _matching(self, query_RQH: Tensor) -> Tensor:
        return self._have("matching", self.itm_head)(query_RQH).float().mean(dim=1)

    def matching_logits(self, keys: ImageKeys, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """ITM logits [B, 2] (no match, match): queries and text see each other, mean over the queries."""
        queries = self._queries(ids_BT.shape[0])
        mask = padding_mask(mask_BT, queries.shape[1])
        query_BQH, _ = self.qformer(queries, self._embedded(ids_BT), mask, keys)
        return self._matching(query_BQH)

    def keys_of_features(self, features_BNE: Tensor) -> ImageKeys:
        """`image_keys(post_layernorm(features))` for training: cheaper where the features carry no gradient."""
        return keys_of_features(self.qformer, self.post_layernorm, features_BNE)

    def first_pass(
        self, keys: ImageKeys, ids_BT: Tensor, mask_BT: Tensor, start: int, *, generation: bool, contrast: bool
    ) -> FirstPass:
        """What ITC and ITG need of B pairs, in one pass; `start` is the token that takes the place of [CLS] in ITG."""
        said_BT = torch.cat([torch.full_like(ids_BT[:, :1], start), ids_BT[:, 1:]], dim=1)
        texts = [said_BT] * generation + [ids_BT] * contrast
        packing = first_pass_packing(mask_BT, self.config.queries, generation=generation, contrast=contrast)
        query_BQH, text_MH = self._packed(texts, packing, [Lookers(keys, len(ids_BT))], text_wanted=True)
        speaks_M, first_M = said_and_compared(mask_BT, packing, generation=generation, contrast=contrast)
        text_BC = logits_PV = None
        if contrast:
            text_BC = self._contrastive_text(text_MH[first_M])
        if generation:
            words_VH = self._have("text", self.embeddings).word_embeddings.weight
            logits_PV = self._have("generation", self.itg_head)(text_MH[speaks_M], words_VH)
        return FirstPass(self._contrastive(query_BQH), text_BC, logits_PV)

    def matching(self, lookers: Sequence[Lookers], ids_RT: Tensor, mask_RT: Tensor) -> Tensor:
        """As `matching_logits` for rows that share images: [R, 2]."""
        packing = matching_packing(mask_RT, self.config.queries)
        query_RQH, _ = self._packed([ids_RT], packing, lookers, text_wanted=False)
        return self._matching(query_RQH)

    def _packed(
        self, texts: Sequence[Tensor], packing: Packing, lookers: Sequence[Lookers], *, text_wanted: bool
    ) -> tuple[Tensor, Tensor]:
        embeds_RTH = torch.cat([self._embedded(ids_RT) for ids_RT in texts], dim=1)
        embeds_MH = embeds_RTH.flatten(0, 1).index_select(0, packing.text_M)
        return packed_pass(self.qformer, self.query_tokens, embeds_MH, packing, lookers, text_wanted=text_wanted)

    def query_states(
        self, image_embeds_BNE: Tensor, ids_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """The queries [B, Q, H] after they have seen images; question ids condition them (InstructBLIP's way)."""
        queries = self._queries(image_embeds_BNE.shape[0])
        keys = self.image_keys(image_embeds_BNE)
        if ids_BT is None or mask_BT is None:
            return self.qformer(queries, None, None, keys)[0]
        mask = padding_mask(mask_BT, queries.shape[1])
        return self.qformer(queries, self._embedded(ids_BT), mask, keys)[0]

    def speech(self, query_BQH: Tensor) -> Tensor:
        """Soft tokens [B, Q, D] for the language model of queries that have seen images."""
        return self._have("language", self.language_projection)(query_BQH)

    def likeness(self, query_BQH: Tensor) -> Tensor:
        """Image features [B, Q, C], unit length, of queries that have seen images and no text."""
        return self._contrastive(query_BQH)

    def prefix(self, image_embeds_BNE: Tensor, ids_BT: Tensor | None = None, mask_BT: Tensor | None = None) -> Tensor:
        """`speech` of `query_states`."""
        return self.speech(self.query_states(image_embeds_BNE, ids_BT, mask_BT))


def _without(part: Part) -> str:
    if part == "language":
        return (
            "this checkpoint has no projection into a language model, so it cannot write captions or answers; "
            "train stage 2 from it: qforge train RECIPE --init CKPT --set model.language=DIR"
        )
    return (
        f"this checkpoint lacks the part {part!r} of its Q-Former, as published stage-2 models do; give it back from "
        f"one that has it: qforge import SRC --out CKPT --text-from STAGE1_CKPT"
    )
