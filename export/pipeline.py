"""The story of an export: one checkpoint becomes a bundle that runs without us, or nothing appears at all.

    qforge export runs/demo/checkpoint --out bundle --precision int8 --calibration vqa_train.jsonl
"""

import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from export import quantize
from export.calibration import calibration_feeds, draw
from export.card import card
from export.config import ExportConfig, Precision
from export.graphs import Graph, graphs_of
from export.trace import ONNX_FOLDER, describe, trace
from export.verify import verify
from runtime.answers import Request
from runtime.bundle import MANIFEST, Bundle, GraphFiles, read_bundle, write_manifest
from runtime.errors import CheckFailed, InputError
from runtime.files import atomic_folder, sha256_of, write_json_atomic
from runtime.manifest import Generation, Limits, Manifest, ModelFacts, Prompts
from runtime.pipeline import QFORMER_TOKENIZER, TOKENIZER
from runtime.progress import Progress
from runtime.reference import REFERENCE, write_reference
from trainer.blip2 import Blip2
from trainer.checkpoint import WEIGHTS, load_checkpoint, read_config

LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "nncf")


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
            manifest of questions is then enough, because any image can be captioned.
        recipe_yaml: The resolved recipe, kept as text beside the result.
        reuse: A bundle made from the same checkpoint, whose fp32 graphs are copied instead of traced again.
        progress: Where bars are shown.

    Raises:
        CheckFailed: NaN, or a graph or an answer too far from eager; names the graph and its worst tensor.
        DataError: too few images, or no questions.
        InputError: limits the model cannot meet, `reuse` from another checkpoint, or `out` holds foreign files.
        CheckpointError, BundleError, OutOfSpace: as their names say.
    """
    model = load_checkpoint(checkpoint)
    graphs = graphs_of(model)
    require_finite(graphs)
    limits = _limits(model, config)
    made_by = _made_by(checkpoint)
    drawn = draw(
        model,
        calibration,
        calibration_images=config.calibration_images if precision == "int8" else 0,
        verification_images=config.verification_images,
        seed=config.seed,
        progress=progress,
    )
    with atomic_folder(out, replaces=MANIFEST) as folder:
        _write_fp32_graphs(graphs, folder, _reusable(reuse, made_by), progress)
        _write_precision(model, graphs, folder, precision, config.language_precision, drawn.calibration, progress)
        _write_tokenizers(model, folder)
        (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        facts: dict[str, Any] = {
            "model": _facts(model),
            "precision": precision,
            "language_precision": config.language_precision,
            "limits": limits,
            "preprocess": model.preprocess,
            "prompts": Prompts(caption=model.config.caption_prompt, vqa=model.config.vqa_prompt),
            "generation": _generation(model),
            "graphs": {name: describe(_graph_file(folder, name)) for name in graphs},
            "made_by": made_by,
        }
        manifest = write_manifest(folder, **facts)  # what is verified is a real bundle, opened as a user opens it
        verdict = verify(Bundle(folder, manifest), model, graphs, drawn.verification, config, progress)
        write_reference(folder / REFERENCE, verdict.cases, verdict.chain)
        images = {"calibration_images": len(_images(drawn.calibration)), "seed": config.seed}
        write_json_atomic(folder / "parity.json", verdict.as_json() | images)
        (folder / "README.md").write_text(card(manifest, verdict, read_config(checkpoint).stage), encoding="utf-8")
        write_manifest(folder, **facts)
    return out


def require_finite(graphs: Mapping[str, Graph]) -> None:
    """CheckFailed when a weight is NaN or infinite; found here, it costs a second instead of a whole export."""
    for graph in graphs.values():
        for name, tensor in graph.module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckFailed(
                    f"graph '{graph.name}': tensor '{name}' holds NaN or infinity; the checkpoint is damaged, train again"
                )


def _write_fp32_graphs(graphs: Mapping[str, Graph], folder: Path, known: Bundle | None, progress: Progress) -> None:
    with progress.bar("tracing", len(graphs)) as bar:
        for name, graph in graphs.items():
            if known is not None and _is_fp32(known.manifest, name):
                entry = known.manifest.graphs[name]
                (folder / ONNX_FOLDER).mkdir(exist_ok=True)
                for file in (entry, entry.data):
                    if file is not None:
                        shutil.copyfile(known.file(file.file), folder / file.file)
            else:
                trace(graph, folder)
            bar.advance()


def _write_precision(
    model: Blip2,
    graphs: Mapping[str, Graph],
    folder: Path,
    precision: Precision,
    language_precision: Precision,
    requests: Sequence[Request],
    progress: Progress,
) -> None:
    """Put the numeric types into the graphs, in place."""
    feeds = calibration_feeds(model, graphs, requests) if precision == "int8" else {}
    with progress.bar("quantising", len(feeds) + (language_precision == "int8")) as bar:
        for name, of_graph in feeds.items():
            quantize.quantize_activations(_graph_file(folder, name), of_graph)
            bar.advance()
        if language_precision == "int8":
            quantize.quantize_weights(_graph_file(folder, "language"))
            bar.advance()


def _write_tokenizers(model: Blip2, folder: Path) -> None:
    pairs = {TOKENIZER: model.tokenizer}
    if model.question_conditioned:
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


def _is_fp32(manifest: Manifest, graph: str) -> bool:
    precision = {"language": manifest.language_precision, "embed": "fp32"}.get(graph, manifest.precision)
    return precision == "fp32"


def _limits(model: Blip2, config: ExportConfig) -> Limits:
    trained = getattr(model.language_model.config, "max_position_embeddings", None)
    positions = config.max_positions or trained
    if positions is None:
        raise InputError("export.max_positions: this language model states no limit of its own; set one")
    if trained is not None and positions > trained:
        raise InputError(f"export.max_positions: expected at most {trained} (the language model's), found {positions}")
    queries, wanted = model.config.qformer.queries, model.config.max_new_tokens
    if queries + wanted > positions:
        raise InputError(
            f"export.max_positions: {queries} queries and {wanted} new tokens need more than {positions} positions; "
            f"raise it or lower model.max_new_tokens"
        )
    return Limits(
        max_batch=config.max_batch,
        max_positions=positions,
        max_question_tokens=model.config.qformer.max_text_tokens if model.question_conditioned else 0,
        max_new_tokens=positions - queries,
    )


def _facts(model: Blip2) -> ModelFacts:
    return ModelFacts(
        style="decoder-only",
        queries=model.config.qformer.queries,
        qformer_width=model.config.qformer.width,
        language_width=model.language_model.get_input_embeddings().embedding_dim,
        question_conditioned=model.question_conditioned,
    )


def _generation(model: Blip2) -> Generation:
    return Generation(
        eos_token_ids=(model.end_token_id,),
        pad_token_id=model.tokenizer.pad_token_id,
        max_new_tokens=model.config.max_new_tokens,
    )


def _made_by(checkpoint: Path) -> dict[str, str]:
    """Versions, and the checkpoint's SHA-256 (its configuration, which holds the frozen halves' hashes, and weights)."""
    parts = "".join(sha256_of(checkpoint / name) for name in ("config.json", WEIGHTS))
    versions = {name: importlib.metadata.version(name) for name in ("qforge", *LIBRARIES)}
    return versions | {"python": platform.python_version(), "checkpoint": hashlib.sha256(parts.encode()).hexdigest()}


def _graph_file(folder: Path, name: str) -> Path:
    return folder / ONNX_FOLDER / f"{name}.onnx"


def _images(requests: Sequence[Request]) -> set[object]:
    return {request.image for request in requests}
