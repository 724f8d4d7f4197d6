"""What stayed in higher precision, and why: every writer says it node by node, and the bundle keeps it.

`precision.json` holds, by graph: its numeric type, how it was written, and each kept node with the reason.
"""

from dataclasses import dataclass

REPORT = "precision.json"
"""File of the bundle."""
ASKED = "the accuracy search restored it"
"""Why a node is kept that the caller named."""


@dataclass(frozen=True)
class Kept:
    """One node that did not take the precision of its graph."""

    node: str
    """Its name in the traced graph."""
    op: str
    precision: str
    """What it computes in instead: fp32, or fp16 in a quantised graph whose rest is FP16."""
    why: str
