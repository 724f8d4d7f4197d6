"""One stage, checkpoint to checkpoint. A killed run goes on from its last resume point and ends with the same bits."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from runtime.files import atomic_folder
from runtime.progress import Progress
from runtime.text import MAX_WORDS
from trainer.bert import start_from_bert
from trainer.blip2 import new_blip2
from trainer.bridge import PARTS, Part
from trainer.checkpoint import load_bridge, read_config, require_halves, write_checkpoint
from trainer.config import ModelConfig, StageName
from trainer.data import FeatureSource, ResolvedData
from trainer.fit import Fit
from trainer.logs.training_log import TrainingLog
from trainer.plans import STAGE_KINDS, Ingredients
from trainer.ranks import Ranks
from trainer.shard import spread, whole
from trainer.stage_config import StageConfig
from trainer.watch import Watcher


def run_stage(
    stage: StageName,
    *,
    model: ModelConfig,
    data: ResolvedData,
    config: StageConfig,
    seed: int,
    init: Path | None,
    out: Path,
    recipe_yaml: str,
    store: FeatureSource,
    progress: Progress,
    ranks: Ranks,
    watchers: Sequence[Watcher] = (),
) -> Path:
    """Train one stage from the bridge of checkpoint `init` (None: a fresh one) and write the checkpoint `out`.

    An interrupted run of the same stage is resumed from `.OUT.partial` beside `out`. `store` keeps image features
    from stage to stage. All processes of `ranks` call this; the first writes.
    """
    torch.manual_seed(seed)
    kind, model = STAGE_KINDS[stage], config.adapted(model)
    began = None if init is None else read_config(init)
    given = PARTS if began is None else began.parts
    fresh = _fresh_parts(model, given)
    blip2 = new_blip2(model, kind.question_conditioned, (*given, *fresh))
    blip2.bridge.need(*kind.needs)
    if init is not None and began is not None:
        require_halves(init, began, model)
        load_bridge(blip2, init, fresh)
    elif model.qformer_init is not None:
        start_from_bert(blip2, model.qformer_init)
    if fresh:
        progress.note(f"{stage}: {init} has no {', '.join(fresh)} part; it starts from random weights")
    blip2.prepare(config)
    blip2.to(ranks.device)
    spread(stage, blip2, config, ranks)
    plan = kind.plan(Ingredients(blip2, data, store, progress, ranks), config)
    partial = out.with_name(f".{out.name}.partial")
    log = TrainingLog(
        out.with_name(f".{out.name}.log"),
        stage=stage,
        config=config,
        lines=plan.lines,
        device=ranks.device,
        processes=ranks.count,
        progress=progress,
    )
    settings = {"seed": seed, "model": model.model_dump(mode="json"), stage: config.model_dump(mode="json")}
    done = Fit(
        stage,
        blip2,
        plan,
        config,
        seed=seed,
        partial=partial,
        settings=settings,
        recipe_yaml=recipe_yaml,
        ranks=ranks,
        progress=progress,
        watchers=[*watchers, log] if ranks.is_main else watchers,
    ).run()
    found = ranks.collect({path: why for rows in plan.rows for path, why in rows.broken().items()})
    broken = {path: why for of_process in found for path, why in of_process.items()}
    left_out = sum(rows.left_out for rows in plan.rows)
    metrics: dict[str, Any] = {"stage": stage, "held_out": done.history, "broken_images": broken}
    metrics |= {"alarms": log.alarms(), "cut_texts": done.cut_texts, "left_out": left_out}
    if features := _together(ranks.collect(store.statistics())):
        metrics["features"] = features
        progress.note(f"{stage}: image features {', '.join(f'{name} {count:,}' for name, count in features.items())}")
    with whole(blip2):
        if ranks.is_main:
            with atomic_folder(out) as folder:
                write_checkpoint(blip2, folder, stage=stage, metrics=metrics, recipe_yaml=recipe_yaml)
                log.publish(folder, broken)
            log.remove()
            shutil.rmtree(partial, ignore_errors=True)
    ranks.barrier()
    if broken:
        progress.note(f"{stage}: {len(broken)} images could not be read and were replaced; metrics.json names them")
    if left_out:
        progress.note(f"{stage}: {left_out} entries of the data sets could not be used; qforge data check names them")
    if done.cut_texts:
        progress.note(
            f"{stage}: {done.cut_texts:,} of the {config.steps * config.batch_size:,} rows trained on (one that comes "
            f"again counts again) had a text of more than {MAX_WORDS} words, which was read up to there"
        )
    return out


def _fresh_parts(model: ModelConfig, given: Sequence[Part]) -> tuple[Part, ...]:
    """Only the projection into a language model may be new: a retrieval checkpoint that is given one has none yet."""
    return ("language",) if model.language is not None and "language" not in given else ()


def _together(counted: Sequence[dict[str, int]]) -> dict[str, int]:
    """Counts of all processes added, but not the bytes of the folder that they share."""
    return {name: (max if name == "bytes" else sum)(of_one[name] for of_one in counted) for name in counted[0]}
