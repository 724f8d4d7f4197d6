"""An encoder-decoder language model: prefix and prompt are read once, then tokens are said with a KV cache.

The encoder gives the cross-attention keys and values of what it read; they stay as they are for all further steps.
Rows of a batch may have prompts of different lengths. Each row is padded on its right; the attention mask hides the
pads from the encoder and from the decoder. Rows that have said more and less than each other are padded on the left of
what they said, and a second mask hides those pads from the decoder, where its graph takes one.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, P tokens said with pads, D language
width, V vocabulary
"""

from collections.abc import Sequence

import numpy as np

from runtime.backends import Engine
from runtime.decoder import embedded, is_all, stacked
from runtime.decoding.task import Floats, Ids
from runtime.decoding.text_decoder import TextDecoder
from runtime.errors import BundleError, InputError
from runtime.kv_cache import Held, KvCache, Memory, cache_shapes
from runtime.manifest import Generation, Limits

SAID_MASK = "decoder_attention_mask"
"""Input [B, P + 1] of a decoder that can be told which of its cached positions hold something."""


class EncoderDecoder(TextDecoder):
    """Runs the graphs `embed`, `encoder` and `decoder`."""

    def __init__(
        self,
        embed: Engine,
        encoder: Engine,
        decoder: Engine,
        generation: Generation,
        limits: Limits,
        cache_type: str = "float32",
    ) -> None:
        """The engines stay the caller's to close; BundleError when the manifest names no first token.

        `cache_type` is numpy's name of what keys and values are kept in, the decoder's own and the cross-attention's.
        """
        if generation.start_token_id is None:
            raise BundleError(
                "manifest.json: generation.start_token_id: expected the token an encoder-decoder begins with, found "
                "none; export the bundle again"
            )
        super().__init__(generation, limits, "decoder")
        self._embed = embed
        self._encoder = encoder
        self._decoder = decoder
        self._start_token_id = generation.start_token_id
        self._cache_shapes, self._cross_shapes = cache_shapes(decoder), cache_shapes(decoder, "cross_")
        self._memory = Memory(decoder, cache_type)
        self._masks_past = SAID_MASK in decoder.inputs()

    def start(
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Floats, "EncoderDecoderSteps"]:
        """Encoder and first token; see `TextDecoder`."""
        embeds_BSD, mask_BS = self._right_padded(prefix_BQD, prompts)
        rows, length = mask_BS.shape
        read = self._encoder.run({"inputs_embeds": embeds_BSD, "attention_mask": mask_BS})
        cross = Held(self._memory, self._cross_shapes, rows, length)
        cross.assign({name: read[name] for name in self._cross_shapes})
        cache = KvCache(self._memory, self._cache_shapes, rows, max_new_tokens)
        steps = EncoderDecoderSteps(self._embed, cache, cross, mask_BS, masks_past=self._masks_past)
        return steps.step(np.full(rows, self._start_token_id, np.int64)), steps

    def check_positions(self, prompt_positions: int, max_new_tokens: int) -> None:
        """Of what the encoder reads; see `TextDecoder`."""
        if prompt_positions > self._limits.max_positions:
            raise InputError(
                f"prompt: image and prompt take {prompt_positions} positions, this bundle has "
                f"{self._limits.max_positions}; shorten the prompt"
            )

    def _right_padded(self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]]) -> tuple[Floats, Ids]:
        """(embeds_BSD, mask_BS) with the order prefix, prompt, pads in every row."""
        batch, queries, _ = prefix_BQD.shape
        longest = max(len(prompt) for prompt in prompts)
        mask_BS = np.ones((batch, queries + longest), np.int64)
        if not longest:
            return prefix_BQD, mask_BS
        ids_BT = np.full((batch, longest), self._generation.pad_token_id, np.int64)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = prompt
            mask_BS[row, queries + len(prompt) :] = 0
        return np.concatenate([prefix_BQD, embedded(self._embed, ids_BT)], axis=1), mask_BS


class EncoderDecoderSteps:
    """The rows of one batch behind the encoder; satisfies `runtime.decoding.task.Steps`."""

    def __init__(self, embed: Engine, cache: KvCache, cross: Held, mask_BS: Ids, *, masks_past: bool) -> None:
        """`masks_past`: the graph has `SAID_MASK`."""
        self._embed, self._cache, self._cross, self._mask_BS = embed, cache, cross, mask_BS
        self._said_BP = np.ones((len(mask_BS), 0), np.int64) if masks_past else None
        """0 where a row is padded."""
        self._read_B = np.arange(len(mask_BS))
        """Which of the rows that the encoder read each row belongs to."""

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token; nothing has changed when the graph fails."""
        masks, said_BP = {"attention_mask": self._mask_BS}, self._said_BP
        if said_BP is not None:
            masks[SAID_MASK] = said_BP = np.pad(said_BP, ((0, 0), (0, 1)), constant_values=1)
        embeds_B1D = embedded(self._embed, ids_B[:, None])
        logits_BV = self._cache.advance({"inputs_embeds": embeds_B1D, **masks, **self._cross.views})
        self._said_BP = said_BP
        return logits_BV

    def select(self, rows_B: Ids) -> None:
        """Cache of these rows, without positions that are pads in all of them.

        What the encoder read is moved only where a row's image changes, not between beams.
        """
        if is_all(rows_B, len(self._read_B)):
            return
        pads = 0
        if self._said_BP is not None:
            said_BP = self._said_BP[rows_B]
            pads = int(said_BP.any(axis=0).argmax())
            self._said_BP = said_BP[:, pads:]
        self._cache.select(rows_B, pads)
        if not np.array_equal(self._read_B[rows_B], self._read_B):
            self._cross.select(rows_B)
            self._mask_BS = self._mask_BS[rows_B]
        self._read_B = self._read_B[rows_B]

    def can_join(self, other: "EncoderDecoderSteps") -> bool:
        """Rows that have said equally much, or any where the graph has a mask over what was said."""
        return self._said_BP is not None or self._cache.positions == other._cache.positions

    def join(self, other: "EncoderDecoderSteps") -> None:
        """What was read is padded on its right, as prompts are; what was said on its left.

        ValueError for rows that have said more or less where the graph would see the pads; see `can_join`.
        """
        if not self.can_join(other):
            said = (self._cache.positions, other._cache.positions)
            raise ValueError(
                f"rows that have said {said[0]} tokens cannot share a batch with rows that have said {said[1]}"
            )
        self._cache.join(other._cache, right=True)
        self._cross.join(other._cross, right=False)
        self._mask_BS = stacked(self._mask_BS, other._mask_BS, right=False)
        if self._said_BP is not None and other._said_BP is not None:
            self._said_BP = stacked(self._said_BP, other._said_BP, right=True)
        self._read_B = np.concatenate([self._read_B, self._read_B.max() + 1 + other._read_B])
