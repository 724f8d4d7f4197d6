"""The smallest set of nodes in higher precision with which a bundle holds its accuracy.

First as it was written. When that falls short: every block's own error ranks them, the smallest number of worst blocks
that holds is found by doubling and halving, then the same with the single nodes of those blocks, and last each node is
tried without. A set that held is never given up for one that was not measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from export.gate.blocks import Block
from export.gate.sensitivity import Parts, Sensitivity, rank_blocks, rank_nodes
from export.gate.trials import Candidate, Trials
from runtime.errors import CheckFailed
from runtime.progress import Progress

WORST_NAMED = 3
"""Blocks that an error names."""
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """In the order they were measured."""
    blocks: tuple[Sensitivity, ...]
    """The most harmful first; none when the bundle held as it was written."""
    complete: bool
    """False when the search ended because it had measured as many candidates as it may."""


class _Enough(Exception):
    """As many candidates were measured as the settings allow."""


def search(
    trials: Trials,
    parts: Parts,
    *,
    most: int,
    copy_plain: Callable[[], None],
    progress: Progress,
) -> Found:
    """Measure until the smallest set is found.

    Args:
        trials: Measures a set of restored nodes.
        parts: What the error of a block is measured with; its written graphs are there after `copy_plain`.
        most: Candidates that may be measured.
        copy_plain: Called once, when the first candidate is on disk.
        progress: Where bars are shown.

    Raises:
        CheckFailed: it does not hold even with everything restored; names the worst blocks.
    """

    def holds(chosen: Sequence[Block], what: str) -> bool:
        nodes = frozenset((block.graph, node) for block in chosen for node in block.nodes)
        if nodes not in trials.found and len(trials.found) >= most:
            raise _Enough
        return trials.holds(trials(nodes, what))

    if holds([], "as written"):
        return _found(trials, (), complete=True)
    copy_plain()
    ranked = rank_blocks(parts, progress)
    blocks = [one.block for one in ranked]
    if not blocks or not holds(blocks, "every block restored"):
        raise CheckFailed(_hopeless(trials, ranked))
    try:
        count = smallest_prefix(blocks, lambda worst: holds(worst, _worst(len(worst), "block")))
        nodes = [one.block for one in rank_nodes(parts, blocks[:count], progress)]
        count = smallest_prefix(nodes, lambda worst: holds(worst, f"{_worst(len(worst), 'node')} of these"))
        kept = nodes[:count]
        for node in reversed(nodes[: count - 1]):  # without the last one it was just measured
            fewer = [other for other in kept if other != node]
            if holds(fewer, f"without {node.nodes[0]}"):
                kept = fewer
    except _Enough:
        return _found(trials, ranked, complete=False)
    return _found(trials, ranked, complete=True)


def smallest_prefix(ranked: Sequence[T], holds: Callable[[Sequence[T]], bool]) -> int:
    """The least k > 0 of which `ranked[:k]` holds, when more never hurts: by doubling, then halving.

    The whole is known to hold and is not asked again.
    """
    fails, works = 0, 1
    while works < len(ranked) and not holds(ranked[:works]):
        fails, works = works, min(2 * works, len(ranked))
    while works - fails > 1:
        middle = (fails + works) // 2
        if holds(ranked[:middle]):
            works = middle
        else:
            fails = middle
    return works


def _worst(count: int, part: str) -> str:
    return f"worst {part} restored" if count == 1 else f"{count} worst {part}s restored"


def _found(trials: Trials, ranked: Sequence[Sensitivity], complete: bool) -> Found:
    assert trials.best is not None
    return Found(trials.best, tuple(trials.found.values()), tuple(ranked), complete)


def _hopeless(trials: Trials, ranked: Sequence[Sensitivity]) -> str:
    last = list(trials.found.values())[-1].accuracy
    worst = ", ".join(f"{one.block.name} (error {one.error:.2g})" for one in ranked[:WORST_NAMED])
    restored = f"every block restored; the worst blocks: {worst}" if ranked else "nothing in lower precision to restore"
    return (
        f"accuracy gate: {last.drop:.2f} points are lost against eager PyTorch "
        f"({trials.max_drop:g} allowed) even with {restored}; nothing was written"
    )
