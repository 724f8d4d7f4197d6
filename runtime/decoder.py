"""A decoder-only language model: prefix and prompt → tokens, with a KV cache, on named arrays.

Rows of a batch may have prompts of different lengths. Each row is padded on its left, before the prefix, so that all
rows end at the same position; the attention mask hides the pads and the graph counts positions by it.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, P cached positions, D language width,
V vocabulary
"""

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.backends import Arrays, Engine
from runtime.errors import InputError
from runtime.greedy import Floats, Ids, check_new_tokens, choose_greedy, until_ended
from runtime.manifest import Generation, Limits
from runtime.stopwatch import Stopwatch


class Decoder:
    """Runs the graphs `embed` and `language` until every row has ended; satisfies `runtime.greedy.TextDecoder`."""

    def __init__(
        self, embed: Engine, language: Engine, generation: Generation, limits: Limits, cache_type: str = "float32"
    ) -> None:
        """The engines stay the caller's to close; `cache_type` is numpy's name of what the cache is kept in."""
        self._embed = embed
        self._language = language
        self._generation = generation
        self._limits = limits
        self._cache_shapes, self._cache_type = cache_shapes(language), cache_type

    def generate(
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int, watch: Stopwatch
    ) -> list[tuple[int, ...]]:
        """Generated ids of each row; see `TextDecoder`."""
        batch, queries, _ = prefix_BQD.shape
        self._check_limits(queries + max(len(prompt) for prompt in prompts), max_new_tokens)
        with watch.phase("prefill"):
            embeds_BSD, mask_BS = self._left_padded(prefix_BQD, prompts)
            feeds: Arrays = {"inputs_embeds": embeds_BSD, "attention_mask": mask_BS}
            logits_BV, past = advance(self._language, feeds, empty_cache(self._cache_shapes, batch, self._cache_type))
            ids_B = choose_greedy(logits_BV, "language")

        def following(ids_B1: Ids) -> Ids:
            nonlocal mask_BS, past
            mask_BS = np.pad(mask_BS, ((0, 0), (0, 1)), constant_values=1)
            feeds: Arrays = {"inputs_embeds": embedded(self._embed, ids_B1), "attention_mask": mask_BS}
            logits_BV, past = advance(self._language, feeds, past)
            return choose_greedy(logits_BV, "language")

        with watch.phase("decode"):
            return until_ended(ids_B, following, self._generation, max_new_tokens)

    def _check_limits(self, prompt_positions: int, max_new_tokens: int) -> None:
        check_new_tokens(max_new_tokens, self._limits)
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


def advance(graph: Engine, feeds: Arrays, past: Arrays) -> tuple[Floats, Arrays]:
    """Scores after the last position, and the cache with the new positions added."""
    outputs = graph.run({**feeds, **past})
    return outputs["logits"], {name: outputs[name.replace("past_", "present_", 1)] for name in past}


def embedded(embed: Engine, ids_BT: Ids) -> Floats:
    """Token embeddings [B, T, D]."""
    embeds_BTD: Floats = embed.run({"input_ids": ids_BT})["inputs_embeds"]
    return embeds_BTD


def cache_shapes(graph: Engine) -> dict[str, tuple[int, int]]:
    """(heads, head width) of every `past_*` input of a graph."""
    shapes = {name: shape for name, shape in graph.inputs().items() if name.startswith("past_")}
    return {name: (int(heads), int(head_width)) for name, (_, heads, _, head_width) in shapes.items()}


def empty_cache(shapes: Mapping[str, tuple[int, int]], batch: int, dtype: str) -> Arrays:
    """A cache without positions."""
    return {name: np.zeros((batch, heads, 0, head_width), dtype) for name, (heads, head_width) in shapes.items()}
