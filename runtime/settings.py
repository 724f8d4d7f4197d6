"""The one base of every settings model: frozen, and unknown keys are refused.

A mistyped key must be an error, never a default that silently stays; and what was checked once must not change later.
"""

from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Frozen pydantic model; the string under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def first_problem(error: ValidationError) -> str:
    """`field: what is wrong with it`, of the first of them."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
