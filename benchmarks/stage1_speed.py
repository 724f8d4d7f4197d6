"""Stage 1 on a CPU: our step beside a straightforward LAVIS-style one, and ours with the tower's features given.

One process, one set of weights, the same images and texts; who steps first rotates, and ratios are taken over the steps
of a round. A step is everything from pixels (or features) to updated weights. Before, the losses of both are compared
at these very sizes, dropout off, with the same negatives. Peak memory is that of fresh processes.

    python -m benchmarks.stage1_speed --out benchmarks/results/stage1-speed.json

A frozen tower costs both the same, so what is gained depends on its share of a step: sizes are reported side by side.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from benchmarks.fresh_process import FreshProcessFailed, peak_bytes
from benchmarks.lavis_step import Chooser, Losses, choose_one_by_one, lavis_losses
from benchmarks.machine import cpu_seconds, describe_machine
from benchmarks.results import json_text
from runtime.estimates import percentile, ratio_of_medians
from runtime.files import write_text_atomic
from runtime.preprocess import PreprocessSettings
from trainer.blip2 import Blip2, TextBatch
from trainer.config import DEMO, ModelConfig, QFormerConfig, Stage1Config
from trainer.draws import StepDraws
from trainer.negatives import Pairs
from trainer.optimiser import make_optimiser
from trainer.ranks import Ranks
from trainer.stage1 import Stage1
from trainer.towers import VisionTower, load_tokenizer

MODULE = "benchmarks.stage1_speed"
CLS, SEP, FIRST_WORD = 1, 2, 10
MEAN_TOKENS, SPREAD_TOKENS, LEAST_TOKENS = 13.0, 2.5, 7
"""Caption lengths are drawn so (normal, rounded): COCO's captions have 10.5 words on average, [CLS] and [SEP] added."""
TOLERANCE = 1e-4
"""Largest difference of a loss between the two steps (nats)."""
LAVIS, OURS, CACHED = "lavis", "ours", "ours-cached"
NAMES = (LAVIS, OURS, CACHED)


@dataclass(frozen=True)
class Size:
    """Shapes of one case."""

    side: int
    """Of the pixels."""
    patch: int
    width: int
    layers: int
    heads: int
    qformer: QFormerConfig


PUBLISHED = QFormerConfig(vocabulary=30_523)
SIZES = {
    "vit-b-14-364": Size(364, 14, 768, 12, 12, PUBLISHED),
    "vit-b-14-224": Size(224, 14, 768, 12, 12, PUBLISHED),
    "tiny": Size(
        32, 8, 48, 2, 4,
        QFormerConfig(queries=4, width=48, layers=4, heads=4, ffn_width=96, contrastive_width=16, vocabulary=400),
    ),
}  # fmt: skip
"""The paper's Q-Former over ViT-B/14 at the resolutions of its pre-training (257 image tokens) and of its retrieval
fine-tune (677), which trains the same three losses."""
CASES = ("vit-b-14-364", "vit-b-14-224")


# Shape letters: B pairs, T text tokens, N image tokens, E image width
@dataclass(frozen=True)
class Batch:
    """What one step reads."""

    pixels_BCHW: Tensor
    features_BNE: Tensor
    texts: TextBatch


class Bench:
    """The model, its batches, and a step for each contestant."""

    def __init__(self, size: Size, rows: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.size, self.rows, self._rng = size, rows, np.random.default_rng(seed)
        self.model = _model(size)
        self.config = Stage1Config(batch_size=rows)
        self.objective = Stage1(self.config, None, None, None)  # type: ignore[arg-type]  # rows are given as tensors
        self._steps = 0

    def batch(self, *, cached: bool) -> Batch:
        """Random pixels and words; features only where the tower is left out."""
        size = self.size
        pixels_BCHW = torch.from_numpy(self._rng.standard_normal((self.rows, 3, size.side, size.side), np.float32))
        lengths = np.rint(self._rng.normal(MEAN_TOKENS, SPREAD_TOKENS, self.rows))
        limit = size.qformer.max_text_tokens
        lengths_B = torch.from_numpy(lengths.clip(LEAST_TOKENS, limit)).long()
        places_T = torch.arange(int(lengths_B.max()))
        mask_BT = (places_T < lengths_B[:, None]).long()
        words = self._rng.integers(FIRST_WORD, size.qformer.vocabulary, mask_BT.shape)
        ids_BT = torch.from_numpy(words) * mask_BT
        ids_BT[:, 0] = CLS
        ids_BT.scatter_(1, lengths_B[:, None] - 1, SEP)
        features_BNE = self.model.vision(pixels_BCHW) if cached else torch.empty(0)
        return Batch(pixels_BCHW, features_BNE, TextBatch(ids_BT, mask_BT))

    def lavis(self, batch: Batch, choose: Chooser) -> Losses:
        """The losses of the LAVIS-style step; attention of the tower is written out as in LAVIS' eva_vit.py."""
        self.model.vision.model.set_attn_implementation("eager")
        with torch.no_grad():
            features_BNE = self.model.vision(batch.pixels_BCHW)
        texts = batch.texts.padded(self.size.qformer.max_text_tokens)
        start = self.model.text_tokenizer.bos_token_id
        return lavis_losses(self.model.bridge, features_BNE, texts.ids, texts.mask, start, choose)

    def ours(self, features_BNE: Tensor, texts: TextBatch) -> tuple[Tensor, dict[str, float], tuple[Tensor, Tensor]]:
        """Loss, its parts and the negatives of our step from features on: all of `Stage1.loss` after the reading."""
        draws = StepDraws((0, 0, self._steps), 0, self.rows)
        pairs = Pairs(texts, features_BNE, torch.arange(self.rows))
        embeddings, kept = self.objective.embed(self.model, pairs)
        coupled, figures, drawn = self.objective.couple(self.model, embeddings, [pairs], draws, Ranks())
        rest, more = self.objective.rest(self.model, pairs, kept, drawn[0], Ranks())
        negatives = drawn[0].negatives
        assert negatives is not None
        return coupled + rest, figures | more, (negatives.wrong_texts_b, negatives.wrong_images_b)

    def features(self, batch: Batch) -> Tensor:
        """The tower's output, as our training computes it."""
        self.model.vision.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            features_BNE: Tensor = self.model.vision(batch.pixels_BCHW)
        return features_BNE

    def loss(self, name: str, batch: Batch) -> Tensor:
        """What a contestant minimises."""
        if name == LAVIS:
            losses = self.lavis(batch, choose_one_by_one)
            return losses.itc + losses.itm + losses.itg
        return self.ours(batch.features_BNE if name == CACHED else self.features(batch), batch.texts)[0]

    def optimisers(self, names: Sequence[str]) -> dict[str, torch.optim.Optimizer]:
        """Ours is the trainer's; LAVIS' is torch's AdamW as it comes. Both of ours share one."""
        ours = make_optimiser(self.model, self.config)
        plain = torch.optim.AdamW(self.model.bridge.parameters(), lr=1e-4, weight_decay=0.05)
        return {name: plain if name == LAVIS else ours for name in names}

    def step(self, name: str, batch: Batch, optimiser: torch.optim.Optimizer) -> None:
        """One step of training."""
        optimiser.zero_grad(set_to_none=True)
        self.loss(name, batch).backward()
        optimiser.step()
        self._steps += 1

    @torch.no_grad()
    def compare(self) -> dict[str, Any]:
        """The losses of both, dropout off, the same negatives. AssertionError when they differ."""
        self.model.eval()
        batch = self.batch(cached=False)
        _, figures, (texts, images) = self.ours(self.features(batch), batch.texts)
        losses = self.lavis(batch, lambda *_: (texts.tolist(), images.tolist()))
        self.model.train()
        theirs = {"itc": float(losses.itc), "itm": float(losses.itm), "itg": float(losses.itg)}
        apart = max(abs(theirs[name] - figures[name]) for name in theirs)
        if apart > TOLERANCE:
            raise AssertionError(f"losses differ by {apart:.2e}, {TOLERANCE} allowed: {theirs} and {figures}")
        return {LAVIS: theirs, OURS: figures, "largest_difference": apart, "allowed": TOLERANCE}


def _model(size: Size) -> Blip2:
    vit = ViTConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=size.side,
        patch_size=size.patch,
    )
    preprocess = PreprocessSettings(
        height=size.side, width=size.side, resample="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    tower = VisionTower(ViTModel(vit, add_pooling_layer=False), -1, preprocess)
    config = ModelConfig(qformer=size.qformer, language=None)
    return Blip2(config, tower, None, None, load_tokenizer(DEMO, "text"), False).train()


def measure(bench: Bench, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Name → wall and processor seconds of every step; one more round before them warms up and is not kept."""
    taken = {name: dict[str, list[float]](wall_s=[], cpu_s=[]) for name in NAMES}
    optimisers = bench.optimisers(NAMES)
    for number in range(rounds + 1):
        batch = bench.batch(cached=True)
        for place in range(len(NAMES)):
            name = NAMES[(number + place) % len(NAMES)]
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            bench.step(name, batch, optimisers[name])
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            if number:
                taken[name]["wall_s"].append(wall_s)
                taken[name]["cpu_s"].append(cpu_s)
    return taken


def summarise(taken: dict[str, dict[str, list[float]]], batch: int) -> dict[str, Any]:
    """Samples per second and how many times faster than the LAVIS-style step, by wall clock and processor time."""
    found: dict[str, Any] = {}
    for name, of_name in taken.items():
        found[name] = {
            "samples_per_s": round(batch / percentile(of_name["wall_s"], 50), 4),
            **{key: [round(sample, 4) for sample in samples] for key, samples in of_name.items()},
        }
        if name != LAVIS:
            for key, samples in of_name.items():
                kind = key.removesuffix("_s")
                found[name][f"times_faster_{kind}"] = ratio_of_medians(taken[LAVIS][key], samples, seed=0)
    return found


def peak_memory(size: str, batch: int, threads: int) -> dict[str, int]:
    """Bytes at the peak of a step, each contestant in a process of its own."""
    found = {}
    for name in NAMES:
        words = [sys.executable, "-m", MODULE, "--child", name, "--sizes", size]
        words += ["--batch", str(batch), "--threads", str(threads)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FreshProcessFailed(
                f"{name}: the process that measures memory ended with code {done.returncode}: {last}"
            )
        found[name] = int(json.loads(done.stdout.splitlines()[-1]))
    return found


def _child(name: str, size: str, batch: int) -> int:
    """Peak of a step that is not the first: the optimiser's averages are there, as they are in all steps but one."""
    bench = Bench(SIZES[size], batch)
    optimiser = bench.optimisers([name])[name]
    for parameter in bench.model.bridge.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    bench.step(name, bench.batch(cached=name == CACHED), optimiser)
    return peak_bytes()


def measure_case(name: str, batch: int, rounds: int, threads: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one size, at `batch` pairs a step."""
    progress(f"{name}: memory")
    memory, size = peak_memory(name, batch, threads), SIZES[name]
    before, bench = cpu_seconds(), Bench(size, batch)
    progress(f"{name}: losses")
    losses = bench.compare()
    progress(f"{name}: {rounds} rounds")
    found = summarise(measure(bench, rounds), batch)
    after = cpu_seconds()
    for contestant, nbytes in memory.items():
        found[contestant]["peak_bytes"] = nbytes
    described = asdict(size) | {"qformer": size.qformer.model_dump()}
    others = 1 - (after[1] - before[1]) / (after[0] - before[0])
    return {"size": described, "batch": batch, "losses": losses, **found, "cpu_share_of_others": round(others, 4)}


def result(cases: dict[str, Any], rounds: int, threads: int) -> dict[str, Any]:
    """What is written."""
    return {
        "what": "stage 1 of BLIP-2, one training step from pixels (ours-cached: from features), fp32, random weights",
        "command": f"python -m {MODULE} --out FILE --batch N --rounds {rounds}",
        "settings": {
            "threads": threads,
            "rounds": rounds,
            "caption_tokens": {"mean": MEAN_TOKENS, "spread": SPREAD_TOKENS, "least": LEAST_TOKENS},
            "lavis": "four passes, text padded, attention written out (tower too), torch's default AdamW",
        },
        "cases": cases,
        "machine": describe_machine(),
    }


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of everybody in every case")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a step")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(CASES), help="cases")
    parser.add_argument("--child", choices=NAMES, help="measure the memory of one contestant here and print it")
    given = parser.parse_args()
    if given.child is not None:
        torch.set_num_threads(given.threads)
        print(_child(given.child, given.sizes[0], given.batch))
    elif given.out is None:
        parser.error("--out is needed")
    else:
        torch.set_num_threads(given.threads)
        cases, report = dict[str, Any](), partial(print, file=sys.stderr, flush=True)
        for name in given.sizes:
            cases[name] = measure_case(name, given.batch, given.rounds, given.threads, report)
            write_text_atomic(given.out, json_text(result(cases, given.rounds, given.threads)))


if __name__ == "__main__":
    main()
