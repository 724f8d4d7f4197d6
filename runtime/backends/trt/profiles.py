"""Which profile of a plan a run takes: the tightest that holds its shapes.

A plan has a profile for each usual batch and one for everything between; the kernels of the first are chosen for that
very batch, so it is taken wherever it fits.
"""

from collections.abc import Mapping
from math import prod

from runtime.engine_manifest import EngineProfile
from runtime.errors import InputError
from runtime.manifest import TensorSpec

Shapes = Mapping[str, tuple[int, ...]]
"""Input → shape."""


def profile_for(
    graph: str, specs: Mapping[str, TensorSpec], profiles: tuple[EngineProfile, ...], shapes: Shapes
) -> int:
    """The number of the profile to run in; 0 for a plan without any, whose sizes are all fixed.

    Raises:
        InputError: an input is missing, unknown or of another rank or fixed size, or no profile holds the shapes.
    """
    if set(shapes) != set(specs):
        raise InputError(f"graph '{graph}': expected inputs {sorted(specs)}, found {sorted(shapes)}")
    for name, spec in specs.items():
        fits = len(spec.shape) == len(shapes[name]) and all(
            size == wanted or isinstance(wanted, str) for size, wanted in zip(shapes[name], spec.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"graph '{graph}': input '{name}': expected shape {_said(spec.shape)}, found {_said(shapes[name])}"
            )
    if not profiles:
        return 0
    holding = [number for number, profile in enumerate(profiles) if profile.holds(dict(shapes))]
    if not holding:
        varying = {name: shape for name, shape in shapes.items() if any(name in one.shapes for one in profiles)}
        raise InputError(
            f"graph '{graph}': this plan has no profile for "
            f"{', '.join(f'{name} {_said(shape)}' for name, shape in varying.items())}; it has "
            f"{'; '.join(f'{one.name}: {_ranges(one)}' for one in profiles)}; build one with qforge build --batch"
        )
    return min(holding, key=lambda number: _room(profiles[number]))


def is_exact(profiles: tuple[EngineProfile, ...], number: int) -> bool:
    """Whether a profile holds one set of shapes only."""
    return not profiles or _room(profiles[number]) == 1


def _room(profile: EngineProfile) -> int:
    """How many sets of shapes it holds."""
    return prod(
        high - low + 1 for least, _, most in profile.shapes.values() for low, high in zip(least, most, strict=True)
    )


def _ranges(profile: EngineProfile) -> str:
    parts = []
    for name, (least, _, most) in profile.shapes.items():
        sizes = (str(low) if low == high else f"{low}-{high}" for low, high in zip(least, most, strict=True))
        parts.append(f"{name} ({', '.join(sizes)})")
    return ", ".join(parts)


def _said(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
