"""A decoder-only language model: prefix and prompt → tokens, with a KV cache, on named arrays.

Rows of a batch may have prompts of different lengths. Each row is padded on its left, before the prefix, so that all
rows end at the same position; the attention mask hides the pads and the graph counts positions by it.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, P cached positions, D language width,
V vocabulary
"""

from collections.abc import Sequence

import numpy as np

from runtime.backends import Engine
from runtime.decoding.task import Floats, Ids
from runtime.decoding.text_decoder import TextDecoder
from runtime.errors import InputError
from runtime.kv_cache import KvCache, Memory, cache_shapes
from runtime.manifest import Generation, Limits
from runtime.prompt_cache import PromptCache
from runtime.query_cache import Statistics


class Decoder(TextDecoder):
    """Runs the graphs `embed` and `language`."""

    def __init__(
        self,
        embed: Engine,
        language: Engine,
        generation: Generation,
        limits: Limits,
        cache_type: str = "float32",
        prompt_cache_bytes: int = 0,
    ) -> None:
        """The engines stay the caller's to close; `cache_type` is numpy's name of what the cache is kept in.

        `prompt_cache_bytes` bounds what is remembered of prompts; 0: nothing is.
        """
        super().__init__(generation, limits, "language")
        self.prompt_cache = PromptCache(prompt_cache_bytes)
        self._embed = embed
        self._language = language
        self._cache_shapes = cache_shapes(language)
        self._memory = Memory(language, cache_type)

    def start(
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Floats, "DecoderSteps"]:
        """Prefill; see `TextDecoder`. A single row begins with what is remembered of its image and prompt.

        Rows of a batch are computed whole: one that is remembered would wait for its neighbours anyway.
        """
        embeds_BSD, mask_BS = self._left_padded(prefix_BQD, prompts)
        rows, positions, _ = embeds_BSD.shape
        reach = positions + max_new_tokens - 1  # the last token is never fed back
        cache = KvCache(self._memory, self._cache_shapes, rows, reach)
        remembers = rows == 1 and self.prompt_cache.max_bytes > 0
        if remembers and (known := self.prompt_cache.longest(prefix_BQD[0], prompts[0])) is not None:
            cache.assign(known)
        new_BSD = np.ascontiguousarray(embeds_BSD[:, cache.positions :])
        logits_BV = cache.advance({"inputs_embeds": new_BSD, "attention_mask": mask_BS})
        if remembers:
            self.prompt_cache.put(prefix_BQD[0], prompts[0], cache.arrays())
        return logits_BV, DecoderSteps(self._embed, cache, mask_BS)

    def statistics(self) -> Statistics:
        """Counters of the prompt cache, under "prompts"."""
        return self.prompt_cache.statistics()

    def check_positions(self, prompt_positions: int, max_new_tokens: int) -> None:
        """See `TextDecoder`."""
        needed = prompt_positions + max_new_tokens - 1  # the last token is never fed back
        if needed > self._limits.max_positions:
            raise InputError(
                f"prompt: image, prompt and {max_new_tokens} new tokens take {needed} positions, this bundle has "
                f"{self._limits.max_positions}; shorten the prompt or lower max_new_tokens"
            )

    def _left_padded(self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]]) -> tuple[Floats, Ids]:
        """(embeds_BSD, mask_BS) with the order pads, prefix, prompt in every row."""
        batch, queries, width = prefix_BQD.shape
        longest = max(len(prompt) for prompt in prompts)
        embeds_BSD = np.zeros((batch, queries + longest, width), np.float32)
        mask_BS = np.zeros((batch, queries + longest), np.int64)
        if longest:
            ids_BT = np.full((batch, longest), self._generation.pad_token_id, np.int64)
            for row, prompt in enumerate(prompts):
                ids_BT[row, longest - len(prompt) :] = prompt
            embeds_BSD[:, queries:] = embedded(self._embed, ids_BT)
        for row, prompt in enumerate(prompts):
            pads = longest - len(prompt)
            embeds_BSD[row, :pads] = 0.0
            embeds_BSD[row, pads : pads + queries] = prefix_BQD[row]
            mask_BS[row, pads:] = 1
        return embeds_BSD, mask_BS


class DecoderSteps:
    """The rows of one batch behind their prefill; satisfies `runtime.decoding.task.Steps`."""

    def __init__(self, embed: Engine, cache: KvCache, mask_BS: Ids) -> None:
        self._embed, self._cache, self._mask_BS = embed, cache, mask_BS

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token; nothing has changed when the graph fails."""
        mask_BS = np.concatenate([self._mask_BS, np.ones((len(ids_B), 1), np.int64)], axis=1)
        embeds_B1D = embedded(self._embed, ids_B[:, None])
        logits_BV = self._cache.advance({"inputs_embeds": embeds_B1D, "attention_mask": mask_BS})
        self._mask_BS = mask_BS
        return logits_BV

    def select(self, rows_B: Ids) -> None:
        """Mask and cache of these rows, without positions that are pads in all of them."""
        if is_all(rows_B, len(self._mask_BS)):
            return
        mask_BS = self._mask_BS[rows_B]
        pads = int(mask_BS.any(axis=0).argmax())
        self._cache.select(rows_B, pads)
        self._mask_BS = mask_BS[:, pads:]

    def can_join(self, other: "DecoderSteps") -> bool:
        """Always: the mask says what each row has read."""
        return True

    def join(self, other: "DecoderSteps") -> None:
        """Rows end at the same position; the shorter ones are padded on their left, as prompts are."""
        self._cache.join(other._cache, right=True)
        self._mask_BS = stacked(self._mask_BS, other._mask_BS, right=True)


def embedded(embed: Engine, ids_BT: Ids) -> Floats:
    """Token embeddings [B, T, D]."""
    embeds_BTD: Floats = embed.run({"input_ids": ids_BT})["inputs_embeds"]
    return embeds_BTD


def is_all(rows_B: Ids, count: int) -> bool:
    """Whether these are all rows, in their order."""
    return np.array_equal(rows_B, np.arange(count))


def stacked(one_BS: Ids, other_BS: Ids, *, right: bool) -> Ids:
    """The rows of both masks, the shorter with zeros in front where `right` aligns ends, else behind."""
    length = max(one_BS.shape[1], other_BS.shape[1])
    missing = [length - mask_BS.shape[1] for mask_BS in (one_BS, other_BS)]
    pads = [(few, 0) if right else (0, few) for few in missing]
    return np.concatenate(
        [np.pad(mask_BS, ((0, 0), pad)) for mask_BS, pad in zip((one_BS, other_BS), pads, strict=True)]
    )
