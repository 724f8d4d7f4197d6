"""AdamW with BLIP-2's decay groups, and its schedule: linear warm-up, then cosine, both per step."""

import math

import torch
from torch import nn

from trainer.config import StageConfig


def make_optimiser(module: nn.Module, config: StageConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient.

    Matrices decay; vectors, scalars (the temperature), embeddings and queries do not. LAVIS decays the last three
    by oversight (its rule asks for one dimension exactly).
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim != 2 or id(parameter) in embeddings or name.endswith("query_tokens")
        (kept if plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


def learning_rate(step: int, config: StageConfig) -> float:
    """Rate of optimiser step `step` (0-based)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span))) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
