"""What the flags say about where graphs run, as one value; without flags, what `qforge tune` found for the bundle.

Nothing heavy is imported here; see qforge/cli.py.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.backends import Device
    from runtime.provider import Provider


def device_for(bundle: Path, backend: str | None, provider: "Provider | None", threads: int | None) -> "Device":
    """Where a verb runs a bundle; what was tuned is told on stderr, whether it is taken or left aside."""
    from runtime.backends import Device
    from runtime.tuned import choice_of

    found = choice_of(bundle, backend, provider, threads)
    if found.note is not None:
        print(found.note, file=sys.stderr)
    return found.device or Device()
