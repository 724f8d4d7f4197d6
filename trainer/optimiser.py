"""AdamW with BLIP-2's groups, and its schedule: linear warm-up, then cosine, both per step.

LAVIS steps its cosine once per epoch, and warms up within the first epoch alone; a rate that stands still for thousands
of steps is no feature, so `recipes/lavis.yaml` takes LAVIS' numbers and this schedule.
"""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.blip2 import Blip2
from trainer.config import StageConfig
from trainer.layer_decay import layer_scales

SCALE = "scale"
"""Entry of a parameter group: its rate in units of the schedule's."""


def make_optimiser(model: Blip2, config: StageConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, one group per rate and decay.

    Weights of linear and convolution layers decay; vectors, scalars (the temperature), embeddings and queries do not.
    LAVIS decays the last three by oversight (its rule asks for one dimension exactly).
    """
    kernels = {module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    scales = _scales(model, config)
    groups: defaultdict[tuple[float, float, bool], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if parameter in kernels else 0.0
            groups[scales.get(parameter, 1.0), decay, isinstance(parameter, DTensor)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, SCALE: scale, "weight_decay": decay, "fused": not sharded}
            for (scale, decay, sharded), members in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,  # one pass over the weights in memory; torch's own choice on a CPU takes ten. Sharded ones cannot
    )


def _scales(model: Blip2, config: StageConfig) -> dict[nn.Parameter, float]:
    """Parameters whose rate is not the schedule's, with their share of it."""
    projection = model.bridge.language_projection
    scales = dict.fromkeys(() if projection is None else projection.parameters(), config.projection_rate)
    in_tower = layer_scales(model.vision, config.vision_layer_decay)
    return scales | {parameter: config.vision_rate * scale for parameter, scale in in_tower.items()}


def set_rates(optimiser: torch.optim.Optimizer, step: int, config: StageConfig) -> None:
    """Give every group its rate for optimiser step `step` (0-based)."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(step, config) * group[SCALE]


def learning_rate(step: int, config: StageConfig) -> float:
    """The schedule's rate of optimiser step `step` (0-based)."""
    if step < config.warmup_steps:
        begin = config.warmup_learning_rate
        return begin + (config.learning_rate - begin) * (step + 1) / config.warmup_steps
    span = max(1, config.steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span))) / 2
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine
