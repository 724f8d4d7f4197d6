"""The door to matplotlib, and the colours of every picture we draw."""

import warnings
from pathlib import Path
from typing import Any

from runtime.errors import require

DPI = 130
INK, FAINT = "#1f2430", "#7a8194"


def new_figure(width_in: float, height_in: float) -> Any:
    """A figure of its own: no display, no global state."""
    figure = require("matplotlib.figure", extra="bench", why="The report's picture")
    return figure.Figure(figsize=(width_in, height_in))


def save(figure: Any, path: Path) -> None:
    """Write the figure as a PNG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # letters the font lacks become boxes
        figure.savefig(path, dpi=DPI, facecolor="white")
