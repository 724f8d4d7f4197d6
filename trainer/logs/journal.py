"""`training.jsonl`: what happened in a stage, one JSON object per line, each with its `kind` and `step`.

    {"kind": "run", "step": 0, "stage": "stage1", "steps": 100, "lines": {"itc": {"chance": 4.16, …}}, …}
    {"kind": "step", "step": 10, "losses": {"loss": 7.9, "itc": 4.0, …}, "learning_rates": [1e-3], …}
    {"kind": "held_out", "step": 50, "metrics": {"itc_image_to_text_r1": 0.4, …}}
    {"kind": "event", "step": 50, "event": "resume", …}

Lines reach the system one by one, so a killed process loses none. A resumed run cuts the file back to the step it goes
on from, and every step is there once.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from runtime.errors import CheckpointError
from runtime.files import write_text_atomic

FILE = "training.jsonl"

Record = dict[str, Any]


def read_journal(path: Path) -> list[Record]:
    """The records of a log; a last line that was cut off by a kill is left out.

    Raises CheckpointError when another line is not JSON.
    """
    records = []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last] if last else lines, 1):
        try:
            record = json.loads(line)
            records.append({"kind": record["kind"], "step": int(record["step"])} | record)
        except (ValueError, KeyError, TypeError) as error:
            if number > len(lines):
                break
            raise CheckpointError(
                f"{path}:{number}: expected a JSON object with kind and step, found {line[:40]!r}; delete the file "
                f"to go on without the log of earlier steps"
            ) from error
    return records


class Journal:
    """The log of one stage, open for appending."""

    def __init__(self, path: Path, done: int) -> None:
        """Open `path`, keeping what was recorded up to and with step `done`."""
        self.kept: list[Record] = []
        """What an interrupted run had recorded by step `done`."""
        if path.is_file():
            self.kept = [record for record in read_journal(path) if record["step"] <= done] if done else []
            write_text_atomic(path, "".join(_line(record) for record in self.kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, facts: Mapping[str, Any]) -> Record:
        """Append one record; numbers that JSON does not have are written as "inf", "-inf" and "nan"."""
        record = {"kind": kind, "step": step, **facts}
        self._file.write(_line(record))
        self._file.flush()
        return record

    def sync(self) -> None:
        """Have the disk hold every line; a resume point of this step may follow."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(record: Record) -> str:
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
