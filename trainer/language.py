"""The frozen language model: loaded from a Hugging Face folder of any family, and what is to be known to speak with it.

Decoder-only models (OPT, Llama, Qwen, GPT-2 …) read prefix and prompt and go on; encoder-decoders (T5, Flan-T5 …) read
them in the encoder and answer in the decoder. Families differ in data, which their config, their tokenizer and the
signature of their `forward` hold; nothing here asks for a name.
"""

import inspect
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from runtime.errors import CheckpointError, InputError
from trainer.towers import load_pretrained, read_hf_config, source_folder

Style = Literal["decoder-only", "encoder-decoder"]


def load_language(source: str) -> PreTrainedModel:
    """Frozen language model in fp32 that takes `inputs_embeds`, of either style.

    Decoding is greedy and nothing else: penalties, sampling and bans that the folder's generation_config.json asks for
    are dropped, only its first token for the decoder is kept.

    Raises:
        MissingFile: no folder that transformers can read. CheckpointError: weights that do not fit the config.
        InputError: a model that cannot take an image prefix.
    """
    folder = source_folder(source, "language")
    config = read_hf_config(folder)
    model = load_pretrained(language_class(config), folder, unexpected="refused").requires_grad_(False).eval()
    require_prefix(model)
    start = None
    if style_of(model) == "encoder-decoder":
        _require_one_table(model, folder)
        start = model.generation_config.decoder_start_token_id
        start = getattr(config, "decoder_start_token_id", None) if start is None else start
        if start is None:
            raise CheckpointError(
                f"{folder}/config.json: expected decoder_start_token_id, the token the decoder begins with, found "
                f"none; add it (T5's is its pad token)"
            )
    model.generation_config = GenerationConfig(decoder_start_token_id=start)
    return model


def language_class(config: Any) -> Any:
    """transformers' automatic class for a language model with this config."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def style_of(model: PreTrainedModel) -> Style:
    """Where the prefix goes in: before the text that is continued, or into an encoder."""
    return "encoder-decoder" if model.config.is_encoder_decoder else "decoder-only"


def takes(model: torch.nn.Module, parameter: str) -> bool:
    """Whether the model's `forward` names this parameter."""
    return parameter in inspect.signature(model.forward).parameters


def require_prefix(model: torch.nn.Module) -> None:
    """InputError when embeddings cannot be put before the model's text."""
    if not takes(model, "inputs_embeds"):
        raise InputError(
            f"{type(model).__name__} takes no `inputs_embeds`, so no image prefix can be put before its text; choose "
            f"another language model"
        )


def _require_one_table(model: PreTrainedModel, folder: str) -> None:
    """CheckpointError unless encoder and decoder look their tokens up in one table, as the `embed` graph does."""
    tables = [part.get_input_embeddings().weight for part in (model, model.get_encoder(), model.get_decoder())]
    if not all(torch.equal(tables[0], table) for table in tables[1:]):
        raise CheckpointError(
            f"{folder}: expected one embedding table for encoder and decoder, found different ones; choose a language "
            f"model that shares them (T5, Flan-T5)"
        )


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: tuple[int, ...] | None) -> tuple[int, ...]:
    """Tokens that end a text, the first of them is trained; InputError when nobody names one."""
    if configured is not None:
        return configured
    if tokenizer.eos_token_id is None:
        raise InputError(
            "model.end_token_ids: the language model's tokenizer has no end token; name the ids that end a text"
        )
    return (int(tokenizer.eos_token_id),)


def pad_token(tokenizer: PreTrainedTokenizerBase, end: int) -> int:
    """Filler of short rows. Where a family has none (Llama, GPT-2) its end token serves: the mask hides every pad."""
    return end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt as it is read when serving, and of the text that follows it after a space.

    The text is cut out of the tokens of both together where these begin with the prompt's own: a tokenizer that marks
    word beginnings (SentencePiece: Llama) would give `" red"` on its own a second mark.
    """
    read = list(tokenizer(prompt).input_ids)
    spaced = f" {text}" if prompt else text
    both = list(tokenizer(prompt + spaced).input_ids)
    if both[: len(read)] == read:
        return read, both[len(read) :]
    return read, list(tokenizer(spaced, add_special_tokens=False).input_ids)


def split_caption(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """A caption's beginning, to be read, and the rest, to be said (prefix language modelling).

    The split is drawn evenly from after the first word to the caption's midpoint (the authors' description, LAVIS
    #139; their code does not have it). A caption of one word is said whole.
    """
    words = caption.split()
    split = int(rng.integers(1, len(words) // 2, endpoint=True)) if len(words) > 1 else 0
    return " ".join(words[:split]), " ".join(words[split:])
