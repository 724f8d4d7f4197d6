"""An encoder-decoder language model: prefix and prompt are read once, then tokens are said with a KV cache.

The encoder gives the cross-attention keys and values of what it read; they stay as they are for all further steps.
Rows of a batch may have prompts of different lengths. Each row is padded on its right; the attention mask hides the
pads from the encoder and from the decoder.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, D language width, V vocabulary
"""

from collections.abc import Sequence

import numpy as np

from runtime.backends import Arrays, Engine
from runtime.decoder import advance, cache_shapes, embedded, empty_cache
from runtime.errors import BundleError, InputError
from runtime.greedy import Floats, Ids, check_new_tokens, choose_greedy, until_ended
from runtime.manifest import Generation, Limits
from runtime.stopwatch import Stopwatch


class EncoderDecoder:
    """Runs the graphs `embed`, `encoder` and `decoder`; satisfies `runtime.greedy.TextDecoder`."""

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
        self._embed = embed
        self._encoder = encoder
        self._decoder = decoder
        self._start_token_id = generation.start_token_id
        self._generation = generation
        self._limits = limits
        self._cache_shapes, self._cache_type = cache_shapes(decoder), cache_type

    def generate(
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int, watch: Stopwatch
    ) -> list[tuple[int, ...]]:
        """Generated ids of each row; see `TextDecoder`."""
        batch, queries, _ = prefix_BQD.shape
        self._check_limits(queries + max(len(prompt) for prompt in prompts), max_new_tokens)
        with watch.phase("prefill"):
            embeds_BSD, mask_BS = self._right_padded(prefix_BQD, prompts)
            read = self._encoder.run({"inputs_embeds": embeds_BSD, "attention_mask": mask_BS})
            seen = {"attention_mask": mask_BS} | {name: read[name] for name in read if name.startswith("cross_")}
            start_B1 = np.full((batch, 1), self._start_token_id, np.int64)
            feeds: Arrays = {"inputs_embeds": embedded(self._embed, start_B1), **seen}
            logits_BV, past = advance(self._decoder, feeds, empty_cache(self._cache_shapes, batch, self._cache_type))
            ids_B = choose_greedy(logits_BV, "decoder")

        def following(ids_B1: Ids) -> Ids:
            nonlocal past
            logits_BV, past = advance(self._decoder, {"inputs_embeds": embedded(self._embed, ids_B1), **seen}, past)
            return choose_greedy(logits_BV, "decoder")

        with watch.phase("decode"):
            return until_ended(ids_B, following, self._generation, max_new_tokens)

    def _check_limits(self, read_positions: int, max_new_tokens: int) -> None:
        check_new_tokens(max_new_tokens, self._limits)
        if read_positions > self._limits.max_positions:
            raise InputError(
                f"prompt: image and prompt take {read_positions} positions, this bundle has "
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
