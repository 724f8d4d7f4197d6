"""A scene as a picture: antialiased shapes on a plain or cluttered pale background.

Colours, aspect and background vary a little from picture to picture, as they do in photographs.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

from trainer.demo_world.scene import COLOURS, Scene, Shape

CLUTTER = 255
"""What the map of objects says where the background is cluttered."""
OVERSAMPLE = 3
"""Shapes are drawn this much larger and shrunk: antialiasing that PIL's draw module does not have."""


def draw(scene: Scene, side: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Picture of `scene` and the map of its objects, both `side` x `side` pixels.

    The picture is RGB; the map (mode L) holds 1 + the object's index where it lies, `CLUTTER` on lines and dots of a
    cluttered background, 0 elsewhere.
    `rng` chooses background, clutter and small variations.
    """
    big = side * OVERSAMPLE
    base = rng.integers(215, 256, size=3)
    image = Image.new("RGB", (big, big), _rgb(base))
    pen = ImageDraw.Draw(image)
    objects = Image.new("L", (big, big), 0)
    object_pen = ImageDraw.Draw(objects)
    if scene.cluttered:
        _clutter(pen, object_pen, big, base, rng)
    for number, shape in enumerate(scene.objects, start=1):
        colour = np.clip(np.array(COLOURS[shape.colour]) + rng.integers(-10, 11, size=3), 0, 255)
        outline = _outline(shape, big, rng)
        pen.polygon(outline, fill=_rgb(colour))
        object_pen.polygon(outline, fill=number)
    return image.resize((side, side), Image.Resampling.BOX), objects.resize((side, side), Image.Resampling.NEAREST)


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in colour)
    return red, green, blue


def _clutter(
    pen: ImageDraw.ImageDraw, map_pen: ImageDraw.ImageDraw, side: int, base: np.ndarray, rng: np.random.Generator
) -> None:
    """Thin pale lines and dots, too faint and too thin to be taken for an object; the map shows where."""
    for _ in range(int(rng.integers(14, 26))):
        tone = _rgb(np.clip(base - rng.integers(40, 90, size=3), 0, 255))
        x, y = rng.uniform(0, side, size=2)
        if rng.random() < 0.5:
            angle, length = rng.uniform(0, math.pi), rng.uniform(0.1, 0.4) * side
            end = (x + math.cos(angle) * length, y + math.sin(angle) * length)
            for one, fill in ((pen, tone), (map_pen, CLUTTER)):
                one.line([(x, y), end], fill=fill, width=max(1, int(side * 0.012)))
        else:
            dot = rng.uniform(0.009, 0.018) * side
            for one, fill in ((pen, tone), (map_pen, CLUTTER)):
                one.ellipse([x - dot, y - dot, x + dot, y + dot], fill=fill)


def _outline(shape: Shape, side: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Corner points in pixels, inside the shape's bounding circle."""
    x, y, r = shape.x * side, shape.y * side, shape.radius * side
    if shape.shape == "circle":
        return _ring(x, y, [r * 0.95] * 40)
    if shape.shape == "square":
        half = r * 0.8
        return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]
    if shape.shape == "rectangle":
        long, short = r * 0.95, r * float(rng.uniform(0.42, 0.6))
        w, h = (long, short) if rng.random() < 0.5 else (short, long)
        return [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]
    if shape.shape == "triangle":
        return [(x, y - r), (x + r * 0.9, y + r * 0.7), (x - r * 0.9, y + r * 0.7)]
    if shape.shape == "star":
        return _ring(x, y, [r, r * 0.42] * 5)
    arm = r * 0.32
    steps = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
    cross = steps + [(-dx, -dy) for dx, dy in steps]
    return [(x + dx, y + dy) for dx, dy in cross]


def _ring(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Points around (x, y) at these radii, evenly spaced, the first one on top."""
    turn = 2 * math.pi / len(radii)
    return [(x + math.sin(i * turn) * r, y - math.cos(i * turn) * r) for i, r in enumerate(radii)]
