"""How a text is decoded, as one value; names, defaults and meaning are those of transformers' `generate`.

    pipeline.caption("photo.jpg", decoding=Decoding(num_beams=5, length_penalty=0.6))

The loops lie beside this file and are equal to `generate` token for token in fp32, for every row as if it were alone.
That matters in one place: with `repetition_penalty`, transformers 5 spares the first words of a row of `inputs_embeds`
as often as the batch padded it, so there its rows depend on their neighbours; ours do not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Greedy unless a field says otherwise; InputError for what contradicts itself or would have no effect."""

    num_beams: int = 1
    """Hypotheses that beam search follows per image; 1: no beam search."""
    length_penalty: float = 1.0
    """Beams: a finished text's log-probability is divided by its length to this power; above 0 favours long texts."""
    early_stopping: bool | Literal["never"] = False
    """Beams: True ends with `num_beams` finished texts; False when a better one is unlikely; "never": impossible."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens is said twice; 0: no such rule."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were said already less likely; the prompt does not count."""
    min_new_tokens: int = 0
    """A text does not end before it has so many tokens."""
    do_sample: bool = False
    """Draw each token by its probability, instead of taking the likeliest."""
    temperature: float = 1.0
    """Sampling: below 1 sharpens the probabilities, above 1 flattens them."""
    top_k: int = 50
    """Sampling: only the so many likeliest tokens are drawn; 0: all."""
    top_p: float = 1.0
    """Sampling: only the likeliest tokens that together have this probability are drawn."""
    seed: int | None = None
    """Sampling: the same seed draws the same text, whatever else is in the batch; None draws a new one every time."""
    num_return_sequences: int = 1
    """Texts per image: the best beams, or so many draws."""
    stop_strings: tuple[str, ...] = ()
    """A text ends with the token that completes one of these; it is part of the text, as in transformers."""

    def __post_init__(self) -> None:
        for sentence in self._faults():
            raise InputError(sentence)

    @property
    def width(self) -> int:
        """Sequences that run together for one image."""
        return max(self.num_beams, self.num_return_sequences)

    def check_length(self, max_new_tokens: int) -> None:
        """InputError when a text would have to be longer than it may be."""
        if self.min_new_tokens > max_new_tokens:
            raise InputError(
                f"min_new_tokens: expected at most max_new_tokens ({max_new_tokens}), found {self.min_new_tokens}"
            )

    def _faults(self) -> Iterator[str]:
        """Sentences, the most helpful first."""
        at_least = {"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
        at_least |= {"top_k": 0} | ({} if self.seed is None else {"seed": 0})
        for name, least in at_least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{name}: expected a whole number of at least {least}, found {value!r}"
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if not _is_number(value) or not 1e-3 <= value <= 1e3:  # beyond, single precision gives infinities
                yield f"{name}: expected a number from 0.001 to 1000, found {value!r}"
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            yield f"top_p: expected a number above 0 and at most 1, found {self.top_p!r}"
        if not _is_number(self.length_penalty) or abs(self.length_penalty) > 10:
            yield f"length_penalty: expected a number from -10 to 10, found {self.length_penalty!r}"
        if self.early_stopping not in (True, False, "never"):
            yield f"early_stopping: expected true, false or 'never', found {self.early_stopping!r}"
        if not isinstance(self.stop_strings, tuple) or not all(isinstance(t, str) and t for t in self.stop_strings):
            yield f"stop_strings: expected a tuple of texts that are not empty, found {self.stop_strings!r}"
        yield from self._contradictions()

    def _contradictions(self) -> Iterator[str]:
        if self.do_sample and self.num_beams > 1:
            yield f"num_beams: expected 1 with do_sample, found {self.num_beams}; beams are searched or tokens drawn"
        for name in ("temperature", "top_k", "top_p", "seed"):
            if not self.do_sample and getattr(self, name) != getattr(Decoding, name):
                yield f"{name}: has no effect without do_sample; add do_sample, or leave {name} out"
        for name in ("length_penalty", "early_stopping"):
            if self.num_beams == 1 and getattr(self, name) != getattr(Decoding, name):
                yield f"{name}: has no effect without beams; add num_beams of at least 2, or leave {name} out"
        if self.num_return_sequences > 1 and not self.do_sample and self.num_return_sequences > self.num_beams:
            yield (
                f"num_return_sequences: expected at most num_beams ({self.num_beams}) without do_sample, "
                f"found {self.num_return_sequences}; add beams, or do_sample"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


GREEDY = Decoding()
"""The likeliest token, until the text ends."""
