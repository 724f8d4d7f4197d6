"""What the flags say about where graphs run, as one value; without flags, what `qforge tune` found for the bundle.

Nothing heavy is imported here; see qforge/cli.py.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.backends import Device
    from runtime.provider import Provider


def device_for(bundle: Path | None, backend: str | None, provider: "Provider | None", threads: int | None) -> "Device":
    """Any flag decides alone, with the defaults of the others; `bundle` is None where it is not known yet."""
    from runtime.backends import Device

    if backend is None and provider is None and threads is None and bundle is not None:
        from runtime.tuned import read_tuned

        found = read_tuned(bundle)
        if found.note is not None:
            print(found.note, file=sys.stderr)
        if found.device is not None:
            return found.device
    return Device(backend or "ort", provider or "cpu", threads)
