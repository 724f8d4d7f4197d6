"""Rows that join others between two steps, or leave them, say what they say alone."""

import numpy as np

from runtime.decoding.task import Steps
from tests.runtime.decoding.family import NEW_TOKENS, Family


def started(family: Family, rows: list[int], max_new_tokens: int = NEW_TOKENS):
    return family.decoder.start(family.prefix_BQD[rows], [family.prompts[row] for row in rows], max_new_tokens)


def go_on(logits_BV, steps: Steps, texts: list[list[int]], count: int):
    """So many tokens more in every row, ends or not."""
    for _ in range(count):
        ids_B = logits_BV.argmax(axis=-1)
        for text, token in zip(texts, ids_B, strict=True):
            text.append(int(token))
        logits_BV = steps.step(ids_B)
    return logits_BV


def alone(family: Family, row: int, count: int) -> list[int]:
    texts: list[list[int]] = [[]]
    go_on(*started(family, [row]), texts, count)
    return texts[0]


def test_rows_that_join_at_equal_steps(family: Family) -> None:
    """Of prompts longer and shorter than those which are there, twice."""
    for ours, theirs in (([4, 1], [5, 0, 3]), ([0], [5]), ([5, 3], [2])):
        logits_BV, steps = started(family, ours)
        texts: list[list[int]] = [[] for _ in ours]
        logits_BV = go_on(logits_BV, steps, texts, 3)
        more: list[list[int]] = [[] for _ in theirs]
        theirs_BV, other = started(family, theirs)
        theirs_BV = go_on(theirs_BV, other, more, 3)
        assert steps.can_join(other)
        steps.join(other)
        texts += more
        logits_BV = go_on(np.concatenate([logits_BV, theirs_BV]), steps, texts, 2)
        kept = np.array([len(texts) - 1, 0])  # one of each leaves or stays
        steps.select(kept)
        left = [texts[row] for row in kept]
        go_on(logits_BV[kept], steps, left, 4)
        rows = [*ours, *theirs]
        assert [texts[row][:5] for row in range(len(rows))] == [alone(family, row, 9)[:5] for row in rows]
        assert left == [alone(family, rows[row], 9) for row in kept]


def test_rows_that_join_at_other_steps(family: Family) -> None:
    """A mask hides the pads in front of those that have said less."""
    logits_BV, steps = started(family, [1, 4])
    texts: list[list[int]] = [[], []]
    logits_BV = go_on(logits_BV, steps, texts, 6)
    late_BV, late = started(family, [5])
    assert steps.can_join(late)
    steps.join(late)
    texts.append([])
    logits_BV = go_on(np.concatenate([logits_BV, late_BV]), steps, texts, 3)
    steps.select(np.array([2]))
    texts = [texts[2]]
    early_BV, early = started(family, [0, 2], max_new_tokens=5)  # joined by a batch that is longer, and goes on longer
    more: list[list[int]] = [[], []]
    early_BV = go_on(early_BV, early, more, 1)
    early.join(steps)
    texts = [*more, *texts]
    go_on(np.concatenate([early_BV, logits_BV[[2]]]), early, texts, 3)
    assert texts[0] == alone(family, 0, 4)
    assert texts[1] == alone(family, 2, 4)
    assert texts[2] == alone(family, 5, 6)


def test_rows_that_come_and_go_for_long_take_no_more_positions(family: Family) -> None:
    """Positions that are pads in every row are given up when rows leave: a batch can go on for ever."""
    longest, texts = 0, list[list[int]]([[]])
    logits_BV, steps = started(family, [0])
    for turn in range(1, 8):
        logits_BV = go_on(logits_BV, steps, texts, 4)
        new_BV, new = started(family, [turn])
        steps.join(new)
        logits_BV, texts = np.concatenate([logits_BV, new_BV]), [*texts, []]
        logits_BV = go_on(logits_BV, steps, texts, 2)
        assert texts[0] == alone(family, turn - 1, 6 if turn == 1 else 8)
        steps.select(np.array([1]))
        logits_BV, texts = logits_BV[[1]], [texts[1]]
        longest = max(longest, steps._cache.positions)  # type: ignore[attr-defined]
    read = 0 if family.reads_first else family.prefix_BQD.shape[1] + 5
    assert longest <= read + 8
