"""`qforge run`: one recipe from image-text pairs to a report, as a table of steps (qforge/steps.py does each once).

OUT/checkpoint/    the trained model              OUT/report/       report.md, result.json, pictures
OUT/bundle-fp32/   OUT/bundle-int8/               OUT/recipe.yaml   resolved
OUT/data/          the demo world, or what was found in the user's own data
OUT/work           what lies between
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qforge import actions
from qforge.peers import join
from qforge.recipe import Recipe
from qforge.steps import Done, Step, folder_lock, follow_steps, run_steps
from runtime.errors import InputError
from runtime.files import write_text_atomic
from runtime.precision import NOT_ON_CPU, Precision
from trainer.config import STAGES, STARTS_FROM, ModelConfig, StageName
from trainer.stage_config import deciding

STAGE_STORIES: dict[StageName, str] = {
    "stage1": "learning representations by contrast, matching and generation",
    "stage2": "learning to speak through the frozen language model",
    "caption": "fine-tuning on captions",
    "vqa": "fine-tuning on questions",
    "retrieval": "fine-tuning for search",
}
SEARCH_STAGES: tuple[StageName, ...] = ("stage1", "retrieval")
"""Whose checkpoints search and say nothing."""
TRAINS = ("trainer", "runtime")
FACE = ("qforge", *TRAINS)
EXPORTS = ("export", "trainer", "runtime")
MEASURES = ("benchmarks", "export", "trainer", "runtime")


@dataclass(frozen=True)
class Start:
    """Where a run begins when it does not begin from nothing."""

    checkpoint: Path
    after: str
    """The stage it is the outcome of."""

    def left(self, stages: Sequence[StageName]) -> tuple[StageName, ...]:
        """Those of the stages to train that come later; the last of them once more when none does."""
        done = STAGES.index(self.after) if self.after in STAGES else -1
        return tuple(stage for stage in stages if STAGES.index(stage) > done) or (stages[-1],)


@dataclass(frozen=True)
class Finished:
    """A run whose steps are all up to date; a process that followed another knows of none."""

    out: Path
    steps: list[Done]


def run(
    recipe: Recipe,
    out: Path,
    *,
    only: tuple[StageName, ...] | None = None,
    start: Start | None = None,
    say: Callable[[str], None] | None = None,
) -> Finished:
    """Bring every step of the recipe up to date in `out`, or the training of the stages `only`; `say` gets the lines.

    `start` is the checkpoint to begin from; the stages behind it are left out. Of several processes that a launcher
    started, all train, and the first does everything else.
    """
    if only is None:
        _require_answers(recipe, out)
    table, peers = steps_of(recipe, out, start, only), join()
    with peers.together():
        if not peers.is_main:
            follow_steps(table, peers)
            return Finished(out, [])
        with folder_lock(out):
            write_text_atomic(out / "recipe.yaml", recipe.to_yaml())
            return Finished(out, run_steps(table, out, say or _to_stderr, peers))


def stage_folder(recipe: Recipe, stage: StageName) -> str:
    """Where a stage's checkpoint lies, relative to the run; the last stage's is the run's."""
    return "checkpoint" if stage == recipe.stages[-1] else f"steps/{stage}"


def stages_to(stages: Sequence[StageName], last: StageName) -> tuple[StageName, ...]:
    """Those of the stages that `last` goes on from, in order, and itself; InputError when it is none of them."""
    if last not in stages:
        raise InputError(
            f"stage {last}: expected one of the recipe's stages ({', '.join(stages)}); add it to them: "
            f"--set stages=[{','.join(stage for stage in STAGES if stage in (*stages, last))}]"
        )
    chain, stage = list[StageName](), STARTS_FROM[last]
    while stage is not None:
        chain += [stage] * (stage in stages)
        stage = STARTS_FROM[stage]
    return (*reversed(chain), last)


def _require_answers(recipe: Recipe, out: Path) -> None:
    """InputError unless the run ends with bundles that can be asked on this machine: they are measured."""
    last = recipe.stages[-1]
    if last in SEARCH_STAGES:
        raise InputError(
            f"stages: expected a last stage that answers (stage2, caption, vqa), found {last}: a run measures answers. "
            f"Train it by itself: qforge train RECIPE --out {out}, then: qforge export {out / 'checkpoint'} --heads "
            f"retrieval"
        )
    if recipe.export.heads == "retrieval":
        raise InputError(
            "export.heads: expected generate or both, found retrieval: a run measures answers. Make a bundle that only "
            f"searches by itself: qforge export {out / stage_folder(recipe, recipe.stages[0])} --heads retrieval"
        )
    if recipe.export.language_precision in NOT_ON_CPU or set(recipe.export.precisions) <= {*NOT_ON_CPU}:
        raise InputError(
            "export.precisions, export.language_precision: expected a bundle that this CPU can run, found BF16 "
            "alone: a run measures answers. Add fp16 or fp32 to export.precisions, or make the bundle by itself: "
            "qforge export CKPT --precision bf16 --language-precision bf16"
        )


def steps_of(
    recipe: Recipe, out: Path, start: Start | None = None, only: tuple[StageName, ...] | None = None
) -> list[Step]:
    """The whole run, or the training of the stages `only`: name, story, folder, action, and what decides the result."""
    wanted = recipe.stages if only is None else only
    stages = wanted if start is None else start.left(wanted)
    reads = partial(_settings, recipe)
    model, halves = recipe.model, list[Step]()
    if model.demo_halves.rebuild:
        build = partial(actions.build_halves, recipe)
        story, settings = "pre-training the small frozen halves", reads("model.demo_halves", "model.vqa_prompt")
        halves = [Step("halves", story, "steps/halves", build, settings, code=TRAINS)]
        model = _with_halves(model, out / "steps/halves")

    def training(stage: StageName) -> Step:
        earlier = stages_to(stages, stage)[-2:-1]
        first = None if start is None else start.checkpoint
        init = out / stage_folder(recipe, earlier[0]) if earlier else first
        return Step(
            name=stage,
            does=STAGE_STORIES[stage],
            output=stage_folder(recipe, stage),
            action=partial(actions.train_stage, stage, recipe, model, out, init),
            settings=deciding(reads("seed", "model", "data", stage)),
            files=partial(_outside, recipe, None if earlier else first),
            after=("data", *(step.name for step in halves), *earlier),
            code=TRAINS,
            resumes=True,
            together=True,
        )

    def exporting(precision: Precision, first: Precision) -> Step:
        """Every bundle after the first takes its traced graphs from there."""
        again = precision != first
        return Step(
            name=f"export-{precision}",
            does=f"tracing the graphs in {precision} and verifying them against PyTorch",
            output=f"bundle-{precision}",
            action=partial(actions.export_bundle, recipe, precision, out / f"bundle-{first}" if again else None, out),
            settings=reads("data", "export", without="precisions"),
            files=partial(actions.fingerprint_gate, recipe),
            after=("data", recipe.stages[-1], *([f"export-{first}"] if again else [])),
            code=EXPORTS,
        )

    exports = [exporting(precision, recipe.export.precisions[0]) for precision in recipe.export.precisions]
    exported = tuple(step.name for step in exports)
    chosen = sorted(recipe.export.precisions, key=lambda precision: precision not in NOT_ON_CPU)
    bundles = [out / f"bundle-{precision}" for precision in chosen]  # those that can be tried and measured here last
    measured = [out / f"bundle-{precision}" for precision in chosen if precision not in NOT_ON_CPU]
    trained = [
        Step(
            name="data",
            does="drawing the demo world" if recipe.data.root is None else f"looking through {recipe.data.root}",
            output="data",
            action=partial(actions.prepare_data, recipe, out),
            settings=reads("data"),
            files=partial(actions.fingerprint_data, recipe, out),
            code=FACE,
        ),
        *halves,
        *(training(stage) for stage in stages),
    ]
    if only is not None:
        return trained
    return [
        *trained,
        *exports,
        Step(
            name="verify",
            does="replaying the recorded PyTorch outputs on this machine",
            output="steps/verification",
            action=partial(actions.verify_bundles, measured),
            after=exported,
            code=FACE,
        ),
        Step(
            name="bench",
            does="measuring the bundles against eager PyTorch",
            output="steps/bench",
            action=partial(actions.bench, recipe, measured, out),
            settings=reads("data", "bench"),
            after=("data", recipe.stages[-1], *exported),
            code=MEASURES,
        ),
        Step(
            name="report",
            does="writing the report",
            output="report",
            action=partial(actions.write_report, bundles, [out / stage_folder(recipe, stage) for stage in stages], out),
            after=("verify", "bench"),
            code=FACE,
        ),
    ]


def _outside(recipe: Recipe, init: Path | None) -> dict[str, str]:
    """Fingerprints of what a stage reads from outside the run."""
    return actions.fingerprint_sources(recipe.model) | actions.fingerprint_init(init)


def _with_halves(model: ModelConfig, folder: Path) -> ModelConfig:
    """Take the halves of this run wherever the recipe names shipped ones."""
    update = {key: str((folder / name).resolve()) for key, name in model.shipped_halves().items()}
    return model.model_copy(update=update)


def _settings(recipe: Recipe, *dotted_keys: str, without: str = "") -> dict[str, Any]:
    """The named parts of the recipe, JSON-able; `without` leaves out a key that does not touch the result.

    Whether image features are kept in half precision does; where, and how many, does not.
    """
    found: dict[str, Any] = {}
    tree = recipe.model_dump(mode="json")
    tree["data"]["features"] = recipe.data.features.folder is not None
    for dotted in dotted_keys:
        value: Any = tree
        for key in dotted.split("."):
            value = value[key]
        found[dotted] = {k: v for k, v in value.items() if k != without} if isinstance(value, dict) else value
    return found


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
