"""Stage 1, representation learning: image-text contrast, matching with hard negatives, image-grounded generation."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.dataset import Row
from runtime.text import normalise_caption
from trainer.blip2 import Blip2, TextBatch, text_batch
from trainer.config import Stage1Config
from trainer.data import ImageRows
from trainer.draws import StepDraws
from trainer.losses import IGNORED, hard_negatives, itc_loss, same_image, similarities, text_loss
from trainer.qformer import ImageKeys
from trainer.ranks import Ranks

EVAL_BATCH = 64


# Shape letters: B pairs, N image tokens, E image width, Q queries, T text tokens, C contrastive width
class Stage1:
    """The objective of stage 1 over caption rows."""

    def __init__(self, config: Stage1Config, train: ImageRows, watched: ImageRows) -> None:
        self.config, self.train, self.watched = config, train, watched

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Weighted sum of the three losses for the rows at `indices`, and each of them for display."""
        rows, features_BNE = self.train.batch(indices, draws)
        texts = text_batch(
            model, [normalise_caption(str(draws.row(i).choice(row.captions))) for i, row in enumerate(rows)]
        )
        same_BB = same_image(_image_numbers(rows))
        bridge, config = model.bridge, self.config
        keys = bridge.image_keys(bridge.post_layernorm(features_BNE))
        image_BQC, generated_BTV = bridge.image_and_generation(keys, *_for_generation(model, texts))
        text_BC = bridge.text_features(texts.ids, texts.mask)
        logits_BB = bridge.over_temperature(similarities(image_BQC, text_BC))
        parts: dict[str, Tensor] = {}
        if config.itc_weight:
            parts["itc"] = config.itc_weight * itc_loss(logits_BB, same_BB, config.label_smoothing)
        if config.itm_weight:
            parts["itm"] = config.itm_weight * self._matching(model, keys, texts, logits_BB, same_BB)
        if config.itg_weight:
            labels_BT = texts.ids.masked_fill(texts.mask == 0, IGNORED)
            parts["itg"] = config.itg_weight * text_loss(generated_BTV, labels_BT, config.label_smoothing)
        return torch.stack(list(parts.values())).sum(), {name: float(part.detach()) for name, part in parts.items()}

    @staticmethod
    def _matching(model: Blip2, keys: ImageKeys, texts: TextBatch, logits_BB: Tensor, same_BB: Tensor) -> Tensor:
        """ITM over true pairs, wrong image with right text, right image with wrong text (1:2)."""
        text_for_image, image_for_text = hard_negatives(logits_BB, same_BB)
        own = torch.arange(len(texts.ids), device=texts.ids.device)
        image_rows = torch.cat([own, image_for_text, own])
        text_rows = torch.cat([own, own, text_for_image])
        logits = model.bridge.matching_logits(keys.rows(image_rows), texts.ids[text_rows], texts.mask[text_rows])
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(own)] = 1
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def evaluate(self, model: Blip2) -> dict[str, float]:
        """Held out, over the watched rows: retrieval R@1 both ways, ITM accuracy, ITG loss per token (nats)."""
        image, text, itg, keys_of, texts_of, seen = [], [], 0.0, [], [], list[Row]()
        for start in range(0, len(self.watched), EVAL_BATCH):
            rows, features_BNE = self.watched.batch(range(start, min(start + EVAL_BATCH, len(self.watched))), None)
            texts = text_batch(model, [normalise_caption(row.captions[0]) for row in rows])
            keys = model.bridge.image_keys(model.bridge.post_layernorm(features_BNE))
            image_BQC, generated_BTV = model.bridge.image_and_generation(keys, *_for_generation(model, texts))
            image.append(image_BQC)
            text.append(model.bridge.text_features(texts.ids, texts.mask))
            itg += float(text_loss(generated_BTV, texts.ids.masked_fill(texts.mask == 0, IGNORED))) * len(rows)
            keys_of.append(keys)
            texts_of.append(texts)
            seen += rows
        scores = similarities(torch.cat(image), torch.cat(text))
        same = same_image(_image_numbers(seen)) | _same_text(seen)
        blocks = zip(keys_of, texts_of, range(0, len(seen), EVAL_BATCH), strict=True)
        right = [self._matching_accuracy(model, keys, texts, scores, same, first) for keys, texts, first in blocks]
        return {
            "itc_image_to_text_r1": _recall_at_1(scores, same),
            "itc_text_to_image_r1": _recall_at_1(scores.T, same),
            "itm_accuracy": float(torch.cat(right).float().mean()),
            "itg_loss": itg / len(seen),
        }

    @staticmethod
    def _matching_accuracy(
        model: Blip2, keys: ImageKeys, texts: TextBatch, scores: Tensor, same: Tensor, first: int
    ) -> Tensor:
        """Per pair, whether ITM accepts the true text and rejects the hardest wrong one of the same block."""
        block = slice(first, first + len(texts.ids))
        hardest = scores[block, block].masked_fill(same[block, block], -2.0).argmax(1)
        match = model.bridge.matching_logits(keys, texts.ids, texts.mask).argmax(1) == 1
        wrong = model.bridge.matching_logits(keys, texts.ids[hardest], texts.mask[hardest]).argmax(1) == 0
        return torch.cat([match, wrong])


def _for_generation(model: Blip2, texts: TextBatch) -> tuple[Tensor, Tensor]:
    """The same text with [DEC] in place of [CLS]."""
    ids = texts.ids.clone()
    ids[:, 0] = model.text_tokenizer.bos_token_id
    return ids, texts.mask


def _image_numbers(rows: Sequence[Row]) -> Tensor:
    names = {row.image_id: number for number, row in enumerate(rows)}
    return torch.tensor([names[row.image_id] for row in rows])


def _same_text(rows: Sequence[Row]) -> Tensor:
    """Rows whose captions read the same are as right as each other."""
    names = {row.captions[0]: number for number, row in enumerate(rows)}
    return same_image(torch.tensor([names[row.captions[0]] for row in rows]))


def _recall_at_1(scores: Tensor, same: Tensor) -> float:
    best = scores.argmax(1)
    return float(same[torch.arange(len(best)), best].float().mean())
