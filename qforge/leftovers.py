"""What an interrupted step left: found again by the same inputs, refused by others that would throw it away.

Beside its working folder a step that can be resumed keeps what it was begun with (`begun.json`), so that a later run
with another recipe can say which key changed.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.files import write_json_atomic
from runtime.settings import changed
from trainer.stage_config import deciding

BEGUN = "begun.json"


def settle_leftovers(
    name: str,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    inputs: Mapping[str, str],
    working: Path,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Make `folder`, below `working`, the place of step `name`: what an earlier call left there stays.

    Work that was begun with other settings or files is refused, and kept. Work that only the code has changed under is
    taken over, with a line to `say`. Work on the results of earlier steps that have since been made anew is left; the
    finished step removes it.

    Raises:
        InputError: with every key that changed, before and now.
    """
    begun = {"settings": settings, "files": files, "inputs": inputs}
    for other in sorted(working.glob(f"{name}-*")):
        if other == folder or not (other / BEGUN).is_file() or not _holds_work(other):
            continue
        then = json.loads((other / BEGUN).read_text(encoding="utf-8"))
        if then["inputs"]["earlier steps"] != inputs["earlier steps"]:
            continue
        before = deciding(then["settings"])  # an earlier version counted more settings
        differences = [*changed(before, _plain(settings)), *changed(then["files"], files)]
        if differences:
            raise InputError(
                f"{name} was begun with other inputs: {'; '.join(differences)}. Its work so far is kept: set it back "
                f"to go on, choose another --out, or delete {other} to begin anew."
            )
        say(
            f"{name}: the code or a library has changed since it was begun; it goes on, though not with the bits of a "
            f"run that was never interrupted"
        )
        shutil.rmtree(folder, ignore_errors=True)
        other.rename(folder)
    write_json_atomic(folder / BEGUN, begun)


def _holds_work(folder: Path) -> bool:
    return any(path.is_file() and path.name != BEGUN for path in folder.rglob("*"))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
