"""How results are written: JSON that people can read, with each row of samples on one line."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_FLAT_LIST = re.compile(r"\[\n\s+([^\[\]{}\"]*?)\n\s+\]")


def json_text(value: Mapping[str, Any]) -> str:
    """Indented, but a list of plain numbers takes one line; NaN is refused, for it is not JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    return _FLAT_LIST.sub(lambda found: "[" + re.sub(r"\s*\n\s*", " ", found[1]) + "]", text) + "\n"


def json_lines(lines: Sequence[Mapping[str, Any]]) -> str:
    """One object per line."""
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
