"""The face of the project: `qforge.load(bundle)`, paid for only when used.

import qforge
with qforge.load("runs/demo/bundle-int8") as pipeline:
    print(pipeline.vqa("picture.png", "what colour is the circle?").text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qforge.recipe import Recipe as Recipe
    from qforge.recipe import load_recipe as load_recipe
    from runtime import load as load
    from runtime import load_retrieval as load_retrieval
    from runtime.decoding import Decoding as Decoding

__version__ = "0.1.0"
__all__ = ["Decoding", "Recipe", "__version__", "load", "load_recipe", "load_retrieval"]


def __getattr__(name: str) -> Any:
    if name in {"load", "load_retrieval"}:
        import runtime

        return getattr(runtime, name)
    if name in {"Recipe", "load_recipe"}:
        from qforge import recipe

        return getattr(recipe, name)
    if name == "Decoding":
        from runtime.decoding import Decoding

        return Decoding
    raise AttributeError(f"module 'qforge' has no attribute {name!r}")
