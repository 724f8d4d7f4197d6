"""One stage, checkpoint to checkpoint. A killed run goes on from its last resume point and ends with the same bits."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.files import atomic_folder
from runtime.progress import Progress
from runtime.text import MAX_WORDS
from trainer.bert import start_from_bert
from trainer.blip2 import new_blip2
from trainer.bridge import PARTS, Part
from trainer.checkpoint import load_bridge, read_config, require_halves, write_checkpoint
from trainer.config import ModelConfig, StageConfig, StageName
from trainer.data import FeatureStore, ResolvedData
from trainer.fit import Fit
from trainer.plans import STAGE_KINDS, Ingredients
from trainer.ranks import Ranks
from trainer.shard import spread, whole
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
    store: FeatureStore,
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
    settings = {"seed": seed, "model": model.model_dump(mode="json"), stage: config.model_dump(mode="json")}
    history = Fit(
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
        watchers=watchers,
    ).run()
    found = ranks.collect({path: why for rows in plan.rows for path, why in rows.broken().items()})
    broken = {path: why for of_process in found for path, why in of_process.items()}
    cut, left_out = sum(rows.cut_texts for rows in plan.rows), sum(rows.left_out for rows in plan.rows)
    metrics = {"stage": stage, "held_out": history, "broken_images": broken, "cut_texts": cut, "left_out": left_out}
    with whole(blip2):
        if ranks.is_main:
            with atomic_folder(out) as folder:
                write_checkpoint(blip2, folder, stage=stage, metrics=metrics, recipe_yaml=recipe_yaml)
            shutil.rmtree(partial, ignore_errors=True)
    ranks.barrier()
    if broken:
        progress.note(f"{stage}: {len(broken)} images could not be read and were replaced; metrics.json names them")
    if left_out:
        progress.note(f"{stage}: {left_out} entries of the data sets could not be used; qforge data check names them")
    if cut:
        progress.note(f"{stage}: {cut} rows have a text of more than {MAX_WORDS} words, which was read up to there")
    return out


def _fresh_parts(model: ModelConfig, given: Sequence[Part]) -> tuple[Part, ...]:
    """Only the projection into a language model may be new: a retrieval checkpoint that is given one has none yet."""
    return ("language",) if model.language is not None and "language" not in given else ()
