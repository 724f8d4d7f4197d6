"""An encoder-decoder language model: prefix and prompt are read once, then tokens are said with a KV cache.

The encoder gives the cross-attention keys and values of what it read; they stay as they are for all further steps.
Rows of a batch may have prompts of different lengths. Each row is padded on its right; the attention mask hides the
pads from the encoder and from the decoder.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, D language width, V vocabulary
"""

from collections.abc import Sequence

import numpy as np

from runtime.backends import Engine
from runtime.decoder import embedded, is_all
from runtime.decoding.task import Floats, Ids
from runtime.decoding.text_decoder import TextDecoder
from runtime.errors import BundleError, InputError
from runtime.kv_cache import Held, KvCache, Memory, cache_shapes
from runtime.manifest import Generation, Limits


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
        steps = EncoderDecoderSteps(self._embed, cache, cross, mask_BS)
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

    def __init__(self, embed: Engine, cache: KvCache, cross: Held, mask_BS: Ids) -> None:
        self._embed, self._cache, self._cross, self._mask_BS = embed, cache, cross, mask_BS
        self._read_B = np.arange(len(mask_BS))
        """Which of the rows that the encoder read each row belongs to."""

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token; nothing has changed when the graph fails."""
        embeds_B1D = embedded(self._embed, ids_B[:, None])
        return self._cache.advance({"inputs_embeds": embeds_B1D, "attention_mask": self._mask_BS, **self._cross.views})

    def select(self, rows_B: Ids) -> None:
        """Cache of these rows; what the encoder read is moved only where a row's image changes, not between beams."""
        if is_all(rows_B, len(self._read_B)):
            return
        self._cache.select(rows_B)
        if not np.array_equal(self._read_B[rows_B], self._read_B):
            self._cross.select(rows_B)
            self._mask_BS = self._mask_BS[rows_B]
        self._read_B = self._read_B[rows_B]

    def can_join(self, other: "EncoderDecoderSteps") -> bool:
        """Only rows that have said equally much: the graph has no mask over what was said, and pads would be seen."""
        return self._cache.positions == other._cache.positions

    def join(self, other: "EncoderDecoderSteps") -> None:
        """What was read may differ in length; it is padded on its right, as prompts are.

        ValueError for rows that have said more or less; see `can_join`.
        """
        if not self.can_join(other):
            said = (self._cache.positions, other._cache.positions)
            raise ValueError(
                f"rows that have said {said[0]} tokens cannot share a batch with rows that have said {said[1]}"
            )
        self._cache.join(other._cache, right=True)
        self._cross.join(other._cross, right=False)
        masks = (self._mask_BS, other._mask_BS)
        length = max(mask_BS.shape[1] for mask_BS in masks)
        padded = [np.pad(mask_BS, ((0, 0), (0, length - mask_BS.shape[1]))) for mask_BS in masks]
        self._mask_BS = np.concatenate(padded)
        self._read_B = np.concatenate([self._read_B, self._read_B.max() + 1 + other._read_B])
