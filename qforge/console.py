"""What every verb shares: `--json`, `--debug`, one sentence per error, exit codes. Standard library only.

Exit 0: done · 1: a gate or check failed · 2: bad usage, bad input, or interrupted.
"""

import errno
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from qforge.peers import is_follower

INTERRUPTED = "Interrupted; finished steps are kept, run the same command again to go on."

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Outcome:
    """What a verb found out."""

    data: dict[str, Any]
    """For machines: the JSON object of `--json`."""
    text: str
    """For people: printed without `--json`."""
    exit_code: int = 0
    """1 when a gate or check failed."""


Verb = Callable[..., Outcome]


def verb(group: typer.Typer, name: str, example: str) -> Callable[[Verb], Verb]:
    """Register a function as a verb: its signature becomes the options, its docstring and `example` the help."""

    def register(function: Verb) -> Verb:
        def command(*, as_json: bool, debug: bool, **arguments: Any) -> None:
            raise typer.Exit(guarded(lambda: function(**arguments), as_json=as_json, debug=debug))

        shared = [
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
            inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption),
        ]
        own = inspect.signature(function)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values()] + shared
        command.__signature__ = own.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        examples = "\n".join(f"    {line}" for line in example.splitlines())
        group.command(name, help=f"{inspect.getdoc(function)}\n\nExample:\n\n\b\n{examples}")(command)
        return function

    return register


def guarded(work: Callable[[], Outcome], *, as_json: bool, debug: bool) -> int:
    """Do the work, stdout kept for its result; an error becomes a sentence on stderr. Returns the exit code."""
    try:
        token = _stdout.set((sys.stdout, as_json))
        try:
            with redirect_stdout(sys.stderr):
                outcome = work()
        finally:
            _stdout.reset(token)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError):
            raise
        if debug:
            traceback.print_exc()
        sentence, code = explain(error)
        print(sentence, file=sys.stderr)
        if as_json and not is_follower():
            print(json.dumps({"error": sentence, "exit_code": code}))
        return code
    if not is_follower():
        print(json.dumps(outcome.data) if as_json else outcome.text)
    return outcome.exit_code


_stdout: ContextVar[tuple[TextIO, bool]] = ContextVar("stdout")
"""Where results go while a verb is at work, and whether as JSON."""


def emit(data: dict[str, Any] | None, text: str) -> None:
    """A part of a verb's result before the verb is done: with `--json` one line of it, else the bare text.

    `data` None is for people alone: nothing is printed with `--json`.
    """
    stdout, as_json = _stdout.get((sys.stdout, False))
    if not as_json:
        print(text, end="", file=stdout, flush=True)
    elif data is not None:
        print(json.dumps(data), file=stdout, flush=True)


def must_be_ours(out: Path, marker: str) -> None:
    """Results replace a folder whole; refuse one with content that lacks the file our own results have.

    Raises InputError.
    """
    from runtime.errors import InputError

    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise InputError(f"{out} holds files but no {marker}, so it is not ours to replace; choose another --out.")


def explain(error: BaseException) -> tuple[str, int]:
    """The sentence and exit code of an error; what we did not foresee is called a fault of ours."""
    from runtime.errors import QforgeError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, 2
    if isinstance(error, QforgeError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        detail = f" ({error})" if str(error) else ""
        return f"There is not enough memory for this{detail}; ask for less at once, or use a smaller bundle.", 2
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        where = f" at {error.filename}" if error.filename else ""
        return f"No space left on the disk{where}; free some, then run the same command again.", 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}.", 2
    kind = type(error).__name__
    return f"{kind}: {error} (a fault in qforge, not in your input; add --debug to see where, and report it)", 2
