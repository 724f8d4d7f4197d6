"""A decoder-only language model: prefix and prompt → tokens, with a KV cache, on named arrays.

Rows of a batch may have prompts of different lengths. Each row is padded on its left, before the prefix, so that all
rows end at the same position; the attention mask hides the pads and the graph counts positions by it.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, P cached positions, D language width,
V vocabulary
"""

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.backends import Arrays, Engine
from runtime.decoding.task import Floats, Ids
from runtime.decoding.text_decoder import TextDecoder
from runtime.errors import InputError
from runtime.manifest import Generation, Limits


class Decoder(TextDecoder):
    """Runs the graphs `embed` and `language`."""

    def __init__(
        self, embed: Engine, language: Engine, generation: Generation, limits: Limits, cache_type: str = "float32"
    ) -> None:
        """The engines stay the caller's to close; `cache_type` is numpy's name of what the cache is kept in."""
        super().__init__(generation, limits, "language")
        self._embed = embed
        self._language = language
        self._cache_shapes, self._cache_type = cache_shapes(language), cache_type

    def start(self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]]) -> tuple[Floats, "DecoderSteps"]:
        """Prefill; see `TextDecoder`."""
        embeds_BSD, mask_BS = self._left_padded(prefix_BQD, prompts)
        feeds: Arrays = {"inputs_embeds": embeds_BSD, "attention_mask": mask_BS}
        past = empty_cache(self._cache_shapes, len(prefix_BQD), self._cache_type)
        logits_BV, past = advance(self._language, feeds, past)
        return logits_BV, DecoderSteps(self._embed, self._language, mask_BS, past)

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

    def __init__(self, embed: Engine, language: Engine, mask_BS: Ids, past: Arrays) -> None:
        self._embed, self._language, self._mask_BS, self._past = embed, language, mask_BS, past

    def step(self, ids_B: Ids) -> Floats:
        """Scores [B, V] after one more token."""
        self._mask_BS = np.pad(self._mask_BS, ((0, 0), (0, 1)), constant_values=1)
        feeds: Arrays = {"inputs_embeds": embedded(self._embed, ids_B[:, None]), "attention_mask": self._mask_BS}
        logits_BV, self._past = advance(self._language, feeds, self._past)
        return logits_BV

    def select(self, rows_B: Ids) -> None:
        """Mask and cache of these rows."""
        self._mask_BS = self._mask_BS[rows_B]
        self._past = selected(self._past, rows_B)


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


def selected(arrays: Arrays, rows_B: Ids) -> Arrays:
    """These rows of every array; nothing is copied where they are all rows in their order."""
    if all(np.array_equal(rows_B, np.arange(len(array))) for array in arrays.values()):
        return arrays
    return {name: array[rows_B] for name, array in arrays.items()}
