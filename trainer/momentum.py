"""A momentum encoder and its queue: more pairs to be told apart in ITC than a batch holds.

MoCo (arXiv 1911.05722, section 3.2) as ALBEF and BLIP use it: a slowly following twin of the bridge makes the features
that ITC compares with; those of past steps wait in a queue. Where MoCo's queue begins with noise, ours begins empty.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from trainer.bridge import Bridge
from trainer.losses import same_image, similarities
from trainer.negatives import Pairs
from trainer.ranks import Ranks

UNUSED = ("itm_head", "itg_head", "language_projection")
"""Parts of the bridge that have no say in the features of ITC."""


# Shape letters: B rows of this process, N rows of all processes, K keys in the queue, Q queries, C contrastive width
class MomentumEncoder:
    """The twin and the features it made of the last `capacity` pairs, the same on every process."""

    def __init__(self, bridge: Bridge, momentum: float, capacity: int) -> None:
        """`momentum`: share of itself that the twin keeps in a step; `capacity` (pairs) is at least the batch."""
        self.momentum = momentum
        self._twin = copy.deepcopy(bridge).requires_grad_(False).eval()
        for name in UNUSED:
            setattr(self._twin, name, None)
        config, device = bridge.config, bridge.query_tokens.device
        self._image_KQC = torch.zeros(capacity, config.queries, config.contrastive_width, device=device)
        self._text_KC = torch.zeros(capacity, config.contrastive_width, device=device)
        self._ids_K = torch.zeros(capacity, dtype=torch.long, device=device)
        self._seen = 0
        """Pairs that ever entered; the oldest are overwritten."""

    def logits(
        self, bridge: Bridge, image_BQC: Tensor, text_BC: Tensor, parts: list[Pairs], ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step: logits of images with texts and of texts with images [B, N + K], and which show one image.

        The twin follows `bridge`, encodes the pairs of the step, and keeps them for the steps to come.
        """
        self._follow(bridge)
        ids_B = torch.cat([part.image_ids_b for part in parts])
        ids_N = ranks.gather(ids_B)
        encoded = [self._encode(part) for part in parts]
        image_NQC, text_NC = (ranks.gather(torch.cat(made)) for made in zip(*encoded, strict=True))
        filled = min(self._seen, len(self._ids_K))
        with_image = torch.cat([image_NQC, self._image_KQC[:filled]])
        with_text = torch.cat([text_NC, self._text_KC[:filled]])
        same = same_image(ids_B, torch.cat([ids_N, self._ids_K[:filled]]))
        image_to_text = bridge.over_temperature(similarities(image_BQC, with_text))
        text_to_image = bridge.over_temperature(similarities(with_image, text_BC).T)
        self._keep(image_NQC, text_NC, ids_N)
        return image_to_text, text_to_image, same

    @torch.no_grad()
    def _follow(self, bridge: Bridge) -> None:
        online = dict(bridge.named_parameters())
        for name, parameter in self._twin.named_parameters():
            parameter.lerp_(online[name], 1 - self.momentum)

    @torch.no_grad()
    def _encode(self, part: Pairs) -> tuple[Tensor, Tensor]:
        keys, ids = self._twin.keys_of_features(part.features_bnE), part.texts.ids
        return self._twin.image_features(keys, len(ids)), self._twin.text_features(ids, part.texts.mask)

    def _keep(self, image_NQC: Tensor, text_NC: Tensor, ids_N: Tensor) -> None:
        places_N = (self._seen + torch.arange(len(ids_N), device=ids_N.device)) % len(self._ids_K)
        self._image_KQC[places_N], self._text_KC[places_N] = image_NQC, text_NC
        self._ids_K[places_N] = ids_N
        self._seen += len(ids_N)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the twin, the queue and its position."""
        return {
            "twin": self._twin.state_dict(),
            "image": self._image_KQC,
            "text": self._text_KC,
            "ids": self._ids_K,
            "seen": self._seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; RuntimeError when it is of another queue or bridge."""
        self._twin.load_state_dict(state["twin"])
        for own, stored in ((self._image_KQC, "image"), (self._text_KC, "text"), (self._ids_K, "ids")):
            own.copy_(state[stored])
        self._seen = int(state["seen"])
