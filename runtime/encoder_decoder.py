"""An encoder-decoder language model: prefix and prompt are read once, then tokens are said with a KV cache.

The encoder gives the cross-attention keys and values of what it read; they stay as they are for all further steps.
Rows of a batch may have prompts of different lengths. Each row is padded on its right; the attention mask hides the
pads from the encoder and from the decoder.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, D language width, V vocabulary
"""

from collections.abc import Sequence

import numpy as np

from runtime.backends import Arrays, Engine
from runtime.decoder import advance, cache_shapes, embedded, empty_cache, selected
from runtime.decoding.task import Floats, Ids
from runtime.decoding.text_decoder import TextDecoder
from runtime.errors import BundleError, InputError
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

        `cache_type` is numpy's name of what the decoder's own cache is kept in.
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
        self._cache_shapes, self._cache_type = cache_shapes(decoder), cache_type

    def start(self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]]) -> tuple[Floats, "EncoderDecoderSteps"]:
        """Encoder and first token; see `TextDecoder`."""
        embeds_BSD, mask_BS = self._right_padded(prefix_BQD, prompts)
        read = self._encoder.run({"inputs_embeds": embeds_BSD, "attention_mask": mask_BS})
        seen = {"attention_mask": mask_BS} | {name: read[name] for name in read if name.startswith("cross_")}
        past = empty_cache(self._cache_shapes, len(prefix_BQD), self._cache_type)
        steps = EncoderDecoderSteps(self._embed, self._decoder, seen, past)
        return steps.step(np.full(len(prefix_BQD), self._start_token_id, np.int64)), steps

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

    def __init__(self, embed: Engine, decoder: Engine, seen: Arrays, past: Arrays) -> None:
        self._embed, self._decoder, self._seen, self._past = embed, decoder, seen, past
        self._read_B = np.arange(len(seen["attention_mask"]))
        """Which of the rows that the encoder read each row belongs to."""

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token."""
        feeds = {"inputs_embeds": embedded(self._embed, ids_B[:, None]), **self._seen}
        logits_BV, self._past = advance(self._decoder, feeds, self._past)
        return logits_BV

    def select(self, rows_B: Ids) -> None:
        """Cache of these rows; what the encoder read is moved only where a row's image changes, not between beams."""
        self._past = selected(self._past, rows_B)
        if not np.array_equal(self._read_B[rows_B], self._read_B):
            self._seen = selected(self._seen, rows_B)
        self._read_B = self._read_B[rows_B]
