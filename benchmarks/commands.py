"""Our own commands, each in a process of its own, as a user runs them."""

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from runtime.errors import CheckFailed


def qforge(*words: str) -> dict[str, Any]:
    """What `qforge WORDS --json` says at its end; its progress goes to stderr.

    Raises:
        CheckFailed: it ended with another code than 0.
    """
    command = [sys.executable, "-c", "from qforge.cli import main; main()", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CheckFailed(f"qforge {words[0]}: exit {done.returncode}; its own words are above")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def setting(overrides: Iterable[str]) -> list[str]:
    """`--set` before each override."""
    return [word for override in overrides for word in ("--set", override)]
