"""Which metrics score one answer; the same for the benchmark and for the gate of an export."""

from collections.abc import Sequence
from typing import Literal

from runtime.dataset import Row
from runtime.evaluate import Scorer
from runtime.scoring import caption_exact, vqa_score
from trainer.demo_world import scorers_for


def item_scorers(task: Literal["caption", "vqa"], rows: Sequence[Row]) -> dict[str, Scorer]:
    """Metric → scorer of one item, the headline first: what the rows know best, else what every row allows."""
    if task == "vqa":
        return {"accuracy": lambda text, row: vqa_score(text, row.answers)}
    return {**scorers_for(rows), "exact_match": lambda text, row: float(caption_exact(text, row.captions))}
