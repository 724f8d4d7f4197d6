"""The search itself, on bundles whose accuracy is known: small sets are found, and nothing unmeasured is chosen."""

from collections.abc import Callable, Sequence

import pytest

from export.gate import search as module
from export.gate.blocks import Block
from export.gate.metric import Accuracy
from export.gate.search import search, smallest_prefix
from export.gate.sensitivity import Parts, Sensitivity
from export.gate.trials import Candidate
from runtime.errors import CheckFailed
from runtime.progress import Progress

BLOCKS = [Block("vision", f"vision {n}: attention", (f"q{n}", f"k{n}", f"v{n}")) for n in range(10)]
Nodes = frozenset[tuple[str, str]]


class World:
    """Loses one point for each node of `broken` that is not restored."""

    def __init__(self, broken: Sequence[str], ranking: Sequence[str], max_drop: float = 0.5) -> None:
        self.broken, self.ranking, self.max_drop = set(broken), list(ranking), max_drop
        self.found: dict[Nodes, Candidate] = {}
        self.copies = 0

    def __call__(self, nodes: Nodes, what: str) -> Candidate:
        drop = float(len(self.broken - {node for _, node in nodes}))
        restored = {"vision": tuple(sorted(node for _, node in nodes))} if nodes else {}
        accuracy = Accuracy(100 - drop, drop, drop, drop, "exact")
        return self.found.setdefault(nodes, Candidate(what, restored, accuracy, 1, 1.0, 1.0))

    def holds(self, candidate: Candidate) -> bool:
        return candidate.accuracy.holds(self.max_drop)

    @property
    def best(self) -> Candidate | None:
        return min(filter(self.holds, self.found.values()), key=lambda one: one.nodes, default=None)

    def rank(self, blocks: Sequence[Block]) -> list[Sensitivity]:
        """As `ranking` has them: an error that is only an estimate."""
        order = {name: len(self.ranking) - place for place, name in enumerate(self.ranking)}
        errors = [Sensitivity(b, float(max(order.get(node, 0) for node in b.nodes))) for b in blocks]
        return sorted(errors, key=lambda one: -one.error)


Run = Callable[..., module.Found]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def found_in(world: World, most: int = 60) -> module.Found:
        def nodes(*arguments: object) -> list[Sensitivity]:
            blocks = arguments[1]
            return world.rank([Block(b.graph, n, (n,)) for b in blocks for n in b.nodes])

        monkeypatch.setattr(module, "rank_blocks", lambda *_: world.rank(BLOCKS))
        monkeypatch.setattr(module, "rank_nodes", nodes)

        def copied() -> None:
            world.copies += 1

        quiet = Progress(quiet=True)
        return search(world, Parts({}, {}, {}, lambda *_: None), most=most, copy_plain=copied, progress=quiet)

    return found_in


@pytest.mark.parametrize("works", range(1, 21))
def test_the_smallest_prefix_is_found(works: int) -> None:
    asked = []

    def holds(prefix: Sequence[int]) -> bool:
        asked.append(len(prefix))
        return len(prefix) >= works

    assert smallest_prefix(range(20), holds) == works
    assert len(asked) == len(set(asked)) <= 9
    assert 20 not in asked, "the whole is known to hold"


def test_what_holds_as_written_is_left_alone(run: Run) -> None:
    world = World([], [])
    found = run(world)
    assert (found.chosen.nodes, len(found.candidates), found.blocks, world.copies) == (0, 1, (), 0)


@pytest.mark.parametrize("broken", [["q3"], ["k7", "v7"], ["q1", "v8", "k4"]])
def test_exactly_the_broken_nodes_are_restored(broken: list[str], run: Run) -> None:
    found = run(World(broken, broken))
    assert found.complete
    assert found.chosen.restored == {"vision": tuple(sorted(broken))}
    assert len(found.candidates) < 20
    assert len({tuple(one.restored.get("vision", ())) for one in found.candidates}) == len(found.candidates)


def test_a_wrong_ranking_costs_candidates_not_the_result(run: Run) -> None:
    """The harmless q0 and v0 look worst: they are restored on the way and given up again."""
    found = run(World(["k5"], ["q0", "v0", "k5"]))
    assert found.chosen.restored == {"vision": ("k5",)}


def test_when_nothing_helps_the_worst_blocks_are_named(run: Run) -> None:
    world = World(["elsewhere"], ["q2", "q9"])
    with pytest.raises(CheckFailed, match=r"1\.00 points are lost .*\(0\.5 allowed\) even with every block restored"):
        run(world)
    with pytest.raises(CheckFailed, match=r"worst blocks: vision 2: attention \(error 2\), vision 9: attention"):
        run(world)


def test_the_search_ends_where_it_may_measure_no_more(run: Run) -> None:
    world = World(["q1", "v8", "k4"], ["q1", "v8", "k4"])
    found = run(world, most=5)
    assert not found.complete
    assert len(found.candidates) == 5
    assert world.holds(found.chosen), "what is shipped was measured and holds"
