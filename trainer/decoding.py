"""The settings of `runtime.decoding` in the words of transformers' `generate`, which has them from there."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from runtime.decoding import Decoding
from runtime.errors import InputError
from trainer.blip2 import Blip2


def generate_settings(
    decoding: Decoding, model: Blip2, prompt_lengths: Sequence[int], *, draws: bool
) -> dict[str, Any]:
    """Arguments of `generate` for whatever is not its default; the seed is the caller's to set.

    `draws`: whether texts may be drawn, which then are others than a bundle draws with the same seed.

    Raises:
        InputError: `generate` would do something else than the bundle: it draws with other random numbers, and where it
            pads prompts it spares words from `repetition_penalty`.
    """
    if decoding.do_sample and not draws:
        raise InputError(
            "do_sample: eager PyTorch draws from the same probabilities with other random numbers, so its texts cannot "
            "be compared with a bundle's; leave do_sample out"
        )
    padded = model.style == "decoder-only" and len(set(prompt_lengths)) > 1
    if decoding.repetition_penalty != 1.0 and padded:
        raise InputError(
            "repetition_penalty: in eager PyTorch a row's text then depends on the longer prompts beside it; ask for "
            "one at a time (--batch-size 1)"
        )
    said = {field.name: getattr(decoding, field.name) for field in fields(decoding) if field.name != "seed"}
    settings = {name: value for name, value in said.items() if value != getattr(Decoding, name)}
    if decoding.stop_strings:
        settings |= {"stop_strings": list(decoding.stop_strings), "tokenizer": model.tokenizer}
    return settings | {"do_sample": decoding.do_sample, "num_beams": decoding.num_beams}
