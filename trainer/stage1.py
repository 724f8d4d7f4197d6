"""Stage 1, representation learning: image-text contrast, matching with hard negatives, image-grounded generation.

One pass serves ITC and ITG (queries, the text to be said, the text to be compared, each behind its mask), another ITM.
The batch is global: a row is compared with the rows of all processes, and its negatives come from all of them. The
steps `embed`, `couple` and `rest` are apart so that accumulation can enlarge the contrastive batch
(trainer/grad_cache.py).
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.text import normalise_caption
from trainer.blip2 import Blip2, TextBatch, text_batch
from trainer.data import ImageRows
from trainer.draws import StepDraws
from trainer.losses import generation_loss, itc_loss, same_image, similarities
from trainer.momentum import MomentumEncoder
from trainer.negatives import Negatives, Pairs, draw_negatives, exchange
from trainer.packed import Lookers
from trainer.qformer import ImageKeys
from trainer.ranks import Ranks
from trainer.stage1_metrics import measure
from trainer.stage_config import Stage1Config


# Shape letters: b rows of a part, B rows of this process, N rows of all processes, R rows of ITM (3 b), n image tokens,
# E image width, Q queries, T text tokens, C contrastive width, P predicted tokens, V vocabulary
@dataclass(frozen=True)
class Kept:
    """What ITM and ITG use of the pass that embedded a part."""

    keys: ImageKeys
    logits_PV: Tensor | None


@dataclass(frozen=True)
class Drawn:
    """What belongs to a part and depends on the whole batch."""

    negatives: Negatives | None
    """None without ITM."""
    predicted_tokens: Tensor
    """Tokens that ITG predicts in a part: the mean over all parts of all processes."""


class Stage1:
    """The objective of stage 1 over caption rows; a loss of weight 0 is not computed."""

    def __init__(
        self, config: Stage1Config, train: ImageRows, watched: ImageRows, momentum: MomentumEncoder | None
    ) -> None:
        """`momentum`: whose features ITC compares with (MoCo); None: those of the model itself."""
        self.config, self.train, self.watched, self.momentum = config, train, watched, momentum

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the losses for the rows at `indices`, and each of them, unweighted, for display."""
        pairs = self.read(model, indices, draws)
        embeddings, kept = self.embed(model, pairs)
        coupled, figures, drawn = self.couple(model, embeddings, [pairs], draws, ranks)
        rest, more = self.rest(model, pairs, kept, drawn[0], ranks)
        return coupled + rest, figures | more

    def read(self, model: Blip2, indices: list[int], draws: StepDraws) -> Pairs:
        """Rows at `indices`, one caption of each, as tokens."""
        rows, features_bnE = self.train.batch(indices, draws)
        captions = [str(draws.row(place).choice(row.captions)) for place, row in enumerate(rows)]
        texts = text_batch(model, [normalise_caption(caption) for caption in captions])
        image_ids_b = torch.tensor([number_of(row.image_id) for row in rows], device=features_bnE.device)
        return Pairs(texts.to(features_bnE.device), features_bnE, image_ids_b)

    def embed(self, model: Blip2, part: Pairs) -> tuple[tuple[Tensor, ...], Kept]:
        """Image features [b, Q, C] and text features [b, C], and what the other losses need of the pass.

        Features that only choose negatives (ITM without ITC) carry no gradient; with ITG alone there are none.
        """
        bridge, ids, mask = model.bridge, part.texts.ids, part.texts.mask
        contrast, generation = self.config.itc_weight > 0, self.config.itg_weight > 0
        keys = bridge.keys_of_features(part.features_bnE)
        image_bQC = text_bC = logits_PV = None
        if contrast or generation:
            start = model.text_tokenizer.bos_token_id
            first = bridge.first_pass(keys, ids, mask, start, generation=generation, contrast=contrast)
            image_bQC, text_bC, logits_PV = first.image_BQC, first.text_BC, first.logits_PV
        kept = Kept(keys, logits_PV)
        if not contrast and not self.config.itm_weight:
            return (), kept
        with torch.no_grad():  # what is still missing is not trained
            image_bQC = bridge.image_features(keys, len(ids)) if image_bQC is None else image_bQC
            text_bC = bridge.text_features(ids, mask) if text_bC is None else text_bC
        return (image_bQC, text_bC), kept

    def couple(
        self, model: Blip2, embeddings: tuple[Tensor, ...], parts: list[Pairs], draws: StepDraws, ranks: Ranks
    ) -> tuple[Tensor, dict[str, float], list[Drawn]]:
        """ITC over the rows of all processes, and the negatives of ITM."""
        config, bridge = self.config, model.bridge
        tokens = torch.stack([part.texts.mask[:, 1:].sum() for part in parts])
        predicted_tokens = ranks.mean(tokens.float().mean())
        loss, figures = predicted_tokens.new_zeros(()), dict[str, float]()
        if not embeddings:
            return loss, figures, [Drawn(None, predicted_tokens) for _ in parts]
        if config.temperature_range is not None:
            bridge.hold_temperature(*config.temperature_range)
        image_BQC, text_BC = embeddings
        ids_B = torch.cat([part.image_ids_b for part in parts])
        gather = ranks.gather_with_gradient if config.itc_key_gradient else ranks.gather
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.itc_weight > 0):
            cosines = similarities(image_BQC, gather(text_BC)), similarities(gather(image_BQC), text_BC).T
            image_to_text_BN, text_to_image_BN = (bridge.over_temperature(part) for part in cosines)
        same_BN = same_image(ids_B, ranks.gather(ids_B))
        if config.itc_weight:
            logits = image_to_text_BN, text_to_image_BN, same_BN
            if self.momentum is not None:
                logits = self.momentum.logits(bridge, image_BQC, text_BC, parts, ranks)
            itc = itc_loss(*logits, config.label_smoothing)
            loss, figures = config.itc_weight * itc, {"itc": float(itc.detach())}
        if not config.itm_weight:
            return loss, figures, [Drawn(None, predicted_tokens) for _ in parts]
        wrong = draw_negatives(image_to_text_BN, text_to_image_BN, same_BN, draws)
        negatives = exchange(parts, *wrong, model.config.qformer.max_text_tokens, ranks)
        return loss, figures, [Drawn(of_part, predicted_tokens) for of_part in negatives]

    def rest(
        self, model: Blip2, part: Pairs, kept: Kept, drawn: Drawn, ranks: Ranks
    ) -> tuple[Tensor, dict[str, float]]:
        """ITM and ITG of one part."""
        config, losses = self.config, dict[str, Tensor]()
        if drawn.negatives is not None:
            losses["itm"] = self._matching(model, part.texts, kept.keys, drawn.negatives)
        if kept.logits_PV is not None:
            targets_P = part.texts.ids[:, 1:][part.texts.mask[:, 1:].bool()]
            losses["itg"] = generation_loss(kept.logits_PV, targets_P, config.label_smoothing, drawn.predicted_tokens)
        weights = {"itm": config.itm_weight, "itg": config.itg_weight}
        total = sum((weights[name] * loss for name, loss in losses.items()), start=drawn.predicted_tokens.new_zeros(()))
        return total, {name: float(loss.detach()) for name, loss in losses.items()}

    @staticmethod
    def _matching(model: Blip2, texts: TextBatch, keys: ImageKeys, negatives: Negatives) -> Tensor:
        """ITM over true pairs, right image with wrong text, wrong image with right text (1:2)."""
        rows, bridge = len(texts.ids), model.bridge
        known = keys
        # None may be fetched here and some elsewhere: whose features carry a gradient, all return it together.
        if len(negatives.fetched_FnE) or negatives.fetched_FnE.requires_grad:
            known = keys.with_more(bridge.keys_of_features(negatives.fetched_FnE))
        lookers = [Lookers(keys, 2 * rows), Lookers(known.rows(negatives.wrong_images_b), rows)]
        own, wrong = _same_length(texts, negatives.wrong_texts)
        ids_RT = torch.cat([torch.stack([own.ids, wrong.ids], dim=1).flatten(0, 1), own.ids])
        mask_RT = torch.cat([torch.stack([own.mask, wrong.mask], dim=1).flatten(0, 1), own.mask])
        labels_R = torch.zeros(3 * rows, dtype=torch.long, device=ids_RT.device)
        labels_R[: 2 * rows : 2] = 1
        return F.cross_entropy(bridge.matching(lookers, ids_RT, mask_RT), labels_R)

    def evaluate(self, model: Blip2) -> dict[str, float]:
        """Held out, over the watched rows: retrieval R@1 both ways, ITM accuracy, ITG loss per token (nats)."""
        return measure(model, self.watched)


def number_of(image_id: str) -> int:
    """An int64 that stands for the id on every process."""
    return int.from_bytes(hashlib.blake2b(image_id.encode(), digest_size=8).digest(), signed=True)


def _same_length(*batches: TextBatch) -> list[TextBatch]:
    longest = max(texts.ids.shape[1] for texts in batches)
    return [texts.padded(longest) for texts in batches]
