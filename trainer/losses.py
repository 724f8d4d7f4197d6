"""The three stage-1 losses and the language-model loss, as functions of features and logits.

BLIP-2 (arXiv 2301.12597, section 3.2). Chance and floor values to read a curve by: ITC starts at ln N; ITM stuck
at 0.6365 has learned only its 1:2 prior; ITG starts at ln(vocabulary).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.errors import DataError

IGNORED = -100
"""Label of positions that are not predicted."""


# Shape letters: B rows of this process, N rows (or keys) they are compared with, Q queries, C contrastive width,
# T text tokens, V vocabulary, P predicted tokens
def similarities(image_BQC: Tensor, text_NC: Tensor) -> Tensor:
    """Cosine of every image with every text [B images, N texts]: the best of the image's queries."""
    return torch.einsum("iqc,tc->itq", image_BQC, text_NC).amax(dim=-1)


def same_image(image_ids_B: Tensor, image_ids_N: Tensor) -> Tensor:
    """[B, N] True where two rows show the same image: such pairs are never negatives."""
    return image_ids_B[:, None] == image_ids_N[None, :]


def itc_loss(image_to_text_BN: Tensor, text_to_image_BN: Tensor, same_BN: Tensor, smoothing: float) -> Tensor:
    """Image-text contrast both ways; logits are similarities divided by the temperature.

    Rows of the same image share the positive mass evenly (LAVIS does so where ids are known).
    """
    positives = same_BN.float()
    targets = (1 - smoothing) * positives / positives.sum(1, keepdim=True) + smoothing / same_BN.shape[1]
    return (F.cross_entropy(image_to_text_BN, targets) + F.cross_entropy(text_to_image_BN, targets)) / 2


def hard_negatives(logits_BN: Tensor, same_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """For every row one of the N that shows another image, drawn by softmax of the logits; an index vector [B].

    The draw is the inverse of the cumulated distribution at `uniform_B` (in [0, 1), float64), all rows at once: what
    is drawn does not depend on how rows are spread over processes. LAVIS draws one by one, with a host synchronisation
    each. DataError when a row has nothing to be told from.
    """
    if bool(same_BN.all(dim=1).any()):
        raise DataError(
            f"image-text matching needs another image beside each: all {same_BN.shape[1]} rows of a batch show the "
            f"same one; raise batch_size, or set itm_weight to 0"
        )
    chances_BN = logits_BN.detach().double().masked_fill(same_BN, float("-inf")).softmax(dim=1)
    reached_BN = chances_BN.cumsum(dim=1)
    total_B = reached_BN[:, -1:]
    below_total_B = torch.nextafter(total_B, torch.zeros_like(total_B))  # so that rounding never passes the last row
    wanted_B = torch.minimum(uniform_B[:, None] * total_B, below_total_B)
    return torch.searchsorted(reached_BN, wanted_B, right=True).squeeze(1)


def generation_loss(logits_PV: Tensor, targets_P: Tensor, smoothing: float, tokens: Tensor) -> Tensor:
    """Sum over predicted tokens (nats) divided by `tokens`, which is their number where it is not shared."""
    total = F.cross_entropy(logits_PV.float(), targets_P, label_smoothing=smoothing, reduction="sum")
    return total / tokens
