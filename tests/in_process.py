"""`qforge` commands without a process of their own: starting Python is most of the time of a small one."""

import io
import json
from contextlib import redirect_stdout
from typing import Any

from qforge.cli import app


def qforge_in_process(*words: str) -> dict[str, Any]:
    """The JSON object that the command ends with; it must succeed."""
    said = io.StringIO()
    with redirect_stdout(said):
        code = app([*words, "--json"], standalone_mode=False)
    assert not code, said.getvalue()
    found: dict[str, Any] = json.loads(said.getvalue().splitlines()[-1])
    return found
