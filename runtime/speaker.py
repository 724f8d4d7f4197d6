"""The one place that knows which graphs each kind of language model has, and which class runs them."""

from collections.abc import Callable

from runtime.backends import Engine
from runtime.decoder import Decoder
from runtime.decoding.text_decoder import TextDecoder
from runtime.encoder_decoder import EncoderDecoder
from runtime.errors import InputError
from runtime.manifest import Manifest
from runtime.static_cache import StaticDecoder, StaticEncoderDecoder

LANGUAGE_GRAPHS: dict[str, tuple[str, ...]] = {
    "decoder-only": ("language",),
    "encoder-decoder": ("encoder", "decoder"),
    "none": (),
}
"""`manifest.model.style` → graphs that hold the language model's matrices; `embed` comes before them."""

STATIC = "_static"
"""End of the name of a decoder whose cache has a fixed size, which lies beside the portable one for GPU engines."""


def open_decoder(
    manifest: Manifest, engine: Callable[[str], Engine], prompt_cache_bytes: int = 0, in_place: bool = False
) -> TextDecoder:
    """The decoder of a bundle's kind of language model; `engine` gives the engine of a named graph.

    `prompt_cache_bytes` bounds what a decoder-only model remembers of prompts; others have nothing to remember.
    `in_place`: engines have memory of their own and update it in place, so that a decoder with a cache of fixed size is
    taken where the bundle has one.

    Raises:
        InputError: the bundle has no language model.
    """
    model, generation, limits = manifest.model, manifest.generation, manifest.limits
    if model.style == "none":
        raise InputError("this bundle has no language model: it can search, but neither caption nor answer")
    names = LANGUAGE_GRAPHS[model.style]
    if in_place and (static := f"{names[-1]}{STATIC}") in manifest.graphs:
        embed, *others = (engine(name) for name in ("embed", *names[:-1], static))
        last, held = others[-1], manifest.graphs[static].inputs["past_key_0"].dtype
        if model.style == "encoder-decoder":
            return StaticEncoderDecoder(embed, others[0], last, generation, limits, held)
        return StaticDecoder(embed, last, generation, limits, held)
    embed, *others = (engine(name) for name in ("embed", *names))
    if model.style == "encoder-decoder":
        encoder, decoder = others
        return EncoderDecoder(embed, encoder, decoder, generation, limits, _cache_type(manifest, "decoder"))
    (language,) = others
    return Decoder(embed, language, generation, limits, _cache_type(manifest, "language"), prompt_cache_bytes)


def _cache_type(manifest: Manifest, graph: str) -> str:
    """What a graph takes cached keys and values in: float16 in FP16 graphs."""
    inputs = manifest.graphs[graph].inputs
    return next(spec.dtype for name, spec in inputs.items() if name.startswith("past_"))
