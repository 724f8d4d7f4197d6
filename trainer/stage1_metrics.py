"""What stage 1 measures on held-out pairs: retrieval by ITC, decisions of ITM, ITG's loss."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.dataset import Row
from runtime.text import normalise_caption
from trainer.blip2 import Blip2, TextBatch, text_batch
from trainer.data import ImageRows
from trainer.losses import same_image, similarities
from trainer.qformer import ImageKeys

EVAL_BATCH = 64


# Shape letters: B rows, N image tokens, E image width
@torch.no_grad()
def measure(model: Blip2, watched: ImageRows) -> dict[str, float]:
    """Over all rows: retrieval R@1 both ways, ITM accuracy, ITG loss per token (nats)."""
    image, text, itg, keys_of, texts_of, seen = [], [], 0.0, [], [], list[Row]()
    for start in range(0, len(watched), EVAL_BATCH):
        rows, features_BNE = watched.batch(range(start, min(start + EVAL_BATCH, len(watched))), None)
        texts = text_batch(model, [normalise_caption(row.captions[0]) for row in rows]).to(features_BNE.device)
        keys = model.bridge.keys_of_features(features_BNE)
        speaks = model.text_tokenizer.bos_token_id
        first = model.bridge.first_pass(keys, texts.ids, texts.mask, speaks, generation=True, contrast=True)
        assert first.text_BC is not None and first.logits_PV is not None
        image.append(first.image_BQC)
        text.append(first.text_BC)
        targets_P = texts.ids[:, 1:][texts.mask[:, 1:].bool()]
        itg += float(F.cross_entropy(first.logits_PV.float(), targets_P)) * len(rows)
        keys_of.append(keys)
        texts_of.append(texts)
        seen += rows
    scores = similarities(torch.cat(image), torch.cat(text))
    same = (_equal([row.image_id for row in seen]) | _equal([row.captions[0] for row in seen])).to(scores.device)
    blocks = zip(keys_of, texts_of, range(0, len(seen), EVAL_BATCH), strict=True)
    right = [_matching_accuracy(model, keys, texts, scores, same, first) for keys, texts, first in blocks]
    return {
        "itc_image_to_text_r1": _recall_at_1(scores, same),
        "itc_text_to_image_r1": _recall_at_1(scores.T, same),
        "itm_accuracy": float(torch.cat(right).float().mean()),
        "itg_loss": itg / len(seen),
    }


def _matching_accuracy(
    model: Blip2, keys: ImageKeys, texts: TextBatch, scores: Tensor, same: Tensor, first: int
) -> Tensor:
    """Per pair, whether ITM accepts the true text and rejects the hardest wrong one of the same block."""
    block = slice(first, first + len(texts.ids))
    hardest = scores[block, block].masked_fill(same[block, block], -2.0).argmax(1)
    match = model.bridge.matching_logits(keys, texts.ids, texts.mask).argmax(1) == 1
    wrong = model.bridge.matching_logits(keys, texts.ids[hardest], texts.mask[hardest]).argmax(1) == 0
    return torch.cat([match, wrong])


def _equal(names: Sequence[str]) -> Tensor:
    """[B, B] True where two names are the same: rows with one image, or one caption, are as right as each other."""
    numbers = {name: number for number, name in enumerate(names)}
    numbers_B = torch.tensor([numbers[name] for name in names])
    return same_image(numbers_B, numbers_B)


def _recall_at_1(scores: Tensor, same: Tensor) -> float:
    best = scores.argmax(1)
    return float(same[torch.arange(len(best)), best].float().mean())
