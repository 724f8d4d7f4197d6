"""What the demo's small bridge makes of emoji: names and categories of the val split, beside those who learn less.

Stages 1 and 2 are trained through `qforge train`. Categories are read off neighbours: val images take the category of
the train image, or train name, that is nearest. Nothing is chosen on the val split.

    python -m benchmarks.emoji --data DIR --work DIR --out FILE.json
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.caption_metrics import corpus_scores
from benchmarks.commands import qforge, setting
from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from runtime.dataset import Row, read_manifest
from runtime.evaluate import evaluate
from runtime.files import write_text_atomic
from runtime.preprocess import preprocess_batch
from runtime.progress import Progress
from runtime.recall import evaluate_retrieval
from runtime.scoring import caption_exact
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint
from trainer.generate import EagerPipeline
from trainer.retrieval import EagerRetrieval

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji.yaml"
BATCH = 64
CANDIDATES = 16
"""Of each ITC ranking, re-ranked by ITM."""

Floats = npt.NDArray[np.float32]


# Shape letters: V val images, T train images or names, F features
def measure(data: Path, work: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, then score names, categories and retrieval of the val split."""
    out, said = work / "run", setting([f"data.root={data.resolve()}", *overrides])
    trained = {
        stage: Path(qforge("train", str(RECIPE), "--out", str(out), "--stage", stage, *said)["checkpoint"])
        for stage in ("stage1", "stage2")
    }
    train, val = read_manifest(data / "captions_train.jsonl"), read_manifest(data / "captions_val.jsonl")
    stage1, speaker = load_checkpoint(trained["stage1"]), load_checkpoint(trained["stage2"])
    likeness = neighbours(stage1, train, val)
    nearest = {name: [train[i] for i in scores_VT.argmax(1)] for name, scores_VT in likeness.items()}
    generated = [a.text for a in evaluate(EagerPipeline(speaker), val, task="caption", batch_size=BATCH).answers]
    told = {"generated": generated, **{name: [row.captions[0] for row in rows] for name, rows in nearest.items()}}
    retrieval = evaluate_retrieval(EagerRetrieval(stage1), val, candidates=CANDIDATES, progress=Progress())
    return {
        "what": "emoji: names, categories and retrieval of the val split; the frozen halves are the demo's",
        "command": "python -m benchmarks.emoji --data DIR --work DIR --out FILE.json",
        "recipe": RECIPE.name,
        "settings": list(overrides),
        "items": {"train": len(train), "val": len(val)},
        "names": {name: name_scores(texts, val) for name, texts in told.items()},
        "categories": category_scores(nearest, train, val),
        "retrieval": retrieval.metrics,
        "chance_r1": 1 / retrieval.texts,
        "held_out": {stage: _history(checkpoint) for stage, checkpoint in trained.items()},
        "said": [
            {"name": row.captions[0], "generated": text, "nearest": near.captions[0]}
            for row, text, near in zip(val, generated, nearest["nearest image (ITC)"], strict=True)
        ],
        "machine": describe_machine(),
    }


def _history(checkpoint: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((checkpoint / "metrics.json").read_text())["held_out"]
    return found


def neighbours(model: Blip2, train: Sequence[Row], val: Sequence[Row]) -> dict[str, Floats]:
    """Who asks → cosine of every val image with every train image, or name [V, T]."""
    retriever = EagerRetrieval(model)

    def itc(rows: Sequence[Row]) -> Floats:
        """Each image's queries side by side, at unit length: [rows, F]."""
        parts = [retriever.embed_images([r.image for r in part]).features_BQF for part in _batches(rows)]
        return _unit(np.concatenate(parts).reshape(len(rows), -1))

    names_TF = np.concatenate([retriever.embed_texts([r.captions[0] for r in part]) for part in _batches(train)])
    queries = [retriever.embed_images([r.image for r in part]).features_BQF for part in _batches(val)]
    return {
        "nearest image (pixels)": _cosines(lambda rows: _unit(_pixels(model, rows)), train, val),
        "nearest image (frozen tower)": _cosines(lambda rows: _unit(_tower(model, rows)), train, val),
        "nearest image (ITC)": _cosines(itc, train, val),
        "nearest name (ITC)": np.einsum("vqf,tf->vtq", np.concatenate(queries), names_TF).max(-1),
    }


def _cosines(features: Callable[[Sequence[Row]], Floats], train: Sequence[Row], val: Sequence[Row]) -> Floats:
    scores: Floats = features(val) @ features(train).T
    return scores


def _pixels(model: Blip2, rows: Sequence[Row]) -> Floats:
    """What the tower is given, less its mean."""
    flat = preprocess_batch([row.image for row in rows], model.preprocess).reshape(len(rows), -1)
    centred: Floats = flat - flat.mean(1, keepdims=True)
    return centred


@torch.no_grad()
def _tower(model: Blip2, rows: Sequence[Row]) -> Floats:
    """The frozen tower's features, averaged over the picture."""
    made = [
        model.vision(torch.from_numpy(preprocess_batch([row.image for row in part], model.preprocess))).mean(1)
        for part in _batches(rows)
    ]
    features: Floats = torch.cat(made).numpy()
    return features


def _unit(features: Floats) -> Floats:
    lengthened: Floats = features / np.linalg.norm(features, axis=1, keepdims=True)
    return lengthened


def _batches(rows: Sequence[Row]) -> list[Sequence[Row]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def name_scores(texts: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """Share of names said exactly, and corpus scores; 0 to 1, CIDEr 0 to 10."""
    exact = sum(caption_exact(text, row.captions) for text, row in zip(texts, rows, strict=True)) / len(rows)
    return {"exact_match": exact, **corpus_scores(texts, [row.captions for row in rows])}


def category_scores(
    nearest: dict[str, list[Row]], train: Sequence[Row], val: Sequence[Row]
) -> dict[str, dict[str, float]]:
    """Who asks → share of val categories that are right, and its standard error.

    The majority is the most frequent category of the train split.
    """
    (majority, _), *_ = Counter(row.extra["category"] for row in train).most_common(1)
    said = {"majority": [majority] * len(val)}
    said |= {name: [row.extra["category"] for row in rows] for name, rows in nearest.items()}
    scores = {}
    for name, categories in said.items():
        share = sum(c == row.extra["category"] for c, row in zip(categories, val, strict=True)) / len(val)
        scores[name] = {"accuracy": share, "standard_error": (share * (1 - share) / len(val)) ** 0.5}
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the emoji manifests")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run; kept, so that it can go on")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of the recipe"
    )
    given = parser.parse_args(arguments)
    text = json_text(measure(given.data, given.work, given.overrides))
    write_text_atomic(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
