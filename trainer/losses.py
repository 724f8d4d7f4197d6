"""The three stage-1 losses and the language-model loss, as functions of features and logits.

BLIP-2 (arXiv 2301.12597, section 3.2). Chance and floor values to read a curve by: ITC starts at ln N; ITM stuck
at 0.6365 has learned only its 1:2 prior; ITG starts at ln(vocabulary).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of positions that are not predicted."""


# Shape letters: B pairs, Q queries, C contrastive width, T text tokens, V vocabulary
def similarities(image_BQC: Tensor, text_BC: Tensor) -> Tensor:
    """Cosine of every image with every text [B images, B texts]: the best of the image's queries."""
    return torch.einsum("iqc,tc->itq", image_BQC, text_BC).amax(dim=-1)


def same_image(image_ids_B: Tensor) -> Tensor:
    """[B, B] True where two rows show the same image: such pairs are never negatives."""
    return image_ids_B[:, None] == image_ids_B[None, :]


def itc_loss(logits_BB: Tensor, same_BB: Tensor, smoothing: float) -> Tensor:
    """Image-text contrast both ways; `logits_BB` are similarities divided by the temperature.

    Rows of the same image share the positive mass evenly (LAVIS does so where ids are known).
    """
    positives = same_BB.float()
    targets = (1 - smoothing) * positives / positives.sum(1, keepdim=True) + smoothing / len(positives)
    return (F.cross_entropy(logits_BB, targets) + F.cross_entropy(logits_BB.T, targets)) / 2


def hard_negatives(logits_BB: Tensor, same_BB: Tensor) -> tuple[Tensor, Tensor]:
    """For every image a wrong text and for every text a wrong image, drawn by similarity; two index vectors [B].

    All draws happen at once (LAVIS draws one by one, with a host synchronisation each). When a batch holds one
    image only there is no negative, and the draw raises torch's error.
    """
    blocked = logits_BB.detach().float().masked_fill(same_BB, float("-inf"))
    text_for_image = torch.multinomial(blocked.softmax(1), 1).squeeze(1)
    image_for_text = torch.multinomial(blocked.T.softmax(1), 1).squeeze(1)
    return text_for_image, image_for_text


def text_loss(logits_BTV: Tensor, labels_BT: Tensor, smoothing: float = 0.0) -> Tensor:
    """Next-token loss (nats per predicted token): position t predicts label t + 1; `IGNORED` labels are skipped."""
    return F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        labels_BT[:, 1:].flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
