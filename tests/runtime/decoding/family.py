"""Tiny language models of OPT's and T5's shape, driven by our loops and by transformers' own `generate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from export.language_modules import DecoderGraph, EmbedGraph, EncoderGraph, LanguageGraph, ignores_hidden_past
from runtime.backends.host import HostEngine
from runtime.decoder import Decoder
from runtime.decoding import GREEDY, Decoding
from runtime.decoding.stop_strings import StopStrings
from runtime.decoding.task import Floats
from runtime.decoding.text_decoder import TextDecoder
from runtime.encoder_decoder import SAID_MASK, EncoderDecoder
from runtime.manifest import Generation, Limits
from runtime.stopwatch import Stopwatch
from runtime.tokenizer import TextTokenizer
from tests.families import HABITS, HEADS, LAYERS, WIDTH, new_model, new_tokenizer

PROMPTS, QUERIES, NEW_TOKENS, PAD, START = 50, 4, 10, 1, 1
LONGEST_PROMPT = 5
Texts = list[list[tuple[int, ...]]]
"""Sequences of each row."""


class Module(HostEngine):
    """A PyTorch module as an engine; satisfies `runtime.backends.Engine` as far as decoders ask."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, tuple[int | str, ...]], outputs: Sequence[str]) -> None:
        self._module, self._inputs, self._outputs = module, dict(inputs), outputs

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        return self._inputs

    def compute(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            given = self._module(*(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._inputs))
        return dict(zip(self._outputs, (tensor.numpy() for tensor in given), strict=True))


@dataclass
class Family:
    """One language model, its decoder and what both are asked."""

    language_model: PreTrainedModel
    decoder: TextDecoder
    tokenizer: PreTrainedTokenizerFast
    text_tokenizer: TextTokenizer
    end_token_ids: tuple[int, ...]
    prefix_BQD: Floats
    prompts: list[list[int]]

    @property
    def reads_first(self) -> bool:
        """An encoder-decoder."""
        return bool(self.language_model.config.is_encoder_decoder)

    def ours(self, decoding: Decoding = GREEDY, rows: Sequence[int] | None = None) -> Texts:
        """All rows, or these, as one batch: prompts of unequal length."""
        rows = range(len(self.prompts)) if rows is None else rows
        stops = StopStrings(self.text_tokenizer, decoding.stop_strings) if decoding.stop_strings else None
        flat = self.decoder.generate(
            self.prefix_BQD[list(rows)], [self.prompts[row] for row in rows], NEW_TOKENS, Stopwatch(), decoding, stops
        )
        many, flat = decoding.num_return_sequences, [self.unpadded(text) for text in flat]
        return [flat[first : first + many] for first in range(0, len(flat), many)]

    def theirs(self, **settings: Any) -> Texts:
        """transformers' `generate`; rows of one length together, so that nothing is padded (see runtime.decoding)."""
        found: dict[int, list[tuple[int, ...]]] = {}
        embed = self.language_model.get_input_embeddings()
        if "stop_strings" in settings:
            settings["tokenizer"] = self.tokenizer
        for length in sorted({len(prompt) for prompt in self.prompts}):
            rows = [row for row, prompt in enumerate(self.prompts) if len(prompt) == length]
            ids = torch.tensor([self.prompts[row] for row in rows], dtype=torch.long).reshape(len(rows), length)
            with torch.no_grad():
                embeds = torch.cat([torch.from_numpy(self.prefix_BQD[rows]), embed(ids)], dim=1)
            said = self.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                eos_token_id=list(self.end_token_ids),
                pad_token_id=PAD,
                **settings,
            )
            texts = [self._kept(ids) for ids in said.tolist()]
            many = len(texts) // len(rows)
            found |= {row: texts[place * many : (place + 1) * many] for place, row in enumerate(rows)}
        return [found[row] for row in range(len(self.prompts))]

    def _kept(self, ids: list[int]) -> tuple[int, ...]:
        """Without the given start, the end token and the pads behind it."""
        ids = ids[1:] if self.reads_first else ids
        ends = [place for place, token in enumerate(ids) if token in self.end_token_ids]
        return self.unpadded(tuple(ids[: min(ends, default=len(ids))]))

    @staticmethod
    def unpadded(ids: tuple[int, ...]) -> tuple[int, ...]:
        """Without pads at the end: whether a text's last word is one, or they only fill up, `generate` does not say."""
        while ids and ids[-1] == PAD:
            ids = ids[:-1]
        return ids


def make_family(name: str, folder: Path, ends: Sequence[int], seed: int = 0) -> Family:
    tokenizer = new_tokenizer(HABITS[name])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    model = new_model(name, len(tokenizer)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(4, len(tokenizer), row % (LONGEST_PROMPT + 1)).tolist() for row in range(PROMPTS)]
    decoder = _decoder(model, tuple(ends))
    prefix_BQD = rng.normal(size=(PROMPTS, QUERIES, WIDTH)).astype(np.float32)
    text_tokenizer = TextTokenizer(folder / "tokenizer.json")
    return Family(model, decoder, tokenizer, text_tokenizer, tuple(ends), prefix_BQD, prompts)


def _decoder(model: PreTrainedModel, ends: tuple[int, ...]) -> TextDecoder:
    limits = Limits(max_batch=4 * PROMPTS, max_positions=90, max_question_tokens=4, max_new_tokens=NEW_TOKENS)
    reads_first = bool(model.config.is_encoder_decoder)
    generation = Generation(
        eos_token_ids=ends, pad_token_id=PAD, max_new_tokens=10, start_token_id=START if reads_first else None
    )
    embed = Module(EmbedGraph(model), {"input_ids": ("B", "T")}, ["inputs_embeds"])
    layers = model.config.num_decoder_layers if reads_first else LAYERS
    head_width = model.config.d_kv if reads_first else WIDTH // HEADS
    both = [f"{what}_{layer}" for layer in range(layers) for what in ("key", "value")]
    past = {f"past_{name}": ("B", HEADS, "P", head_width) for name in both}
    present, cross = [f"present_{name}" for name in both], [f"cross_{name}" for name in both]
    if not reads_first:
        inputs = {"inputs_embeds": ("B", "S", WIDTH), "attention_mask": ("B", "P+S"), **past}
        return Decoder(embed, Module(LanguageGraph(model), inputs, ["logits", *present]), generation, limits)
    read = {"inputs_embeds": ("B", "S", WIDTH), "attention_mask": ("B", "S")}
    encoder = Module(EncoderGraph(model), read, ["encoder_hidden", *cross])
    seen = {name: ("B", HEADS, "S", head_width) for name in cross}
    masks_past = ignores_hidden_past(model)
    masks = {"attention_mask": ("B", "S")} | ({SAID_MASK: ("B", "P+1")} if masks_past else {})
    inputs = {"inputs_embeds": ("B", 1, WIDTH), **masks, **past, **seen}
    decoder = Module(DecoderGraph(model, masks_past=masks_past), inputs, ["logits", *present])
    return EncoderDecoder(embed, encoder, decoder, generation, limits)
