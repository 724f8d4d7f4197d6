"""The story of an export: one checkpoint becomes a bundle that runs without us, or nothing appears at all.

qforge export runs/demo/checkpoint --out bundle --precision int8 --calibration vqa_train.jsonl
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from export import facts, quantize
from export.calibration import calibration_feeds, draw
from export.card import card
from export.config import ExportConfig, Heads
from export.facts import precision_of
from export.graphs import Arrays, Graph
from export.retrieval_graphs import TRAINS_HEADS, chosen_heads, graph_set
from export.retrieval_verify import draw_pairs, judge_retrieval, retrieval_feeds, verify_retrieval
from export.trace import ONNX_FOLDER, describe, trace
from export.verdicts import Verdicts
from export.verify import judge_graphs, verify
from runtime.bundle import MANIFEST, Bundle, read_bundle, write_manifest
from runtime.errors import CheckFailed, InputError
from runtime.files import atomic_folder, write_json_atomic
from runtime.pipeline import QFORMER_TOKENIZER, TOKENIZER
from runtime.precision import LanguagePrecision, Precision
from runtime.progress import Progress
from runtime.reference import REFERENCE, write_reference
from runtime.speaker import LANGUAGE_GRAPHS
from trainer.blip2 import Blip2
from trainer.checkpoint import load_checkpoint, read_config

STALE = (
    "{checkpoint}: its retrieval heads were trained in stage 1, and {stage} has moved the Q-Former since; see how well "
    "it still searches: qforge evaluate BUNDLE --data captions.jsonl --task retrieval"
)


def export_bundle(
    checkpoint: Path,
    out: Path,
    config: ExportConfig,
    *,
    precision: Precision,
    calibration: Sequence[Path],
    recipe_yaml: str,
    reuse: Path | None,
    progress: Progress,
) -> Path:
    """Write the bundle `out`, verified against eager PyTorch; an older bundle of that name is replaced.

    Args:
        checkpoint: Folder that `qforge train` made.
        out: Bundle folder to write.
        config: Everything else there is to choose; `config.precisions` is for callers that make several bundles.
        precision: Numeric type written into the vision graph and the Q-Former.
        calibration: Manifests of real images, read together. Ranges are calibrated on some of them (INT8) and the
            result is verified on others. A model whose Q-Former reads the question needs questions among them; one
            manifest of questions is then enough, because any image can be captioned. Retrieval graphs need captions.
        recipe_yaml: The resolved recipe, kept as text beside the result.
        reuse: A bundle made from the same checkpoint, whose fp32 graphs are copied instead of traced again.
        progress: Where bars are shown.

    Raises:
        CheckFailed: NaN, or a graph or an answer too far from eager; names the graph and its worst tensor.
        DataError: too few images, no questions, or no captions.
        InputError: limits the model cannot meet, `reuse` from another checkpoint, or `out` holds foreign files.
        CheckpointError, BundleError, OutOfSpace: as their names say.
    """
    model = load_checkpoint(checkpoint)
    stage = read_config(checkpoint).stage
    heads = chosen_heads(model, config.heads, stage)
    graphs = graph_set(model, heads)
    require_finite(graphs.all)
    language_precision = config.language_precision if graphs.answering else "fp32"
    limits = facts.limits(model, config, heads)
    if heads == "both" and stage not in TRAINS_HEADS:
        progress.note(STALE.format(checkpoint=checkpoint, stage=stage))
    made_by = facts.made_by(checkpoint)
    drawn = draw(
        model,
        calibration,
        calibration_images=config.calibration_images if precision == "int8" else 0,
        verification_images=config.verification_images,
        seed=config.seed,
        progress=progress,
        answers=bool(graphs.answering),
    )
    pairs = {
        part: draw_pairs(calibration, requests, config.seed) if graphs.searching else []
        for part, requests in (("calibration", drawn.calibration), ("verification", drawn.verification))
    }
    with atomic_folder(out, replaces=MANIFEST) as folder:
        _write_tokenizers(model, folder, heads)
        (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")

        def state(precision: Precision, language_precision: LanguagePrecision) -> Bundle:
            """The folder as a real bundle, which is what gets verified."""
            manifest = write_manifest(
                folder,
                model=facts.model_facts(model, heads),
                precision=precision,
                language_precision=language_precision,
                target=config.target,
                limits=limits,
                preprocess=model.preprocess,
                prompts=facts.prompts(model, heads),
                generation=facts.generation(model, heads),
                graphs={name: describe(_graph_file(folder, name)) for name in graphs.all},
                made_by=made_by,
            )
            return Bundle(folder, manifest)

        traced = _write_fp32_graphs(graphs.all, folder, _reusable(reuse, made_by), progress)
        if traced and "int8" in (precision, language_precision):  # a wrong trace must not pass as INT8 noise
            bundle = state("fp32", "fp32")
            if graphs.answering:
                judge_graphs(bundle, model, graphs.answering, drawn.verification, config, progress)
            if graphs.searching:
                judge_retrieval(bundle, model, graphs.searching, pairs["verification"], config, progress)
        feeds = dict[str, list[Arrays]]()
        if precision == "int8" and graphs.searching:
            feeds |= retrieval_feeds(model, graphs.searching, pairs["calibration"])
        if precision == "int8" and graphs.answering:
            feeds |= calibration_feeds(model, graphs.answering, drawn.calibration)
        weights = LANGUAGE_GRAPHS[model.style] if language_precision == "int8" else ()
        _write_precision(folder, feeds, weights, progress)
        bundle = state(precision, language_precision)
        answers, scores = None, None
        if graphs.answering:
            answers = verify(bundle, model, graphs.answering, drawn.verification, config, progress)
        if graphs.searching:
            scores = verify_retrieval(bundle, model, graphs.searching, pairs["verification"], config, progress)
        verdict = Verdicts(answers, scores)
        write_reference(folder / REFERENCE, verdict.cases, *verdict.chains)
        drawn_by = {"calibration_images": len({r.image for r in drawn.calibration}), "seed": config.seed}
        write_json_atomic(folder / "parity.json", verdict.as_json() | drawn_by)
        (folder / "README.md").write_text(card(bundle.manifest, verdict, stage), encoding="utf-8")
        state(precision, language_precision)
    return out


def require_finite(graphs: Mapping[str, Graph]) -> None:
    """CheckFailed when a weight is NaN or infinite; found here, it costs a second instead of a whole export."""
    for graph in graphs.values():
        for name, tensor in graph.module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckFailed(
                    f"graph '{graph.name}': tensor '{name}' holds NaN or infinity; the checkpoint is damaged"
                )


def _write_fp32_graphs(graphs: Mapping[str, Graph], folder: Path, known: Bundle | None, progress: Progress) -> int:
    """Copy the graphs that `known` has in fp32, trace the others; returns how many were traced."""
    (folder / ONNX_FOLDER).mkdir()
    traced = 0
    with progress.bar("tracing", len(graphs)) as bar:
        for name, graph in graphs.items():
            if known is not None and name in known.manifest.graphs and precision_of(known.manifest, name) == "fp32":
                entry = known.manifest.graphs[name]
                for file in (entry, entry.data):
                    if file is not None:
                        shutil.copyfile(known.file(file.file), folder / file.file)
            else:
                trace(graph, folder)
                traced += 1
            bar.advance()
    return traced


def _write_precision(
    folder: Path, feeds: Mapping[str, Sequence[Arrays]], weights: Sequence[str], progress: Progress
) -> None:
    """Put INT8 into the graphs, in place: calibrated on `feeds` where a graph has them, else into `weights` alone."""
    jobs: list[Callable[[], None]] = []
    for name, of_graph in feeds.items():
        jobs.append(partial(quantize.quantize_activations, _graph_file(folder, name), of_graph))
    for name in weights:
        jobs.append(partial(quantize.quantize_weights, _graph_file(folder, name)))
    if jobs:
        with progress.bar("quantising", len(jobs)) as bar:
            for job in jobs:
                job()
                bar.advance()


def _write_tokenizers(model: Blip2, folder: Path, heads: Heads) -> None:
    pairs = {} if heads == "retrieval" else {TOKENIZER: model.tokenizer}
    if heads != "generate" or model.question_conditioned:
        pairs[QFORMER_TOKENIZER] = model.text_tokenizer
    for name, tokenizer in pairs.items():
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own.no_padding()  # settings that the last caller left behind are no part of the tokenizer
        own.no_truncation()
        own.save(str(folder / name))


def _reusable(reuse: Path | None, made_by: Mapping[str, str]) -> Bundle | None:
    """The bundle to copy graphs from; it must come from this checkpoint and these versions."""
    if reuse is None:
        return None
    bundle = read_bundle(reuse)
    for name in ("checkpoint", "qforge", "torch", "transformers", "onnxscript"):
        if bundle.manifest.made_by.get(name) != made_by[name]:
            raise InputError(
                f"{reuse}: expected graphs traced with {name} {made_by[name]}, found "
                f"{bundle.manifest.made_by.get(name)}; export without reusing this bundle"
            )
    return bundle


def _graph_file(folder: Path, name: str) -> Path:
    return folder / ONNX_FOLDER / f"{name}.onnx"
