"""What a demo scene holds, drawn at random from a seed, and which split its content belongs to.

A scene is one to four shapes, each with a colour and one of two sizes, on a plain or cluttered background.
Its *content* is the multiset of (size, colour, shape). The split is a hash of the content, so no
combination that is reported on was ever trained on, whatever the seed or the number of scenes.
"""

import hashlib
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

Split = Literal["train", "val", "test"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (250, 140, 22),
    "yellow": (250, 222, 40),
    "green": (40, 165, 60),
    "teal": (10, 135, 135),
    "blue": (38, 74, 222),
    "purple": (132, 48, 172),
    "pink": (250, 130, 180),
    "brown": (132, 74, 34),
    "black": (22, 22, 24),
    "gray": (128, 128, 130),
}
SHAPES = ("circle", "square", "triangle", "rectangle", "star", "cross")


@dataclass(frozen=True)
class Palette:
    """What scenes are made of."""

    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    counts: tuple[int, ...]
    """How many objects a scene may hold; a number that stands twice is drawn twice as often."""


WIDE = Palette(tuple(COLOURS), SHAPES, (1, 2, 3, 4))
"""What the frozen halves are pre-trained on: more than any one data set shows them, as with real ones."""
DEMO = Palette(
    colours=("red", "orange", "yellow", "green", "blue", "purple", "pink", "black"),
    shapes=("circle", "square", "triangle", "star", "cross"),
    counts=(1, 1, 1, 2, 2, 2, 3, 3, 4),
)
"""What the demo's own data set shows."""
RADIUS = {"small": (0.075, 0.105), "large": (0.165, 0.205)}
"""Radius of a shape's bounding circle, as a share of the picture's side (lowest, highest)."""
SHARED_ATTRIBUTE = 0.5
"""Share of later objects that repeat the shape or colour of an earlier one, so that counting has something to count."""
CLEAR_OFFSET = 0.12
"""One object is to the left of (or above) another when its centre is at least this share of the side further along that
axis; nothing is said or asked along an axis where they are closer: relations are never a matter of taste."""


@dataclass(frozen=True)
class Shape:
    """One object: `x` and `y` are the centre and `radius` the bounding circle, as shares of the picture's side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Objects in order from left to right, and the background."""

    objects: tuple[Shape, ...]
    cluttered: bool

    def content(self) -> str:
        """The multiset of attributes; equal for scenes that differ in layout alone."""
        return ",".join(sorted(f"{o.size} {o.colour} {o.shape}" for o in self.objects))

    def split(self) -> Split:
        """80 % train, 8 % val, 12 % test, by a hash of the content."""
        bucket = int.from_bytes(hashlib.sha256(self.content().encode()).digest()[:4], "big") % 100
        return "train" if bucket < 80 else "val" if bucket < 88 else "test"

    def as_json(self) -> dict[str, Any]:
        """For the manifest's `scene` field; `scene_from_json` reads it back."""
        return asdict(self)


def scene_from_json(tree: dict[str, Any]) -> Scene:
    """Inverse of `Scene.as_json`."""
    return Scene(tuple(Shape(**fields) for fields in tree["objects"]), bool(tree["cluttered"]))


def relations(first: Shape, second: Shape) -> tuple[str, ...]:
    """Where `first` is as seen from `second` along each axis where that is clear, the more distant axis first.

    Such as ("above", "to the left of"); two shapes that do not touch are always apart along one of the axes.
    """
    dx, dy = first.x - second.x, first.y - second.y
    across, upright = "to the left of" if dx < 0 else "to the right of", "above" if dy < 0 else "below"
    axes = sorted([(abs(dx), across), (abs(dy), upright)], reverse=True)
    return tuple(where for distance, where in axes if distance >= CLEAR_OFFSET)


def random_scene(rng: np.random.Generator, palette: Palette) -> Scene:
    """One scene; the objects of a two-object scene stand in a clear relation."""
    count = palette.counts[int(rng.integers(len(palette.counts)))]
    while True:
        objects: list[Shape] = []
        for _ in range(count):
            shape, colour = str(rng.choice(palette.shapes)), str(rng.choice(palette.colours))
            if objects and rng.random() < SHARED_ATTRIBUTE:
                other = objects[int(rng.integers(len(objects)))]
                shape, colour = (other.shape, colour) if rng.random() < 0.5 else (shape, other.colour)
            size = str(rng.choice(list(RADIUS)))
            placed = _place(rng, objects, shape, colour, size)
            if placed is None:
                break
            objects.append(placed)
        if len(objects) < count:
            continue
        if count == 2 and not relations(*objects):
            continue
        objects.sort(key=lambda o: o.x)
        if any(b.x - a.x < 0.02 for a, b in pairwise(objects)):
            continue  # the order from left to right must be visible
        return Scene(tuple(objects), bool(rng.random() < 0.5))


def _place(rng: np.random.Generator, others: list[Shape], shape: str, colour: str, size: str) -> Shape | None:
    for _ in range(30):
        radius = float(rng.uniform(*RADIUS[size]))
        x, y = (float(v) for v in rng.uniform(radius + 0.02, 0.98 - radius, size=2))
        if all(np.hypot(x - o.x, y - o.y) > radius + o.radius + 0.02 for o in others):
            return Shape(shape, colour, size, round(x, 4), round(y, 4), round(radius, 4))
    return None


def random_scenes(count: int, split: Split, seed: int, palette: Palette) -> list[Scene]:
    """`count` scenes of one split; a longer list of the same seed begins with the shorter one."""
    rng = np.random.default_rng([seed, ("train", "val", "test").index(split)])
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, palette)
        if scene.split() == split:
            scenes.append(scene)
    return scenes
