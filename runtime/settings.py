"""The one base of every settings model: frozen, and unknown keys are refused.

A mistyped key must be an error, never a default that silently stays; and what was checked once must not change later.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Frozen pydantic model; the string under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def first_problem(error: ValidationError) -> str:
    """`field: what is wrong with it`, of the first of them."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`section.key was 1, is now 2`, for each setting that differs."""
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key} was {_said(key, old)}, is now {_said(key, new)}" for key in keys if _differs(key, old, new)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differs(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return key not in old or key not in new or bool(old[key] != new[key])


def _said(key: str, settings: Mapping[str, Any]) -> str:
    if key not in settings:
        return "absent"
    return "null" if settings[key] is None else str(settings[key])
