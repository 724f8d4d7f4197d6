"""The story of an export: one checkpoint becomes a bundle that runs without us, or nothing appears at all.

qforge export runs/demo/checkpoint --out bundle --precision int8 --calibration vqa_train.jsonl
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from export import facts
from export import reuse as reuse_by_hash
from export.calibrate import pairs_of, source_of
from export.calibration import draw
from export.calibration_record import RECORD, write_calibration
from export.card import card
from export.config import ExportConfig, Heads
from export.gate import gate
from export.graphs import Graph
from export.latency import time_graphs, write_latency
from export.lower import lower
from export.precision.emulate import stand_in
from export.precision.kept import REPORT
from export.precision.plan import Writer, report, writers_for
from export.probes import probe
from export.ranges import Ranges, written_ranges
from export.retrieval_graphs import TRAINS_HEADS, GraphSet, chosen_heads, graph_set
from export.retrieval_verify import Pair, draw_pairs, judge_retrieval, verify_retrieval
from export.static_verify import judge_static, write_static
from export.trace import ONNX_FOLDER, trace
from export.verdicts import Verdicts
from export.verify import at_every_size, judge_graphs, require_parity, verify
from runtime.answers import Request
from runtime.bundle import MANIFEST, Bundle
from runtime.errors import CheckFailed
from runtime.files import atomic_folder, scratch_folder, write_json_atomic
from runtime.pipeline import QFORMER_TOKENIZER, TOKENIZER
from runtime.precision import CALIBRATED, Precision
from runtime.progress import Progress
from runtime.reference import REFERENCE, write_reference
from runtime.replay import replay
from trainer.any_size import read_any_size
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
        calibration: Manifests of real images, read together, or the `calibration.json` of an earlier calibration, whose
            very images are then taken again. Ranges are measured on some of them and the result is verified on others.
            A model whose Q-Former reads the question needs questions among them; one manifest of questions is then
            enough, because any image can be captioned. Retrieval graphs need captions.
        recipe_yaml: The resolved recipe, kept as text beside the result.
        reuse: A bundle whose unchanged graphs are copied instead of made again; so are those of an older `out`.
        progress: Where bars are shown.

    Raises:
        CheckFailed: NaN, or a graph or an answer too far from eager; names the graph and its worst tensor.
        DataError: too few images, no questions, or no captions.
        InputError: limits the model cannot meet, or `out` holds foreign files.
        CheckpointError, BundleError, OutOfSpace: as their names say.
    """
    model = load_checkpoint(checkpoint, mapped_beside=out)
    stage = read_config(checkpoint).stage
    if config.image_sizes:
        read_any_size(model.vision, config.image_sizes)
    heads = chosen_heads(model, config.heads, stage)
    graphs = graph_set(model, heads, fused=config.fused)
    require_finite(graphs.all)
    language_precision = config.language_precision if graphs.answering else "fp32"
    writers = writers_for(graphs.all, precision, language_precision, config)
    limits = facts.limits(model, config, heads)
    if heads == "both" and stage not in TRAINS_HEADS:
        progress.note(STALE.format(checkpoint=checkpoint, stage=stage))
    made_by = facts.made_by(checkpoint)
    source = source_of(calibration)
    config = source.overrule(config, precision)
    again, texts = source.again(made_by["checkpoint"], bool(graphs.searching))
    drawn = draw(
        model,
        source.manifests,
        calibration_images=config.calibration_images if any(writer.needs_feeds for writer in writers.values()) else 0,
        verification_images=config.verification_images,
        seed=config.seed,
        progress=progress,
        answers=bool(graphs.answering),
        again=again,
    )
    pairs = {
        part: draw_pairs(source.manifests, requests, config.seed) if graphs.searching else []
        for part, requests in (("calibration", drawn.calibration), ("verification", drawn.verification))
    }
    if again and graphs.searching:
        pairs["calibration"] = pairs_of(texts)
    checked_on = at_every_size(drawn.verification, config)
    metric = gate.prepare(model, config, graphs, drawn.calibration, progress)
    traced_from = {name: reuse_by_hash.traced_from(graph) for name, graph in graphs.all.items()}
    measured_on = [
        *((Path(str(request.image)), request.question) for request in drawn.calibration),
        *((pair.image, pair.text) for pair in pairs["calibration"]),
    ]
    precisions = {name: writer.precision for name, writer in writers.items()}
    made_from = reuse_by_hash.written_from(traced_from, precisions, config, measured_on)
    known = reuse_by_hash.sources(reuse, out, progress)
    stated = facts.Stated(model, heads, config, limits, made_by, tuple(graphs.all))
    with atomic_folder(out, replaces=MANIFEST) as folder, scratch_folder(out) as scratch:
        state = partial(stated.bundle, folder, precision, language_precision, made_from)
        (folder / ONNX_FOLDER).mkdir()
        finished = frozenset[str]() if metric else known.copy(made_from, folder)  # a gate decides anew what is kept
        to_write = {name: writer for name, writer in writers.items() if name not in finished}
        traced = scratch / "fp32"
        _write_tokenizers(model, traced, heads)
        fresh = _traced(graphs.all if to_write else {}, traced_from, traced, known, progress)
        exact = stated.bundle(traced, "fp32", "fp32", traced_from)
        if any(precisions[name] != "fp32" for name in fresh):  # a wrong trace must not pass as noise
            copied = frozenset(graphs.all.keys() - fresh)
            if graphs.answering:
                judge_graphs(exact, model, graphs.answering, checked_on, config, progress, copied)
            if graphs.searching:
                judge_retrieval(exact, model, graphs.searching, pairs["verification"], config, progress, copied)
        for name in exact.manifest.files:
            shutil.copyfile(traced / name, folder / name)
        (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        lowered = lower(
            exact,
            folder,
            model,
            graphs,
            to_write,
            drawn.calibration or drawn.verification,
            pairs["calibration"] or pairs["verification"],
            config=config,
            metric=metric,
            state=state,
            scratch=scratch,
            progress=progress,
        )
        shutil.rmtree(traced)  # a large model's fp32 graphs are the largest files of all
        static = None
        if graphs.answering and config.static_cache:
            static = write_static(model, graphs.answering, config.language_precision, limits, folder)
        if lowered.gate:
            write_json_atomic(folder / gate.REPORT, lowered.gate.as_json())
            gate.plot(lowered.gate, folder, progress)
        if ranges := _ranges(folder, writers):
            seen = source.record_of(drawn, pairs["calibration"], made_by, config, ranges, out)
            write_calibration(folder / RECORD, seen)
        bundle = state()
        judged, emulated = stand_in(bundle, scratch / "emulated")
        verdict = _verdict(
            bundle, judged, model, graphs, static, checked_on, pairs["verification"], config=config, progress=progress
        )
        probed = probe(judged, progress)
        write_reference(folder / REFERENCE, verdict.cases, *verdict.chains)
        drawn_by = {"calibration_images": len({r.image for r in drawn.calibration}), "seed": config.seed}
        write_json_atomic(folder / "parity.json", verdict.as_json() | drawn_by | {"probes": probed})
        written = report(lowered.kept, to_write, lowered.feeds, emulated) | known.reports(finished, made_from)
        write_json_atomic(folder / REPORT, {name: written[name] for name in graphs.all})
        timings = time_graphs(bundle, verdict.cases, progress)
        write_latency(folder, timings)
        text = card(bundle.manifest, verdict, stage, timings, probed, lowered.gate)
        (folder / "README.md").write_text(text, encoding="utf-8")
        bundle = state()
        if emulated and all(entry.on_cpu for entry in bundle.manifest.graphs.values()):
            _require_replay(bundle)
    return out


def _verdict(
    bundle: Bundle,
    judged: Bundle,
    model: Blip2,
    graphs: GraphSet,
    static: Graph | None,
    requests: Sequence[Request],
    pairs: Sequence[Pair],
    *,
    config: ExportConfig,
    progress: Progress,
) -> Verdicts:
    """Every graph, every answer and every score judged by eager PyTorch.

    `judged` stands in for the bundle where a CPU rounds otherwise than a GPU. The decoder's static twin, which has its
    own way, is judged as it is.
    """
    answers, scores = None, None
    if graphs.answering:
        answers = verify(judged, model, graphs.answering, requests, config, progress)
        if static is not None:
            tolerance = config.tolerance(bundle.manifest.language_precision)
            parities = judge_static(bundle, static, answers.cases, tolerance)
            require_parity(parities)
            answers = replace(answers, parities=(*answers.parities, *parities))
    if graphs.searching:
        scores = verify_retrieval(judged, model, graphs.searching, pairs, config, progress)
    return Verdicts(answers, scores)


def _require_replay(bundle: Bundle) -> None:
    """What was judged by a stand-in must run itself, too, wherever a CPU can run it."""
    failed = [check for check in replay(bundle) if not check.ok]
    if failed:
        raise CheckFailed(
            f"graph '{failed[0].graph}': '{failed[0].output}' is {failed[0].max_error:.2g} off eager PyTorch on this "
            f"CPU ({failed[0].tolerance:.2g} allowed), although its exact emulation is not; nothing was written"
        )


def require_finite(graphs: Mapping[str, Graph]) -> None:
    """CheckFailed when a weight is NaN or infinite; found here, it costs a second instead of a whole export."""
    for graph in graphs.values():
        for name, tensor in graph.module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckFailed(
                    f"graph '{graph.name}': tensor '{name}' holds NaN or infinity; the checkpoint is damaged"
                )


def _ranges(folder: Path, writers: Mapping[str, Writer]) -> dict[str, Ranges]:
    """What the Q/DQ pairs of the graphs state whose activations have any."""
    quantised = [name for name, writer in writers.items() if writer.needs_feeds and writer.precision in CALIBRATED]
    return {name: written_ranges(folder / ONNX_FOLDER / f"{name}.onnx") for name in quantised}


def _traced(
    graphs: Mapping[str, Graph],
    made_from: Mapping[str, str],
    folder: Path,
    known: reuse_by_hash.Sources,
    progress: Progress,
) -> Collection[str]:
    """Bring every graph in fp32 into `folder`: copied where it is known, else traced; returns which were traced."""
    (folder / ONNX_FOLDER).mkdir()
    copied = known.copy({name: made_from[name] for name in graphs}, folder)
    fresh = [name for name in graphs if name not in copied]
    if fresh:
        with progress.bar("tracing", len(fresh)) as bar:
            for name in fresh:
                trace(graphs[name], folder)
                bar.advance()
    return fresh


def _write_tokenizers(model: Blip2, folder: Path, heads: Heads) -> None:
    folder.mkdir(exist_ok=True)
    pairs = {} if heads == "retrieval" else {TOKENIZER: model.tokenizer}
    if heads != "generate" or model.question_conditioned:
        pairs[QFORMER_TOKENIZER] = model.text_tokenizer
    for name, tokenizer in pairs.items():
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own.no_padding()  # settings that the last caller left behind are no part of the tokenizer
        own.no_truncation()
        own.save(str(folder / name))
