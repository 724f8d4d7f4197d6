"""What BLIP-2's parts are worth, on the demo world: what the paper says of them, trained and measured again.

Each question trains models that differ in one thing, through `qforge train` itself, and scores them on the test split
through `qforge evaluate`. A run that was interrupted goes on where it stopped, and a score that is there is not taken
again; questions that are left out keep what the result file says of them.

    python -m benchmarks.ablations --work DIR --out FILE.json [--only itg --seeds 0 1] [--set stage1.steps=50]
"""

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.commands import qforge, setting
from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from runtime.files import atomic_folder, sha256_of, write_text_atomic
from trainer.blip2 import new_blip2
from trainer.checkpoint import WEIGHTS, write_checkpoint
from trainer.config import DEMO_T5, ModelConfig

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
MANIFESTS = {"retrieval": "captions_test.jsonl", "caption": "captions_test.jsonl", "vqa": "vqa_test.jsonl"}
OPTIONS = {"retrieval": ("--candidates", "16"), "caption": ("--batch-size", "64"), "vqa": ("--batch-size", "64")}
"""Of `qforge evaluate`, by task."""
WATCHED = ("stage2.eval_every=50",)
"""Overrides of every run: how often it is looked at, which changes no weight."""


@dataclass(frozen=True)
class Arm:
    """One way to train the demo."""

    overrides: tuple[str, ...] = ()
    skips_stage1: bool = False
    """Begin stage 2 with the weights that stage 1 would begin with."""

    def folder(self, seed: int) -> str:
        """Name of its run."""
        changed = "_".join(re.sub(r"[^\w.-]+", "-", override) for override in self.overrides)
        return "_".join(filter(None, ["untrained" if self.skips_stage1 else "demo", changed, f"seed-{seed}"]))


@dataclass(frozen=True)
class Question:
    """What is compared, after which stage and on what; the first arm is the demo as it is."""

    asks: str
    stage: str
    task: str
    others: Mapping[str, Arm]
    demo: str
    """What the demo is called in this comparison."""
    common: tuple[str, ...] = ()
    """Overrides of every arm."""

    def arms(self) -> dict[str, Arm]:
        """Name → arm, the demo first."""
        own = {self.demo: Arm(), **self.others}
        return {name: replace(arm, overrides=(*self.common, *arm.overrides)) for name, arm in own.items()}


def _without_stage1(asks: str, *common: str) -> Question:
    """Stage 2 with the stage before it, and without."""
    others = {"without stage 1": Arm(skips_stage1=True)}
    return Question(asks, "stage2", "caption", others, demo="with stage 1", common=common)


LONG_STAGE_1 = ("stage1.steps=1050",)
"""Three steps to one of the demo's stage 2, the paper's proportion (250,000 to 80,000). Matching, which ranks what R@1
is taken of, leaves its prior at about step 300, and the demo's own stage 1 ends at 100."""

QUESTIONS: dict[str, Question] = {
    "itg": Question(
        asks="Does image-grounded text generation help retrieval (paper, table 6)? Test split after stage 1",
        stage="stage1",
        task="retrieval",
        demo="itc+itm+itg",
        common=LONG_STAGE_1,
        others={"itc+itm": Arm(("stage1.itg_weight=0",))},
    ),
    "stage1": _without_stage1("Does stage 2 need stage 1 (paper, figure 5)? Captions after equal steps of stage 2"),
    "stage1-t5": _without_stage1("The same with the T5-like language model", f"model.language={DEMO_T5}"),
    "stage1-first": _without_stage1(
        "The same early in stage 2, where stage 1 was the longer and learned all three of its tasks",
        *LONG_STAGE_1,
        "stage2.steps=100",
    ),
    "queries": Question(
        asks="What do 16 queries cost against the published 32? Answers of the whole demo",
        stage="vqa",
        task="vqa",
        demo="16 queries",
        others={"32 queries": Arm(("model.qformer.queries=32",))},
    ),
    "language": Question(
        asks="Does the bridge serve both kinds of language model? Answers of the whole demo",
        stage="vqa",
        task="vqa",
        demo="OPT-like",
        others={"T5-like": Arm((f"model.language={DEMO_T5}",))},
    ),
}


class Laboratory:
    """Trains and scores below one folder."""

    def __init__(self, work: Path, overrides: Sequence[str]) -> None:
        self.work, self.world = work, (work / "world").resolve()
        self.overrides = (*WATCHED, *overrides)
        if not self.world.is_dir():
            of_world = [override for override in overrides if override.startswith("data.demo.")]
            qforge("data", "demo", "--out", str(self.world), *setting(of_world))

    def measure(self, question: Question, arm: Arm, seed: int) -> dict[str, Any]:
        """Train the arm and score it on the test split; everything that was measured on the way, too."""
        out = self.work / "runs" / arm.folder(seed)
        overrides = [f"data.root={self.world}", f"seed={seed}", *arm.overrides, *self.overrides]
        begin = ["--init", str(self._untrained(arm, seed))] if arm.skips_stage1 else []
        done = qforge("train", str(RECIPE), "--out", str(out), "--stage", question.stage, *begin, *setting(overrides))
        metrics = [_read(path) for path in sorted(out.rglob("metrics.json"))]
        return {
            "seed": seed,
            "overrides": list(arm.overrides),
            "skips_stage1": arm.skips_stage1,
            "held_out": {of_stage["stage"]: of_stage["held_out"] for of_stage in metrics},
            "test": self._score(Path(done["checkpoint"]), question.task),
        }

    def _untrained(self, arm: Arm, seed: int) -> Path:
        """A checkpoint with the bridge that stage 1 begins with in the arm's twin that has it, which is trained."""
        twin = replace(arm, skips_stage1=False).folder(seed)
        folder, recipe = self.work / "untrained" / twin, (self.work / "runs" / twin / "recipe.yaml").read_text()
        if not folder.is_dir():
            torch.manual_seed(seed)
            model = new_blip2(ModelConfig.model_validate(yaml.safe_load(recipe)["model"]), question_conditioned=False)
            with atomic_folder(folder) as made:
                write_checkpoint(model, made, stage="stage1", metrics={}, recipe_yaml=recipe)
        return folder

    def _score(self, checkpoint: Path, task: str) -> dict[str, Any]:
        """What `qforge evaluate` says of these weights, asked once."""
        kept = self.work / "scores" / f"{sha256_of(checkpoint / WEIGHTS)}-{task}.json"
        if not kept.is_file():
            data = str(self.world / MANIFESTS[task])
            said = qforge("evaluate", str(checkpoint), "--data", data, "--task", task, *OPTIONS[task])
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(kept, json.dumps(said))
        return _read(kept)


def compare(question: Question, laboratory: Laboratory, seeds: Sequence[int]) -> dict[str, Any]:
    """Every arm with every seed, and the mean of each test metric."""
    start = time.time()
    runs = {name: [laboratory.measure(question, arm, seed) for seed in seeds] for name, arm in question.arms().items()}
    return {
        "asks": question.asks,
        "stage": question.stage,
        "task": question.task,
        "means": {name: _means([run["test"]["metrics"] for run in of_arm]) for name, of_arm in runs.items()},
        "runs": runs,
        "seconds": round(time.time() - start),
        "machine": describe_machine(),
    }


def _means(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(of_seed[name] for of_seed in metrics) / len(metrics) for name in metrics[0]}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; kept, so that they can go on")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="questions to answer")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each arm is trained once with each")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="in each run")
    given = parser.parse_args(arguments)
    result = _read(given.out) if given.out.is_file() else {}
    laboratory = Laboratory(given.work, given.overrides)
    for name in given.only:
        answered = compare(QUESTIONS[name], laboratory, given.seeds)
        result[name] = answered | {"recipe": RECIPE.name, "settings": given.overrides}
        write_text_atomic(given.out, json_text(result))
        print(f"{name}: {answered['asks']}", *(f"  {arm}: {mean}" for arm, mean in answered["means"].items()), sep="\n")


if __name__ == "__main__":
    main()
