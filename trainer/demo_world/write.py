"""The demo world on disk, in the manifest format, and the scorer that knows what a true caption is."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.dataset import Row
from runtime.files import atomic_folder
from runtime.progress import Progress
from trainer.data_config import DemoWorldConfig
from trainer.demo_world.draw import draw
from trainer.demo_world.language import QuestionWriter, caption, caption_is_true
from trainer.demo_world.scene import DEMO, Split, random_scenes, scene_from_json


def write_demo_world(config: DemoWorldConfig, out: Path, progress: Progress) -> Path:
    """Draw all splits below `out`: images/, captions_SPLIT.jsonl, vqa_SPLIT.jsonl; a seed gives the same bytes."""
    counts: tuple[tuple[Split, int], ...] = (
        ("train", config.train_scenes),
        ("val", config.val_scenes),
        ("test", config.test_scenes),
    )
    with atomic_folder(out) as folder:
        (folder / "images").mkdir()
        with progress.bar("demo world", sum(count for _, count in counts)) as bar:
            for number, (split, count) in enumerate(counts):
                rng, writer = np.random.default_rng([config.seed, number]), QuestionWriter(config.seed + number, DEMO)
                described, asked = [], []
                for i, scene in enumerate(random_scenes(count, split, config.seed, DEMO)):
                    image_id = f"{split}-{i:05d}"
                    name = f"images/{image_id}.png"
                    draw(scene, config.image_size, rng)[0].save(folder / name, compress_level=1)
                    row = {"image": name, "image_id": image_id}
                    described.append(row | {"captions": [caption(scene)], "scene": scene.as_json()})
                    asked += [
                        row | {"question": q.text, "answers": [q.answer], "kind": q.kind}
                        for q in writer.ask(scene, config.questions_per_scene)
                    ]
                    bar.advance()
                _write_rows(folder / f"captions_{split}.jsonl", described)
                _write_rows(folder / f"vqa_{split}.jsonl", asked)
    return out


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def attributes_right(caption: str, row: Row) -> float:
    """1.0 when the caption names every object of the row's scene with all attributes and nothing untrue, else 0.0."""
    return float(caption_is_true(caption, scene_from_json(row.extra["scene"])))


def scorers_for(rows: Sequence[Row]) -> Mapping[str, Callable[[str, Row], float]]:
    """Caption scorers that these rows allow: `attributes_right` where every row tells its scene, else none."""
    return {"attributes_right": attributes_right} if all("scene" in row.extra for row in rows) else {}
