"""Hard negatives of ITM from the rows of all processes: only what was chosen is sent.

LAVIS gathers every process' image features with gradient (2.3 GB a step at its published size); the tower is frozen
and the LayerNorm after it small, so the chosen images' features are enough, and the norm is applied where they arrive.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.blip2 import TextBatch
from trainer.draws import StepDraws
from trainer.losses import hard_negatives
from trainer.ranks import Ranks


# Shape letters: b rows of a part, B rows of this process, N rows of all processes, F fetched images, n image tokens,
# E image width, T text tokens
@dataclass(frozen=True)
class Pairs:
    """Rows of one part, read."""

    texts: TextBatch
    features_bnE: Tensor
    """Tower output, before the trained LayerNorm."""
    image_ids_b: Tensor
    """A number for each image, the same on every process."""


@dataclass(frozen=True)
class Negatives:
    """What the rows of one part are told from."""

    wrong_texts_b: Tensor
    """For each image the place, in the global batch, of another's text."""
    wrong_texts: TextBatch
    """Those texts."""
    wrong_images_b: Tensor
    """For each text an image of another: below b its place in the part, from b on in `fetched_FnE`."""
    fetched_FnE: Tensor
    """Tower output of the wrong images that are not in the part; with gradient where the tower has one."""


def draw_negatives(
    image_to_text_BN: Tensor, text_to_image_BN: Tensor, same_BN: Tensor, draws: StepDraws
) -> tuple[Tensor, Tensor]:
    """For every image a wrong text and for every text a wrong image: places in the global batch, each [B]."""
    everyone = draws.shared("negatives").random((2, draws.rows))
    own_2B = torch.from_numpy(everyone[:, draws.first :][:, : len(same_BN)]).to(same_BN.device)
    return (
        hard_negatives(image_to_text_BN, same_BN, own_2B[0]),
        hard_negatives(text_to_image_BN, same_BN, own_2B[1]),
    )


def exchange(
    parts: list[Pairs], text_for_image_B: Tensor, image_for_text_B: Tensor, longest: int, ranks: Ranks
) -> list[Negatives]:
    """Get what was drawn, part by part; all processes call this together. `longest`: limit of a text (tokens)."""
    padded = [part.texts.padded(longest) for part in parts]
    ids_NT, mask_NT = (ranks.gather(torch.cat(given)) for given in ([p.ids for p in padded], [p.mask for p in padded]))
    sizes = [len(part.image_ids_b) for part in parts]
    features_BnE = parts[0].features_bnE if len(parts) == 1 else torch.cat([part.features_bnE for part in parts])
    firsts = [ranks.index * sum(sizes) + sum(sizes[:number]) for number in range(len(sizes))]
    local = [
        (places_b >= first) & (places_b < first + size)
        for places_b, first, size in zip(image_for_text_B.split(sizes), firsts, sizes, strict=True)
    ]
    fetched = ranks.fetch_rows(features_BnE, image_for_text_B[~torch.cat(local)])
    pieces = fetched.split([int((~here_b).sum()) for here_b in local])
    found = []
    for wrong_text_b, wrong_image_b, here_b, first, piece_FnE in zip(
        text_for_image_B.split(sizes), image_for_text_B.split(sizes), local, firsts, pieces, strict=True
    ):
        fetched_place_b = len(here_b) - 1 + (~here_b).cumsum(0)
        texts = TextBatch(ids_NT[wrong_text_b], mask_NT[wrong_text_b]).trimmed()
        found.append(
            Negatives(wrong_text_b, texts, torch.where(here_b, wrong_image_b - first, fetched_place_b), piece_FnE)
        )
    return found
