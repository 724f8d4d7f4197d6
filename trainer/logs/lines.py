"""Where a loss curve starts, where it cannot go below, and above what nothing has been learned yet.

Chance and floor follow from batch, vocabulary and label smoothing alone (all in nats). They explain most reports of
training that is "stuck": ITC at ln N gives every pair the same similarity, ITM at 0.6365 has learned only that one
pair in three is true (BLIP #200, #51, #152).
"""

import math
from dataclasses import dataclass

TRUE_PAIRS = 1 / 3
"""Share of true pairs in ITM: one for each wrong text and each wrong image."""
SLACK = 0.05
"""Share of the way from chance to floor that ITC must have gone to count as learning."""
ITM_BAND = 0.01
"""How near (nats) to the prior's entropy ITM counts as stuck."""
ITG_SHARE = 0.5176
"""ITG counts as stuck above this share of the way from floor to chance: a loss of 6 for BERT's 30,523 tokens."""


@dataclass(frozen=True)
class LossLines:
    """The values to read one loss by (nats)."""

    chance: float
    """What a model that has seen nothing reaches."""
    floor: float
    """The least there is, with label smoothing."""
    stuck: float | None = None
    """A loss that stays above has not begun to learn; None: its start says nothing (a pre-trained language model)."""
    prior: float | None = None
    """What is reached by knowing how often each answer is right, and nothing of the input."""
    hint: str = ""
    """What a loss that is stuck means, and what to try."""

    def numbers(self) -> dict[str, float]:
        """Those there are, by name."""
        found = {"chance": self.chance, "prior": self.prior, "stuck": self.stuck, "floor": self.floor}
        return {name: value for name, value in found.items() if value is not None}


def contrast_lines(candidates: int, smoothing: float) -> LossLines:
    """ITC with `candidates` to choose from: the global batch, and the queue where there is one."""
    chance, floor = math.log(candidates), smoothed_entropy(candidates, smoothing)
    return LossLines(
        chance=chance,
        floor=floor,
        stuck=chance - SLACK * (chance - floor),
        hint="every image is as similar to every text: queries or text features have collapsed; check that "
        "queries are not all alike (zeros), lower learning_rate, lengthen warmup_steps, or start from a BERT",
    )


def matching_lines() -> LossLines:
    """ITM with one true pair in three."""
    prior = binary_entropy(TRUE_PAIRS)
    return LossLines(
        chance=math.log(2),
        floor=0.0,
        stuck=prior - ITM_BAND,
        prior=prior,
        hint="matching knows only that one pair in three is true; negatives may be true pairs (captions that fit "
        "several images of a batch, image ids that do not say so), the batch too small, or learning_rate wrong",
    )


def generation_lines(vocabulary: int, smoothing: float) -> LossLines:
    """ITG over `vocabulary` tokens: a loss that stays high predicts words by how common they are."""
    lines = language_lines(vocabulary, smoothing)
    return LossLines(
        chance=lines.chance,
        floor=lines.floor,
        stuck=lines.floor + ITG_SHARE * (lines.chance - lines.floor),
        hint="words are hardly predicted better than by how common they are; raise learning_rate, start the Q-Former "
        "from BERT, or check that captions are in the language of the text tokenizer",
    )


def language_lines(vocabulary: int, smoothing: float = 0.0) -> LossLines:
    """Next-token loss of a language model, which is pre-trained and so begins below chance."""
    return LossLines(chance=math.log(vocabulary), floor=smoothed_entropy(vocabulary, smoothing))


def smoothed_entropy(classes: int, smoothing: float) -> float:
    """Least cross-entropy against targets of `1 - smoothing` on the right class plus `smoothing` shared by all."""
    other = smoothing / classes
    right = 1 - smoothing + other
    if not other:
        return 0.0
    return -right * math.log(right) - (classes - 1) * other * math.log(other)


def binary_entropy(share: float) -> float:
    """Entropy (nats) of an event of that probability."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)
