"""What can be said and asked about a scene, and whether a caption is true of it.

Questions come in seven kinds. Within each kind answers are spread evenly over a split, so that a reader who
never sees the picture gains nothing from the wording.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from trainer.demo_world.scene import COLOURS, RADIUS, SHAPES, Palette, Scene, Shape, relations

OPPOSITE = {"to the left of": "to the right of", "above": "below"}
UPRIGHT = ("above", "below")
OPPOSITE |= {there: here for here, there in OPPOSITE.items()}
KIND_WEIGHTS = {"colour": 3, "shape": 3, "size": 2, "count": 3, "existence": 3, "relation": 2, "yes/no": 2}
"""How often each kind is asked, relative to the others."""


@dataclass(frozen=True)
class Question:
    """One question about one scene; `kind` is a key of `KIND_WEIGHTS`."""

    kind: str
    text: str
    answer: str


def name(shape: Shape) -> str:
    """All attributes of one object: "large red circle"."""
    return f"{shape.size} {shape.colour} {shape.shape}"


def position(shape: Shape) -> str:
    """Where the centre lies in a 3 x 3 grid: "top left", "middle" …"""
    row = ("top", "", "bottom")[min(2, int(shape.y * 3))]
    column = ("left", "", "right")[min(2, int(shape.x * 3))]
    return f"{row} {column}".strip() or "middle"


def caption(scene: Scene) -> str:
    """A true description naming size, colour and shape of every object, from left to right, and where they are."""
    objects = scene.objects
    if len(objects) == 1:
        return f"a {name(objects[0])} at the {position(objects[0])}"
    if len(objects) == 2:
        first, second = objects
        where = relations(first, second)
        across = [there for there in where if there not in UPRIGHT]
        return f"a {name(first)} {(across or where)[0]} a {name(second)}"
    named = [f"a {name(o)}" for o in objects]
    return ", ".join(named[:-1]) + " and " + named[-1]


def facts(scene: Scene) -> str:
    """Everything a picture shows in telegram style: background, then each object from left to right.

    Such as "plain small red circle 13 large blue star 41"; places are squares of a board.
    """
    return " ".join(["cluttered" if scene.cluttered else "plain", *(f"{name(o)} {square(o)}" for o in scene.objects)])


def square(shape: Shape) -> str:
    """Where the centre lies on a board of 8 x 8: column and row, "11" at the top left to "88".

    One token: what is looked up about an object then holds both, and heights can be compared like columns.
    """
    return f"{1 + min(7, int(shape.x * 8))}{1 + min(7, int(shape.y * 8))}"


Note = tuple[str, str]
"""(what is given, what the facts decide)."""
Passage = tuple[Note, ...]
"""Notes that follow each other."""
PAGES = ("attributes", "measured places", "places", "numbers")
"""Kinds of notes, in the order in which one is learned with the help of the one before."""


def notes(scene: Scene, rng: np.random.Generator, palette: Palette) -> dict[str, list[Passage]]:
    """What the facts say about attributes, places and numbers, in few words; kinds without a note are left out."""
    pages: tuple[list[Passage], ...] = (
        [(note,) for note in _attributes(scene)],
        _measured(scene),
        [(note,) for of_pair in _places(scene).values() for note in of_pair],
        [(note,) for note in _numbers(scene, rng, palette)],
    )
    return {kind: page for kind, page in zip(PAGES, pages, strict=True) if page}


def _attributes(scene: Scene) -> list[Note]:
    """Such as ("the star", " blue small"), for unique shapes and colours; the size where it is clear whose it is."""
    objects = scene.objects
    pairs = Counter((o.colour, o.shape) for o in objects)
    said = [(o.shape, o.colour, o) for o in (objects[i] for i in _unique([o.shape for o in objects]))]
    said += [(o.colour, o.shape, o) for o in (objects[i] for i in _unique([o.colour for o in objects]))]
    return [(f"the {of}", f" {is_}" + (f" {o.size}" if pairs[o.colour, o.shape] == 1 else "")) for of, is_, o in said]


def _measured(scene: Scene) -> list[Passage]:
    """Such as ("blue star", " 41"), ("red circle", " 13"), ("across:", " right"), ("height:", " above"): step by step.

    Looking up and comparing are learned in a few hundred steps from these, and not in thousands from `_places`.
    """
    squares = {f"{o.colour} {o.shape}": f" {square(o)}" for o in scene.objects}
    return [
        ((first, squares[first]), (second, squares[second]), *((f"{axis}:", where) for axis, where in said.items()))
        for (first, second), said in _directions(scene).items()
    ]


def _places(scene: Scene) -> dict[tuple[str, str], list[Note]]:
    """Such as ("blue star red circle height:", " above"), by pair of objects."""
    return {
        pair: [(f"{' '.join(pair)} {axis}:", where) for axis, where in said.items()]
        for pair, said in _directions(scene).items()
    }


def _directions(scene: Scene) -> dict[tuple[str, str], dict[str, str]]:
    """Colour and shape of two objects, where it is clear which are meant → axis → " left", where that is clear."""
    pairs = [f"{o.colour} {o.shape}" for o in scene.objects]
    return {
        (pairs[i], pairs[j]): {
            "height" if where in UPRIGHT else "across": f" {where.removeprefix('to the ').removesuffix(' of')}"
            for where in relations(scene.objects[i], scene.objects[j])
        }
        for i, j in permutations(_unique(pairs), 2)
    }


def _numbers(scene: Scene, rng: np.random.Generator, palette: Palette) -> list[Note]:
    """Such as ("the red objects:", " 2"), ("the red stars:", " 0"): what is there, and near misses."""
    shapes, colours = [o.shape for o in scene.objects], [o.colour for o in scene.objects]
    asked_shapes = sorted({*shapes, str(rng.choice(palette.shapes))})
    asked_colours = sorted({*colours, str(rng.choice(palette.colours))})
    said = [(f"the {colour} objects:", colours.count(colour)) for colour in asked_colours]
    for shape in asked_shapes:
        said.append((f"the {_plural(shape)}:", shapes.count(shape)))
        colour = str(rng.choice(asked_colours))
        said.append((f"the {colour} {_plural(shape)}:", list(zip(colours, shapes, strict=True)).count((colour, shape))))
    return [(of, f" {number}") for of, number in said]


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


_OBJECT = re.compile(rf"a ({'|'.join(RADIUS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


def caption_is_true(text: str, scene: Scene) -> bool:
    """Whether a caption of any wording order names every object with all its attributes, and only true facts.

    One object needs its position, two a true relation, more the enumeration from any side.
    """
    found = list(_OBJECT.finditer(text))
    named = Counter(" ".join(match.groups()) for match in found)
    if named != Counter(name(o) for o in scene.objects):
        return False
    if len(found) == 1:
        return text[found[0].end() :] == f" at the {position(scene.objects[0])}"
    if len(found) == 2:
        said = text[found[0].end() : found[1].start()].strip()
        one, other = scene.objects
        if name(one) == name(other):
            return said in (*relations(one, other), *relations(other, one))
        first, second = (one, other) if " ".join(found[0].groups()) == name(one) else (other, one)
        return said in relations(first, second)
    return True


def _unique(values: list[str]) -> list[int]:
    counts = Counter(values)
    return [i for i, value in enumerate(values) if counts[value] == 1]


def candidates(scene: Scene, rng: np.random.Generator, palette: Palette) -> Iterator[Question]:
    """Every kind of question this scene can answer; absent things are near misses of what is there."""
    objects = scene.objects
    shapes, colours = [o.shape for o in objects], [o.colour for o in objects]
    pairs = [f"{o.colour} {o.shape}" for o in objects]
    for i in _unique(shapes):
        yield Question("colour", f"what colour is the {shapes[i]}?", colours[i])
    for i in _unique([f"{o.size} {o.shape}" for o in objects]):
        yield Question("colour", f"what colour is the {objects[i].size} {shapes[i]}?", colours[i])
    for i in _unique(colours):
        yield Question("shape", f"what shape is the {colours[i]} object?", shapes[i])
    for i in _unique([f"{o.size} {o.colour}" for o in objects]):
        yield Question("shape", f"what is the {objects[i].size} {colours[i]} object?", shapes[i])
    for i in _unique(pairs):
        yield Question("size", f"what size is the {pairs[i]}?", objects[i].size)
    yield Question("count", "how many objects are there?", str(len(objects)))
    for colour in palette.colours:
        yield Question("count", f"how many {colour} objects are there?", str(colours.count(colour)))
    for shape in palette.shapes:
        yield Question("count", f"how many {_plural(shape)} are there?", str(shapes.count(shape)))
        yield Question("existence", f"is there a {shape}?", _yes(shape in shapes))
    for colour in palette.colours:
        yield Question("existence", f"is there {_a(colour)} object?", _yes(colour in colours))
    for pair in sorted({f"{c} {s}" for c in colours for s in shapes} | {_random_pair(rng, palette) for _ in range(3)}):
        yield Question("existence", f"is there {_a(pair)}?", _yes(pair in pairs))
    for i in _unique(pairs):
        for j in _unique(pairs):
            for true in relations(objects[i], objects[j]) if i != j else ():
                yield Question("relation", f"is the {pairs[i]} {true} the {pairs[j]}?", "yes")
                yield Question("relation", f"is the {pairs[i]} {OPPOSITE[true]} the {pairs[j]}?", "no")
    for i in _unique(shapes):
        asked = str(rng.choice(palette.colours))
        yield Question("yes/no", f"is the {shapes[i]} {asked}?", _yes(asked == colours[i]))
        yield Question("yes/no", f"is the {shapes[i]} {colours[i]}?", "yes")
    yield Question("yes/no", "is the background plain?", _yes(not scene.cluttered))


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _random_pair(rng: np.random.Generator, palette: Palette) -> str:
    return f"{rng.choice(palette.colours)} {rng.choice(palette.shapes)}"


class QuestionWriter:
    """Asks about one scene after another and keeps the answers of every kind evenly spread.

    Balance is kept per question pattern ("how many * objects are there?"), the finest grouping that wording
    reveals beyond the attributes themselves, which are drawn evenly.
    """

    def __init__(self, seed: int, palette: Palette) -> None:
        self._palette = palette
        self._rng = np.random.default_rng(seed)
        self._asked: dict[str, Counter[str]] = defaultdict(Counter)

    def ask(self, scene: Scene, count: int) -> list[Question]:
        """At most `count` different questions, kinds drawn by `KIND_WEIGHTS`, rarest answers first."""
        by_kind: dict[str, list[Question]] = defaultdict(list)
        for question in candidates(scene, self._rng, self._palette):
            by_kind[question.kind].append(question)
        chosen: dict[str, Question] = {}
        for _ in range(count * 3):
            kinds = sorted(by_kind)
            weights = np.array([KIND_WEIGHTS[kind] for kind in kinds], float)
            kind = str(self._rng.choice(kinds, p=weights / weights.sum()))
            pattern = _pattern(str(self._rng.choice(sorted({_pattern(q.text) for q in by_kind[kind]}))))
            options = [q for q in by_kind[kind] if _pattern(q.text) == pattern and q.text not in chosen]
            if not options:
                continue
            asked = self._asked[pattern]
            rarest = min(asked[q.answer] for q in options)
            options = [q for q in options if asked[q.answer] == rarest]
            question = options[int(self._rng.integers(len(options)))]
            if not self._keeps_balance(question, asked):
                continue
            asked[question.answer] += 1
            chosen[question.text] = question
            if len(chosen) == count:
                break
        return list(chosen.values())

    def _keeps_balance(self, question: Question, asked: Counter[str]) -> bool:
        """Whether this answer is not already ahead of the others this pattern has seen."""
        others = [asked[answer] for answer in asked if answer != question.answer]
        return not others or asked[question.answer] <= 3 + 1.2 * sum(others) / len(others)


_WORDS = re.compile(rf"\b({'|'.join([*COLOURS, *SHAPES, *(s + 's' for s in SHAPES), 'crosses', *RADIUS])})\b")


def _pattern(text: str) -> str:
    """The question with its attribute words blanked; relations stay apart from each other."""
    return _WORDS.sub("*", text.replace(" an ", " a "))
