"""Halves that are too large for every device to hold whole: their layers are shared out (FSDP2) or compiled in place.

A sharded layer's weights lie in pieces on the processes and are gathered for its forward (and backward) pass alone. A
frozen half costs its gathering; of a trained one the gradients and optimiser state are in pieces too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from runtime.errors import InputError
from trainer.blip2 import Blip2
from trainer.config import StageConfig
from trainer.ranks import Ranks


def spread(stage: str, model: Blip2, config: StageConfig, ranks: Ranks) -> None:
    """Shard and compile the halves that the stage's settings name, in place; the model is on its device already."""
    halves: dict[str, Any] = {"vision": model.vision.model, "language": model.language_model}
    for name in config.shard:
        if halves[name] is None:
            raise InputError(f"{stage}.shard: expected halves that the model has, found {name}, which it has not")
        if ranks.count == 1:
            raise InputError(
                f"{stage}.shard: expected several processes to share the {name} half among, found one; start them with "
                f"torchrun or accelerate launch, or leave {stage}.shard empty"
            )
        _shard(f"{stage}.shard", halves[name], ranks)
    if config.compile:
        for half in halves.values():
            if half is not None and not any(parameter.requires_grad for parameter in half.parameters()):
                half.compile()


@contextmanager
def whole(model: Blip2) -> Iterator[None]:
    """The trained halves have whole weights meanwhile, for a checkpoint to be written; all processes call this."""
    pieces = [
        (part, name, weights)
        for part in model.trained().modules()
        for name, weights in part.named_parameters(recurse=False)
        if isinstance(weights, DTensor)
    ]
    for part, name, weights in pieces:
        part.register_parameter(name, nn.Parameter(weights.full_tensor(), requires_grad=False))
    try:
        yield
    finally:
        for part, name, weights in pieces:
            part.register_parameter(name, weights)


def _shard(setting: str, half: nn.Module, ranks: Ranks) -> None:
    layers = layers_of(half)
    if not layers:
        raise InputError(f"{setting}: {type(half).__name__} is no stack of layers that could be shared out; leave it")
    # What lies outside the layers (embeddings, norms) is small and stays whole. The half itself is not sharded: it
    # would be of another class, and transformers looks up by class which hidden states it hands out.
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def layers_of(half: nn.Module) -> list[nn.Module]:
    """The layers of all stacks of a transformer (an encoder-decoder has two), found by their number in its config."""
    config: Any = half.config
    numbers = {getattr(config, name, None) for name in ("num_hidden_layers", "num_layers", "num_decoder_layers")}
    stacks = [part for part in half.modules() if isinstance(part, nn.ModuleList) and len(part) in numbers]
    return [layer for stack in stacks for layer in stack]
