"""The face of the project: `qforge.load(bundle)`, paid for only when used.

import qforge
with qforge.load("runs/demo/bundle-int8") as model:
    print(model.vqa("picture.png", "what colour is the circle?").text)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qforge.recipe import Recipe as Recipe
    from qforge.recipe import load_recipe as load_recipe
    from runtime import load_retrieval as load_retrieval
    from runtime.answers import Request as Request
    from runtime.decoding import Decoding as Decoding
    from runtime.index import Index as Index
    from runtime.model import Model as Model
    from runtime.model import load as load

__version__ = "0.1.0"
__all__ = [
    "Decoding",
    "Index",
    "Model",
    "Recipe",
    "Request",
    "__version__",
    "load",
    "load_recipe",
    "load_retrieval",
]

_HOMES = {
    "Decoding": "runtime.decoding",
    "Index": "runtime.index",
    "Model": "runtime.model",
    "Recipe": "qforge.recipe",
    "Request": "runtime.answers",
    "load": "runtime.model",
    "load_recipe": "qforge.recipe",
    "load_retrieval": "runtime",
}
"""Public name → the module that has it, imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qforge' has no attribute {name!r}")
