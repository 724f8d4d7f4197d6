"""Search results as one picture: a row per query, its hits in order with their scores. It needs no more than PIL."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from runtime.errors import ImageError, InputError
from runtime.preprocess import load_image
from runtime.search import Hit

TILE, GAP, LINE = 180, 14, 18
"""Side of a shown image, space between tiles, height of a line of text (pixels)."""
FONT_SIZE, TITLE_SIZE = 13, 16
INK, FAINT, PAPER, EDGE = "#1f2430", "#7a8194", "white", "#d5d9e2"
CAPTION_LINES = 2
"""Lines below an image: its scores, its file."""
COLUMN_CHARS = 24
TEXT_CHARS = 70


@dataclass(frozen=True)
class Result:
    """What one query found."""

    query: str
    """The text, or the path of the image."""
    hits: list[tuple[str, Hit]]
    """Image paths or texts, best first."""


def draw_results(results: Sequence[Result], path: Path, *, queries_are_images: bool) -> None:
    """Save the results at `path`; InputError when the name has no image ending PIL knows."""
    rows = [_texts_row(result) if queries_are_images else _images_row(result) for result in results]
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        sheet.save(path)
    except ValueError as error:
        raise InputError(f"--picture {path}: expected a name that ends in .png or .jpg") from error


def _images_row(result: Result) -> Image.Image:
    """The text as title, images side by side."""
    title = textwrap.wrap(result.query, COLUMN_CHARS * max(2, len(result.hits))) or [""]
    top = GAP + len(title) * (LINE + 4) + 4
    width = max(2, len(result.hits)) * (TILE + GAP) + GAP
    row, draw = _blank(width, top + TILE + CAPTION_LINES * LINE + GAP)
    _write(draw, (GAP, GAP), title, TITLE_SIZE, INK, LINE + 4)
    for place, (image, hit) in enumerate(result.hits):
        left = GAP + place * (TILE + GAP)
        _show(row, image, (left, top))
        matched = "" if hit.match_probability is None else f" · match {100 * hit.match_probability:.0f} %"
        _write(draw, (left, top + TILE + 4), [f"{place + 1}.  itc {hit.itc:.3f}{matched}"], FONT_SIZE, INK, LINE)
        name = textwrap.shorten(Path(image).name, COLUMN_CHARS, placeholder="…")
        _write(draw, (left, top + TILE + 4 + LINE), [name], FONT_SIZE, FAINT, LINE)
    return row


def _texts_row(result: Result) -> Image.Image:
    """The image on the left, texts beside it."""
    lines = list[tuple[str, str]]()
    for place, (text, hit) in enumerate(result.hits):
        matched = "" if hit.match_probability is None else f" · match {100 * hit.match_probability:.0f} %"
        lines += [(line, INK) for line in textwrap.wrap(f"{place + 1}.  {text}", TEXT_CHARS)]
        lines.append((f"itc {hit.itc:.3f}{matched}", FAINT))
    row, draw = _blank(TILE + 3 * GAP + TEXT_CHARS * 7, 2 * GAP + max(TILE + LINE, len(lines) * LINE))
    _show(row, result.query, (GAP, GAP))
    _write(draw, (GAP, GAP + TILE + 2), [textwrap.shorten(Path(result.query).name, COLUMN_CHARS)], FONT_SIZE, FAINT, 0)
    for number, (line, colour) in enumerate(lines):
        _write(draw, (TILE + 2 * GAP, GAP + number * LINE), [line], FONT_SIZE, colour, LINE)
    return row


def _blank(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    row = Image.new("RGB", (width, height), PAPER)
    return row, ImageDraw.Draw(row)


def _show(row: Image.Image, source: str, place: tuple[int, int]) -> None:
    """The image scaled into a tile; an empty tile where the file is gone since it was indexed."""
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    draw = ImageDraw.Draw(tile)
    try:
        image = load_image(source)
        scale = min(TILE / image.width, TILE / image.height)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        shown = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)
        tile.paste(shown, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    except ImageError:
        _write(draw, (8, 8), ["no longer there"], FONT_SIZE, FAINT, LINE)
    draw.rectangle((0, 0, TILE - 1, TILE - 1), outline=EDGE)
    row.paste(tile, place)


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], size: int, colour: str, line: int
) -> None:
    font = ImageFont.load_default(size)
    for number, text in enumerate(lines):
        shown = "".join(letter if letter.isprintable() else " " for letter in text)
        draw.text((place[0], place[1] + number * line), shown, fill=colour, font=font)
