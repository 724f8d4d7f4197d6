"""Corpus caption scores by pycocoevalcap's own classes: CIDEr, BLEU-4, ROUGE-L.

The package's tokenizer is a Java program; we hand its scorers text that is already tokenised (lower case, punctuation
removed, split at spaces), so the values differ slightly from published COCO numbers. CIDEr weighs words by how rare
they are among these very references: compare it between pipelines on the same items, never across data sets. The only
file that imports pycocoevalcap.
"""

from collections.abc import Sequence
from typing import Any

from runtime.errors import require
from runtime.text import normalise_caption


def corpus_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr, BLEU-4 and ROUGE-L of one prediction per item; `references` holds each item's reference captions.

    CIDEr runs from 0 to 10, the others from 0 to 1. CIDEr is 0 where all items share their references, because no
    word is then rare.

    Raises:
        BackendUnavailable: pycocoevalcap is not installed.
    """
    theirs = {number: [_tokenised(text) for text in texts] for number, texts in enumerate(references)}
    ours = {number: [_tokenised(text)] for number, text in enumerate(predictions)}
    if ours.keys() != theirs.keys():
        raise ValueError(f"{len(ours)} predictions for {len(theirs)} items")
    cider, _ = _scorer("cider", "Cider")().compute_score(theirs, ours)
    bleus, _ = _scorer("bleu", "Bleu")(4).compute_score(theirs, ours, verbose=0)
    rouge, _ = _scorer("rouge", "Rouge")().compute_score(theirs, ours)
    return {"CIDEr": float(cider), "BLEU-4": float(bleus[3]), "ROUGE-L": float(rouge)}


def _tokenised(text: str) -> str:
    return normalise_caption(text).replace(",", "")


def _scorer(name: str, kind: str) -> Any:
    module = require(f"pycocoevalcap.{name}.{name}", extra="bench", why="The caption scores CIDEr, BLEU-4 and ROUGE-L")
    return getattr(module, kind)
