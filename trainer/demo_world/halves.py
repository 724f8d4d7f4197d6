"""The small frozen halves of the demo: a vision tower and a language model, really pre-trained on the demo world.

The vision tower learns, supervised, what lies under each of its patches (shape, colour, size, where the object's
centre is, which one it is from the left and from the top) and what the whole picture holds. The language models
(one OPT-like, one T5-like) learn text alone: documents that tell the facts of one scene and then describe it or ask
about it, so that, like large ones, they can read captions and answers off their context. Only train-split scenes are
used. The folders are ordinary Hugging Face ones in fp16 (about 7 MB together).

    python -m trainer.demo_world.halves OUT [FOLDER…]      # what made trainer/demo_halves/; see its record.json
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from runtime.preprocess import PreprocessSettings, preprocess
from runtime.progress import Progress
from trainer.config import DEMO_FOLDERS, DemoHalvesConfig, ModelConfig
from trainer.demo_world.draw import CLUTTER, draw
from trainer.demo_world.optimise import optimise
from trainer.demo_world.reader import Told, pretrain_language, tell
from trainer.demo_world.scene import COLOURS, RADIUS, SHAPES, WIDE, Scene, random_scenes
from trainer.demo_world.vocabulary import train_text_tokenizer
from trainer.language import Style
from trainer.new_halves import new_vision_tower

STYLES: dict[str, Style] = {"language": "decoder-only", "language_t5": "encoder-decoder"}
"""Language halves, by folder."""
SIDE, PATCH = 64, 8
GRID = SIDE // PATCH
PIXELS = PreprocessSettings(height=SIDE, width=SIDE, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DRAWN = 128
"""Side of the drawn picture before it is resized (pixels)."""
COVERED = 0.08
"""A patch shows an object when the object covers at least this share of it."""
PLACES = ("first", "second", "third", "fourth")
LABELS: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "size": list(RADIUS),
    "from_left": list(PLACES),
    "from_top": list(PLACES),
}
"""What a patch is asked about the object it shows."""


# Shape letters: B images, N patches, E image width, T tokens
class PatchTeacher(nn.Module):
    """Linear heads that ask the tower what each patch and the whole picture show; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch_heads = nn.ModuleList(nn.Linear(width, 1 + len(names)) for names in LABELS.values())
        self.centre = nn.Linear(width, 2)
        self.counts = nn.Linear(width, len(SHAPES) + len(COLOURS) + len(SHAPES) * len(COLOURS))
        self.cluttered = nn.Linear(width, 1)

    def forward(
        self, features_BNE: Tensor, patches: Tensor, centres: Tensor, counts: Tensor, cluttered_BN: Tensor
    ) -> Tensor:
        """Sum of the losses; patches [B, 5, N] (0 = none), centres [B, N, 2], counts [B, K], cluttered [B, 1 + N].

        Every token is asked whether it shows clutter, the first one about the whole picture: asked of the picture alone
        it was not learned.
        """
        features_BNE = self.norm(features_BNE)
        tokens_BNE = features_BNE[:, 1:]
        loss = torch.zeros(())
        for i, head in enumerate(self.patch_heads):
            loss = loss + F.cross_entropy(head(tokens_BNE).flatten(0, 1), patches[:, i].flatten())
        shown = (patches[:, 0] > 0).unsqueeze(-1)
        loss = loss + 4 * ((self.centre(tokens_BNE) - centres) ** 2 * shown).sum() / shown.sum().clamp(min=1)
        loss = loss + ((self.counts(features_BNE[:, 0]) - counts) ** 2).mean()
        return loss + F.binary_cross_entropy_with_logits(self.cluttered(features_BNE).squeeze(-1), cluttered_BN)


def _targets(scene: Scene, object_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of one picture: patches [5, N], centres [N, 2], counts of shapes and colours [K], clutter [1 + N]."""
    cells = object_map.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    cover = np.stack([(cells == i + 1).mean(1) for i in range(len(scene.objects))])
    winner = np.where(cover.max(0) >= COVERED, cover.argmax(0), -1)
    patches, centres = np.zeros((len(LABELS), GRID**2), np.int64), np.zeros((GRID**2, 2), np.float32)
    counts = np.zeros((len(SHAPES) + 1, len(COLOURS) + 1), np.float32)
    for i, o in enumerate(scene.objects):
        above = sum(other.y < o.y for other in scene.objects)
        values = (o.shape, o.colour, o.size, PLACES[i], PLACES[above])
        for row, (value, names) in enumerate(zip(values, LABELS.values(), strict=True)):
            patches[row, winner == i] = 1 + names.index(value)
        centres[winner == i] = (2 * o.x - 1, 2 * o.y - 1)
        counts[SHAPES.index(o.shape), list(COLOURS).index(o.colour)] += 1
    counts[-1, :-1], counts[:-1, -1] = counts[:-1, :-1].sum(0), counts[:-1, :-1].sum(1)
    cluttered = np.array([scene.cluttered, *(cells == CLUTTER).any(1)], np.float32)
    return patches, centres, counts.flatten()[:-1], cluttered


def pretrain_vision(config: DemoHalvesConfig, out: Path, progress: Progress) -> dict[str, float]:
    """Train the tower, save it to `out`; returns the share it says rightly of held-out object patches and pictures."""
    torch.manual_seed(config.seed)
    train = _drawn(random_scenes(config.scenes, "train", config.seed + 1000, WIDE), config.seed)
    held = _drawn(random_scenes(256, "val", config.seed + 1000, WIDE), config.seed + 1)
    tower = new_vision_tower(image_size=SIDE, patch=PATCH, width=128, layers=6, heads=4)
    teacher = PatchTeacher(128)
    order = torch.Generator().manual_seed(config.seed)

    def step() -> Tensor:
        rows = torch.randint(len(train[0]), (config.vision_batch_size,), generator=order)
        pixels, *labels = (part[rows] for part in train)
        return teacher(tower(_to_float(pixels)).last_hidden_state, *labels)

    optimise([tower, teacher], step, config.vision_steps, config.vision_learning_rate, progress, "vision tower")
    tower.half().save_pretrained(out)
    stored = {
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
        "resample": 3,
        "size": {"height": SIDE, "width": SIDE},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(stored, indent=2) + "\n")
    tower.float().eval()
    with torch.no_grad():
        features_BNE = teacher.norm(tower(_to_float(held[0])).last_hidden_state)
        shown = held[1][:, 0] > 0
        right = {
            f"patch_{kind}": (head(features_BNE[:, 1:]).argmax(-1) == held[1][:, i])[shown]
            for i, (kind, head) in enumerate(zip(LABELS, teacher.patch_heads, strict=True))
        }
        right["cluttered"] = (teacher.cluttered(features_BNE[:, 0]).squeeze(-1) > 0) == held[4][:, 0].bool()
    return {kind: round(float(hits.float().mean()), 4) for kind, hits in right.items()}


def _drawn(scenes: list[Scene], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pixels [n, 3, H, W] as uint8, to be brought to floats batch by batch, and the labels `PatchTeacher` asks for."""
    rng = np.random.default_rng(seed)
    neutral = PIXELS.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)})
    pixels, labels = np.empty((len(scenes), 3, SIDE, SIDE), np.uint8), []
    for i, scene in enumerate(scenes):
        picture, objects = draw(scene, DRAWN, rng)
        pixels[i] = np.rint(preprocess(picture, neutral))
        labels.append(_targets(scene, np.asarray(objects.resize((SIDE, SIDE), 0))))
    patches, centres, counts, cluttered = (torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True))
    return torch.from_numpy(pixels), patches, centres, counts, cluttered


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1.0


def build_halves(config: DemoHalvesConfig, prompt: str, folders: Iterable[str], out: Path, progress: Progress) -> Path:
    """Make the halves `folders` (of `DEMO_FOLDERS`) below `out`, and note in its `record.json` how, and how well.

    `prompt` is how the language models are asked. A record of other halves that is there already is kept.
    """
    record: dict[str, Any] = json.loads(path.read_text()) if (path := out / "record.json").is_file() else {}
    told: Told | None = None
    for folder in folders:
        start, held_out = time.perf_counter(), dict[str, float]()
        if folder == "vision":
            held_out = pretrain_vision(config, out / folder, progress)
        else:
            told = told or tell(config, prompt)
            if folder == "text":
                train_text_tokenizer(told.texts()).save_pretrained(out / folder)
            else:
                held_out = pretrain_language(config, told, STYLES[folder], out / folder, progress)
        record[folder] = {
            "settings": config.model_dump(exclude={"rebuild"}),
            "held_out": held_out,
            "seconds": round(time.perf_counter() - start),
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
    return out


if __name__ == "__main__":
    asked = sys.argv[2:] or sorted(DEMO_FOLDERS.values())
    build_halves(DemoHalvesConfig(), ModelConfig().vqa_prompt, asked, Path(sys.argv[1]), Progress())
