"""What others depend on is a promise: verbs and options, recipe keys, manifest fields, public names.

A change here is a change for users. Make it on purpose, note it in CHANGELOG.md (and for the manifest raise `format`),
then renew the list:

    python tests/test_surface.py
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel

GOLDEN = Path(__file__).parent / "golden" / "surface.txt"


def verbs(group: Any, prefix: str = "qforge") -> Iterator[str]:
    for name, command in sorted(group.commands.items()):
        if hasattr(command, "commands"):
            yield from verbs(command, f"{prefix} {name}")
            continue
        for parameter in command.params:
            yield f"{prefix} {name} {parameter.opts[0] if parameter.opts[0].startswith('--') else parameter.metavar}"


def fields(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for part in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(part) and issubclass(part, BaseModel):
                yield from fields(part, f"{prefix}{name}.")


def public_names(module: str) -> Iterator[str]:
    found = importlib.import_module(module)
    exported = getattr(found, "__all__", None) or [
        name for name, value in vars(found).items() if not name.startswith("_") and inspect.isroutine(value)
    ]
    yield from (f"{module}.{name}" for name in sorted(exported))


def surface() -> list[str]:
    """One line per promise."""
    import runtime.errors
    from qforge.cli import app
    from qforge.recipe import recipe_keys
    from runtime.manifest import Manifest

    errors = [f"runtime.errors.{name}" for name, value in vars(runtime.errors).items() if inspect.isclass(value)]
    return [
        *verbs(typer.main.get_group(app)),
        *(f"recipe {key}" for key in recipe_keys()),
        *(f"manifest {key}" for key in fields(Manifest, "")),
        *public_names("qforge"),
        *public_names("runtime"),
        *sorted(name for name in errors if not name.endswith((".Path", ".ModuleType"))),
    ]


def test_surface_is_as_promised() -> None:
    promised = GOLDEN.read_text(encoding="utf-8").splitlines()
    found = surface()
    gone, new = sorted(set(promised) - set(found)), sorted(set(found) - set(promised))
    assert not gone, f"promised and gone: {gone}; if on purpose, see the head of this file"
    assert not new, f"new and not promised: {new}; see the head of this file"
    assert promised == found


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
    GOLDEN.write_text("\n".join(surface()) + "\n", encoding="utf-8")
