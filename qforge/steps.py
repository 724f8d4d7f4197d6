"""Steps that are done once: the machinery under `qforge run`.

A step is a folder made from settings, files, earlier steps and code. When it is finished, `OUT/.steps/NAME.json`
records the SHA-256 of each of those four and of every file it made. A later run skips the step when nothing of
that has changed, and makes it again when anything has; a killed run therefore goes on where it stopped.

While a step works, it writes below `OUT/.steps/working/`, in a folder named for its inputs: what a training stage
left there when it was killed is found by the same inputs and by no others.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qforge.leftovers import settle_leftovers
from qforge.peers import Alone, Peers
from runtime.errors import InputError
from runtime.files import atomic_folder, sha256_of, write_json_atomic

LIBRARIES = ("numpy", "pillow", "tokenizers", "torch", "transformers", "accelerate", "nncf", "onnx", "onnxruntime")
"""Their versions count as code: after an upgrade the results are made again."""
_NO_WORK = ""
"""Told in place of a folder when a step is up to date."""
ORPHANS_S = 10.0
"""Longest wait (seconds) for the helper processes of a killed run to notice and let go of the folder."""


@dataclass(frozen=True)
class Step:
    """One folder of results and what it is made from."""

    name: str
    does: str
    """Shown while it works."""
    output: str
    """The folder it makes, relative to the run's."""
    action: Callable[[Path], None]
    """Writes the results into the folder it is given."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The part of the recipe it reads, JSON-able."""
    files: Callable[[], Mapping[str, str]] = dict
    """Fingerprints of files from outside the run, by name; asked when the step is due."""
    after: tuple[str, ...] = ()
    """Earlier steps whose outputs it reads."""
    code: tuple[str, ...] = ()
    """Our packages whose source decides the result."""
    resumes: bool = False
    """Whether the action goes on with what an interrupted call left in its folder."""
    together: bool = False
    """Whether all processes of the run do it, not the first alone."""


@dataclass(frozen=True)
class Done:
    """What became of a step."""

    name: str
    status: Literal["done", "unchanged"]
    seconds: float
    """Time the step took when it was made."""


def run_steps(steps: Sequence[Step], out: Path, say: Callable[[str], None], peers: Peers | None = None) -> list[Done]:
    """Bring every step up to date, in order; `say` gets a line per step. The caller holds `folder_lock(out)`.

    Whatever an action raises passes through, with all finished steps kept. The other processes of `peers` call
    `follow_steps`.
    """
    alone = Alone() if peers is None else peers
    return [
        _bring_up_to_date(step, f"[{n}/{len(steps)}] {step.name}", out, say, alone) for n, step in enumerate(steps, 1)
    ]


def follow_steps(steps: Sequence[Step], peers: Peers) -> None:
    """Take part, in a process that is not the first, in the steps that all do together."""
    for step in steps:
        working = peers.tell(_NO_WORK) if step.together else _NO_WORK
        if working == _NO_WORK:
            continue
        if not Path(working).is_dir():
            raise InputError(
                f"{working}: expected the folder that the first process works in, found none; the processes of a run "
                f"need one --out on a disk that all of them reach"
            )
        step.action(Path(working))


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    """What `.steps/NAME.json` says, or None when the step was never finished."""
    path = out / ".steps" / f"{name}.json"
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """The records of all finished steps of a run, oldest first."""
    paths = sorted((out / ".steps").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def _bring_up_to_date(step: Step, title: str, out: Path, say: Callable[[str], None], peers: Peers) -> Done:
    inputs = _inputs(step, out)
    record = read_record(out, step.name)
    changed = _changed(step, inputs, record, out)
    if record is not None and not changed:
        if step.together:
            peers.tell(_NO_WORK)
        say(f"{title}: unchanged, skipped")
        return Done(step.name, "unchanged", record["seconds"])
    again = f" (again: {', '.join(changed)} changed)" if record is not None else ""
    say(f"{title}: {step.does}{again}")
    start = time.monotonic()
    outputs = _make(step, inputs, out, say, peers)
    seconds = round(time.monotonic() - start, 3)
    write_json_atomic(_record_path(out, step.name), {"inputs": inputs, "outputs": outputs, "seconds": seconds})
    for leftover in _working(out).glob(f"{step.name}-*"):
        shutil.rmtree(leftover)
    say(f"{title}: done in {seconds:.1f} s")
    return Done(step.name, "done", seconds)


def _make(step: Step, inputs: Mapping[str, str], out: Path, say: Callable[[str], None], peers: Peers) -> dict[str, str]:
    """Run the action beside its final place, then publish the whole folder at once; returns its files' hashes."""
    final = out / step.output
    working = _working(out) / f"{step.name}-{_hash(inputs)[:12]}" / final.name
    finished = working.parent / "finished"  # left by a run that was killed between the action and its record
    if finished.exists():
        if step.together:
            peers.tell(_NO_WORK)
    else:
        if step.resumes:
            settle_leftovers(step.name, step.settings, step.files(), inputs, _working(out), working.parent, say)
        elif working.parent.exists():
            shutil.rmtree(working.parent)
        working.mkdir(parents=True, exist_ok=True)
        if step.together:
            peers.tell(str(working))
        step.action(working)
        finished.touch()
    final.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(final) as folder:
        # Linked, not moved: killed before this is recorded, the next run publishes again instead of working again.
        shutil.copytree(working, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        return _output_hashes(folder)


def _inputs(step: Step, out: Path) -> dict[str, str]:
    """One hash per kind of input, so that a changed kind can be named."""
    earlier = {}
    for name in step.after:
        record = read_record(out, name)
        if record is None:
            raise RuntimeError(f"step {step.name} is placed before {name}, whose output it reads")
        earlier[name] = record["outputs"]
    return {
        "settings": _hash(step.settings),
        "files": _hash(step.files()),
        "earlier steps": _hash(earlier),
        "code": _hash({package: package_hash(package) for package in step.code} | library_versions()),
    }


def _changed(step: Step, inputs: Mapping[str, str], record: dict[str, Any] | None, out: Path) -> list[str]:
    if record is None:
        return []
    changed = [kind for kind, value in inputs.items() if record["inputs"].get(kind) != value]
    final = out / step.output
    # Files added since (an engine built into a bundle) do not count; files changed or gone do.
    whole = all((final / name).is_file() and sha256_of(final / name) == sha for name, sha in record["outputs"].items())
    return changed if whole else [*changed, "outputs"]


@functools.cache
def package_hash(package: str) -> str:
    """SHA-256 over the files of one of our packages, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"package {package} is not installed")
    root = Path(spec.origin).parent
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return _hash({str(path.relative_to(root)): sha256_of(path) for path in files})


@functools.cache
def library_versions() -> dict[str, str]:
    """Installed version of every library whose version can change a result."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Keep a second run out of `out`; the system lets go of the lock when this process ends, however it ends.

    Raises InputError when another run works there, or when it is a folder of something else.
    """
    steps = out / ".steps"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder for the run, found a file; choose another --out.")
    if out.is_dir() and not steps.exists() and any(out.iterdir()):
        raise InputError(
            f"{out} holds files that no qforge run made, and a run would replace what has the name of one of its "
            "results; choose an empty or new folder for --out."
        )
    steps.mkdir(parents=True, exist_ok=True)
    with (steps / "lock").open("a+", encoding="utf-8") as lock:
        _take(lock.fileno(), steps / "lock", out)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _take(descriptor: int, path: Path, out: Path) -> None:
    deadline = time.monotonic() + ORPHANS_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EAGAIN}:
                raise
        owner = path.read_text(encoding="utf-8").strip()
        if _alive(owner) or time.monotonic() > deadline:
            raise InputError(
                f"{out} is in use by another qforge run (process {owner or 'unknown'}); "
                "wait for it, or choose another --out."
            )
        time.sleep(0.2)


def _alive(pid: str) -> bool:
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _output_hashes(folder: Path) -> dict[str, str]:
    """Hashes of the results; `resume/` is for the trainer alone and no result."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix(): sha256_of(folder / path) for path in files if path.parts[0] != "resume"}


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _working(out: Path) -> Path:
    return out / ".steps" / "working"


def _record_path(out: Path, name: str) -> Path:
    return out / ".steps" / f"{name}.json"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
