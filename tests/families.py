"""Tiny language models of six shapes, each with the habits of its family: begin and end tokens, pads, tied heads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tiny import widen
from trainer.config import ModelConfig
from trainer.demo_world.language import QuestionWriter, caption
from trainer.demo_world.scene import WIDE, random_scenes

FAMILIES = ("opt", "llama", "qwen2", "gpt2", "t5", "flan")
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
WIDTH, HEADS, LAYERS, POSITIONS = 32, 4, 2, 96
SPARE_ROWS = 5
"""Vocabulary rows beyond the tokenizer, as published models have them."""


@dataclass(frozen=True)
class Habits:
    """How a family's tokenizer wraps a text."""

    template: str
    begin: str | None
    pad: str | None
    marks_words: bool = False
    """SentencePiece's way: a mark in front of every word, the first one too."""


HABITS = {
    "opt": Habits("</s> $A", "</s>", "<pad>"),
    "llama": Habits("<s> $A", "<s>", None, marks_words=True),
    "qwen2": Habits("$A", None, "<pad>"),
    "gpt2": Habits("$A", None, None),
    "t5": Habits("$A </s>", None, "<pad>", marks_words=True),
    "flan": Habits("$A </s>", None, "<pad>", marks_words=True),
}


def write_family(name: str, halves: ModelConfig, folder: Path, *, std: float = 0.2, seed: int = 0) -> ModelConfig:
    """Save the language model and tokenizer of a family in `folder`; returns `halves` with that language model.

    Weights are drawn with a large `std`: fresh ones are so small that every answer is one token repeated. With a larger
    one the gated T5 is so steep that fp32 itself is 1e-4 off fp64.
    """
    tokenizer = new_tokenizer(HABITS[name])
    torch.manual_seed(seed)
    model = new_model(name, len(tokenizer) + SPARE_ROWS)
    widen(model, std, matrices_only=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return halves.model_copy(update={"language": str(folder)})


def new_model(name: str, vocabulary: int) -> PreTrainedModel:
    """Random weights in the shape of a family."""
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": vocabulary}
    llama = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": POSITIONS,
    }
    t5 = {"d_model": WIDTH, "d_kv": 6, "d_ff": 2 * WIDTH, "num_layers": LAYERS, "num_heads": HEADS}
    if name == "opt":
        ffn = {"ffn_dim": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "dropout": 0.0}
        sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "max_position_embeddings": POSITIONS}
        return OPTForCausalLM(OPTConfig(**sizes, **ffn, **ids))
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**llama, **ids))
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**llama, **ids, tie_word_embeddings=True))
    if name == "gpt2":
        config = GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=POSITIONS, **ids)
        return GPT2LMHeadModel(config)
    if name == "t5":
        return T5ForConditionalGeneration(T5Config(**t5, **ids, num_decoder_layers=1, decoder_start_token_id=1))
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model = T5ForConditionalGeneration(T5Config(**t5, **ids, **gated, decoder_start_token_id=1))
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())  # a head of its own
    return model


def new_tokenizer(habits: Habits) -> PreTrainedTokenizerFast:
    """Byte-level BPE, or BPE over marked words, trained on texts of the demo world."""
    writer = QuestionWriter(0, WIDE)
    texts = [
        text
        for scene in random_scenes(60, "train", 0, WIDE)
        for text in (caption(scene), *(f"Question: {q.text} Answer: {q.answer}" for q in writer.ask(scene, 4)))
    ]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace() if habits.marks_words else pre_tokenizers.ByteLevel(False)
    bpe.decoder = decoders.Metaspace() if habits.marks_words else decoders.ByteLevel()
    letters = [chr(code) for code in range(33, 127)] if habits.marks_words else pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=letters)
    )
    if habits.template != "$A":
        specials = [(token, number) for token, number in SPECIAL.items() if token in habits.template]
        bpe.post_processor = processors.TemplateProcessing(single=habits.template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=habits.begin, eos_token="</s>", unk_token="<unk>", pad_token=habits.pad
    )
