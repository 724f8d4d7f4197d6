"""Which rate each part of a trained image encoder gets: the deeper in the tower, the closer to the full one.

With decay d and L layers in use: embeddings d^(L+1), layer i d^(L-i), whatever is outside the tower 1 (BEiT's rule,
LAVIS `get_num_layer`). LAVIS writes these numbers into a field that its scheduler ignores; here a test reads them off
the optimiser.
"""

from torch import nn

from trainer.towers import VisionTower


def layer_scales(tower: VisionTower, decay: float) -> dict[nn.Parameter, float]:
    """Every trained parameter of the tower with its share of the rate that is outside the tower; none when frozen."""
    if not tower.trained:
        return {}
    depth_of = {
        parameter: depth
        for depth, layer in enumerate(tower.layers())
        for parameter in layer.parameters()
        if parameter.requires_grad
    }
    layers = 1 + max(depth_of.values(), default=-1)
    trained = (parameter for parameter in tower.parameters() if parameter.requires_grad)
    return {parameter: decay ** (layers - depth_of.get(parameter, -1)) for parameter in trained}
