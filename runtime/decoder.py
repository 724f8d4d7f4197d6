"""Prefix and prompt → tokens: greedy decoding with a KV cache, on named arrays.

Rows of a batch may have prompts of different lengths. Each row is padded on its left, before the prefix, so that all
rows end at the same position; the attention mask hides the pads and the graph counts positions by it.

Shape letters: B rows, Q queries, T prompt tokens, S prefix and prompt with pads, P cached positions, D language width,
V vocabulary
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.backends import Arrays, Engine
from runtime.errors import CheckFailed, InputError
from runtime.manifest import Generation, Limits
from runtime.stopwatch import Stopwatch

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def choose_greedy(logits_BV: Floats) -> Ids:
    """The likeliest token of each row, as ids_B; CheckFailed when the scores are not numbers."""
    ids_B: Ids = logits_BV.argmax(axis=-1)
    if np.isnan(np.take_along_axis(logits_BV, ids_B[:, None], axis=-1)).any():  # argmax stops at the first NaN
        raise CheckFailed("graph 'language': expected numbers, found NaN; check the bundle here: qforge verify")
    return ids_B


class Decoder:
    """Runs the graphs `embed` and `language` until every row has ended."""

    def __init__(self, embed: Engine, language: Engine, generation: Generation, limits: Limits) -> None:
        """The engines stay the caller's to close."""
        self._embed = embed
        self._language = language
        self._generation = generation
        self._limits = limits
        self._past_shapes = {name: shape for name, shape in language.inputs().items() if name.startswith("past_")}

    def generate(
        self, prefix_BQD: Floats, prompts: Sequence[Sequence[int]], max_new_tokens: int, watch: Stopwatch
    ) -> list[tuple[int, ...]]:
        """Generated ids of each row, the end token excluded.

        A row stops at any end token, or after `max_new_tokens`.

        Raises:
            InputError: beyond the bundle's limits (new tokens, positions).
        """
        batch, queries, _ = prefix_BQD.shape
        self._check_limits(queries + max(len(prompt) for prompt in prompts), max_new_tokens)
        with watch.phase("prefill"):
            embeds_BSD, mask_BS = self._left_padded(prefix_BQD, prompts)
            logits_BV, past = self._step(embeds_BSD, mask_BS, self._empty_cache(batch))
            ids_B = choose_greedy(logits_BV)
        answers: list[list[int]] = [[] for _ in prompts]
        ended_B = np.zeros(batch, bool)
        with watch.phase("decode"):
            for remaining in reversed(range(max_new_tokens)):
                ended_B |= np.isin(ids_B, self._generation.eos_token_ids)
                for row in np.flatnonzero(~ended_B):
                    answers[row].append(int(ids_B[row]))
                if ended_B.all() or not remaining:
                    break
                ids_B1 = np.where(ended_B, self._generation.pad_token_id, ids_B)[:, None]
                mask_BS = np.pad(mask_BS, ((0, 0), (0, 1)), constant_values=1)
                logits_BV, past = self._step(self._embedded(ids_B1), mask_BS, past)
                ids_B = choose_greedy(logits_BV)
        return [tuple(ids) for ids in answers]

    def _check_limits(self, prompt_positions: int, max_new_tokens: int) -> None:
        limits = self._limits
        if not 1 <= max_new_tokens <= limits.max_new_tokens:
            raise InputError(
                f"max_new_tokens: expected 1 to {limits.max_new_tokens} (this bundle's limit), found {max_new_tokens}"
            )
        needed = prompt_positions + max_new_tokens - 1  # the last token is never fed back
        if needed > limits.max_positions:
            raise InputError(
                f"prompt: image, prompt and {max_new_tokens} new tokens take {needed} positions, this bundle has "
                f"{limits.max_positions}; shorten the prompt or lower max_new_tokens"
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
            embeds_BSD[:, queries:] = self._embedded(ids_BT)
        for row, prompt in enumerate(prompts):
            pads = longest - len(prompt)
            embeds_BSD[row, :pads] = 0.0
            embeds_BSD[row, pads : pads + queries] = prefix_BQD[row]
            mask_BS[row, pads:] = 1
        return embeds_BSD, mask_BS

    def _step(self, embeds_BSD: Floats, mask_BS: Ids, past: Arrays) -> tuple[Floats, Arrays]:
        """Scores after the last position, and the cache with the new positions added."""
        outputs = self._language.run({"inputs_embeds": embeds_BSD, "attention_mask": mask_BS, **past})
        return outputs["logits"], {name: outputs[name.replace("past_", "present_", 1)] for name in past}

    def _embedded(self, ids_BT: Ids) -> Floats:
        embeds_BTD: Floats = self._embed.run({"input_ids": ids_BT})["inputs_embeds"]
        return embeds_BTD

    def _empty_cache(self, batch: int) -> Arrays:
        cache: dict[str, npt.NDArray[Any]] = {}
        for name, (_, heads, _, head_width) in self._past_shapes.items():
            cache[name] = np.zeros((batch, int(heads), 0, int(head_width)), np.float32)
        return cache
