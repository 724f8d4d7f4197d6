"""What `qforge tune` found fastest for a bundle on a machine: `engines/tuned.json`.

It lies beside the plans, among what was made on a device after export, and is no part of the bundle's digest. On
another machine, or with another bundle, it is left aside, and the reader says so.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, ValidationError

from runtime.backends import Device
from runtime.bundle import ENGINES, MANIFEST
from runtime.files import write_json_atomic
from runtime.machine import describe
from runtime.provider import Provider
from runtime.settings import Settings

TUNED = f"{ENGINES}/tuned.json"
AGAIN = "run qforge tune again"


class Measurement(Settings):
    """One way of running a bundle."""

    bundle: str
    """Name of its folder."""
    precision: str
    """Of vision and language, as "int8, int8"."""
    backend: str
    """See `runtime.backends.Device`."""
    provider: Provider
    """What computes under it."""
    threads: PositiveInt | None
    """CPU threads per graph; null where the back-end has none."""
    ms: NonNegativeFloat | None = None
    """Median of one request from image file to text, nothing cached (milliseconds); null when it cannot run."""
    accuracy: NonNegativeFloat | None = None
    """Mean score of its answers (0 to 1)."""
    held: bool = False
    """Whether it lost no more than was allowed."""
    why: str | None = None
    """Why it cannot run here."""

    @property
    def how(self) -> str:
        """The same in words."""
        threads = {None: "", 1: ", 1 thread"}.get(self.threads, f", {self.threads} threads")
        return f"backend {self.backend}" + (f", provider {self.provider}" if self.backend == "ort" else "") + threads

    def device(self) -> Device:
        """Where it runs."""
        return Device(self.backend, self.provider, self.threads)


class Tuned(Settings):
    """Everything in `tuned.json`."""

    format: Literal[1] = 1
    """Version of this layout."""
    bundle_digest: str
    """Of the bundle that it lies in."""
    machine: dict[str, str]
    """Where it was measured; see `runtime.machine`."""
    choice: Measurement
    """The fastest way of running this bundle that held."""
    reference: Measurement
    """What accuracy was compared with."""
    measured: tuple[Measurement, ...]
    """All that were compared, other bundles among them."""
    metric: str
    """What the accuracy is."""
    items: PositiveInt
    """Requests measured."""
    max_drop: NonNegativeFloat
    """Points (percent) that might be lost."""


@dataclass(frozen=True)
class Found:
    """What a bundle's own choice is worth here."""

    device: Device | None
    """The choice; None for none that holds here."""
    note: str | None
    """What to tell the user; None for nothing."""


def device_of(
    bundle: str | Path, backend: str | None = None, provider: Provider | None = None, threads: int | None = None
) -> Device:
    """Where a bundle runs when a program says this much; see `choice_of`. A choice that was left aside is warned of."""
    found = choice_of(Path(bundle), backend, provider, threads)
    if found.device is None and found.note is not None:
        warnings.warn(found.note, stacklevel=3)
    return found.device or Device()


def choice_of(bundle: Path, backend: str | None, provider: Provider | None, threads: int | None) -> Found:
    """Any of the three decides alone, with the defaults of the others; none of them takes what was tuned."""
    if backend is not None or provider is not None or threads is not None:
        return Found(Device(backend or "ort", provider or "cpu", threads), None)
    return read_tuned(bundle)


def write_tuned(bundle: Path, tuned: Tuned) -> None:
    """Replace a bundle's choice."""
    write_json_atomic(bundle / TUNED, tuned.model_dump(mode="json"))


def read_tuned(bundle: Path) -> Found:
    """The choice that was measured for this bundle on this machine; raises nothing, since one can go without."""
    file = bundle / TUNED
    try:
        content = file.read_bytes()
        digest = json.loads((bundle / MANIFEST).read_bytes())["digest"]
    except FileNotFoundError:
        return Found(None, None)
    except (OSError, ValueError, KeyError, TypeError):  # a bundle that cannot be read is told of when it is opened
        return Found(None, None)
    try:
        tuned = Tuned.model_validate_json(content)
    except ValidationError as error:
        return Found(
            None, f"{file}: left aside, it is not what qforge tune writes ({error.errors()[0]['msg']}); {AGAIN}"
        )
    if tuned.bundle_digest != digest:
        return Found(None, f"{file}: left aside, it was measured on another bundle; {AGAIN}")
    if tuned.machine != (here := describe()):
        theirs, ours = (", ".join(f"{key} {value}" for key, value in one.items()) for one in (tuned.machine, here))
        return Found(None, f"{file}: left aside, it was measured on another machine ({theirs}; here: {ours}); {AGAIN}")
    return Found(tuned.choice.device(), f"{bundle}: as tuned, {tuned.choice.how}")
