"""The same numbers for TensorBoard; the only file that imports its writer."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import require
from trainer.logs.journal import Record

FOLDER = "tensorboard"


class Board:
    """Writes records of the log as scalars: `losses/itc`, `held_out/itm_accuracy`, `speed/samples_per_s` …"""

    def __init__(self, folder: Path, done: int) -> None:
        """Events of an interrupted run after step `done` are purged: TensorBoard shows each step once.

        Raises BackendUnavailable without the `tensorboard` package.
        """
        require("tensorboard", extra="tensorboard", why="tensorboard: true")
        from torch.utils.tensorboard import SummaryWriter

        # New events begin after step `done`; on a fresh folder there is nothing to purge.
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def write(self, record: Record) -> None:
        """Add one record's numbers, and an event's text."""
        step = record["step"]
        if record["kind"] == "event":
            self._writer.add_text(f"events/{record['event']}", record.get("text", record["event"]), step)
        for tag, value in _scalars(record):
            self._writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Hand everything to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _scalars(record: Record) -> Iterator[tuple[str, float]]:
    if record["kind"] == "held_out":
        yield from _tagged("held_out", record["metrics"])
    elif record["kind"] == "step":
        for group in ("losses", "speed", "memory"):
            yield from _tagged(group, record[group])
        yield from _tagged("learning_rate", {str(n): rate for n, rate in enumerate(record["learning_rates"])})
        yield "gradient_norm", float(record["gradient_norm"])


def _tagged(group: str, numbers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in numbers.items():
        if value is not None:
            yield f"{group}/{name}", float(value)
