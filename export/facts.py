"""What the manifest states about a model, read from the model; nothing is chosen here, so nothing has a default."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from export.config import ExportConfig, Heads
from export.trace import ONNX_FOLDER, describe
from runtime.bundle import Bundle, write_manifest
from runtime.errors import InputError
from runtime.files import sha256_of
from runtime.manifest import Generation, Limits, Manifest, ModelFacts, Prompts
from runtime.precision import LanguagePrecision, Precision
from runtime.speaker import LANGUAGE_GRAPHS, STATIC
from trainer.blip2 import Blip2
from trainer.checkpoint import WEIGHTS

UNSTATED_POSITIONS = 512
"""Positions of a language model that has no table of them (T5's are relative): what T5 was trained with."""
LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "nncf")


@dataclass(frozen=True)
class Stated:
    """What the manifest of a bundle says besides its files, settled before the first of them is written."""

    model: Blip2
    heads: Heads
    config: ExportConfig
    limits: Limits
    made_by: dict[str, str]
    graphs: tuple[str, ...]
    """Names in the manifest's order; others come last."""

    def bundle(
        self,
        folder: Path,
        precision: Precision,
        language_precision: LanguagePrecision,
        made_from: Mapping[str, str],
    ) -> Bundle:
        """State a folder, as it is now, as a real bundle, which is what gets verified.

        `made_from` has the hash of what each graph was made from, where it is known.
        """
        found = {file.stem: file for file in sorted((folder / ONNX_FOLDER).glob("*.onnx"))}
        names = [*(name for name in self.graphs if name in found), *(name for name in found if name not in self.graphs)]
        manifest = write_manifest(
            folder,
            model=model_facts(self.model, self.heads),
            precision=precision,
            language_precision=language_precision,
            target=self.config.target,
            limits=self.limits,
            preprocess=self.model.preprocess,
            prompts=prompts(self.model, self.heads),
            generation=generation(self.model, self.heads),
            graphs={name: replace(describe(found[name]), made_from=made_from.get(name)) for name in names},
            made_by=self.made_by,
        )
        return Bundle(folder, manifest)


def precision_of(manifest: Manifest, graph: str) -> Precision | LanguagePrecision:
    """Numeric type of one graph of a bundle."""
    return precision_for(graph, manifest.model.style, manifest.precision, manifest.language_precision)


def precision_for(
    graph: str, style: str, precision: Precision, language_precision: LanguagePrecision
) -> Precision | LanguagePrecision:
    """Numeric type of one graph; the token embedding is looked up, not computed with, and stays fp32."""
    if graph == "embed":
        return "fp32"
    graph = graph.removesuffix(STATIC)
    return language_precision if graph in LANGUAGE_GRAPHS[style] else precision


def limits(model: Blip2, config: ExportConfig, heads: Heads) -> Limits:
    """What the graphs can be asked for; InputError when the language model cannot meet the settings."""
    texts = 0 if heads == "generate" else model.config.qformer.max_text_tokens
    if heads == "retrieval":
        if config.image_sizes:
            raise InputError(
                "export.image_sizes: expected none for a bundle that only searches; it reads images as trained"
            )
        return Limits(
            max_batch=config.max_batch, max_positions=0, max_question_tokens=0, max_new_tokens=0, max_text_tokens=texts
        )
    trained = getattr(model.language_model.config, "max_position_embeddings", None)
    positions = config.max_positions or trained or UNSTATED_POSITIONS
    if trained is not None and positions > trained:
        raise InputError(f"export.max_positions: expected at most {trained} (the language model's), found {positions}")
    queries, wanted = model.config.qformer.queries, model.config.max_new_tokens
    # An encoder-decoder reads and says in places of their own.
    sayable = positions - queries if model.style == "decoder-only" else positions
    if queries >= positions or wanted > sayable:
        raise InputError(
            f"export.max_positions: {queries} queries and {wanted} new tokens need more than {positions} positions; "
            f"raise it or lower model.max_new_tokens"
        )
    return Limits(
        max_batch=config.max_batch,
        max_positions=positions,
        max_question_tokens=model.config.qformer.max_text_tokens if model.question_conditioned else 0,
        max_new_tokens=sayable,
        max_text_tokens=texts,
        image_sizes=config.image_sizes,
    )


def model_facts(model: Blip2, heads: Heads) -> ModelFacts:
    """Sizes of the model."""
    answers = heads != "retrieval"
    return ModelFacts(
        style=model.style if answers else "none",
        queries=model.config.qformer.queries,
        qformer_width=model.config.qformer.width,
        language_width=model.language_model.get_input_embeddings().embedding_dim if answers else None,
        question_conditioned=answers and model.question_conditioned,
        qformer_reads=model.config.qformer_reads,
    )


def prompts(model: Blip2, heads: Heads) -> Prompts:
    """Prompt templates."""
    if heads == "retrieval":
        return Prompts(caption="", vqa="")
    return Prompts(caption=model.config.caption_prompt, vqa=model.config.vqa_prompt)


def generation(model: Blip2, heads: Heads) -> Generation:
    """Defaults of decoding."""
    if heads == "retrieval":
        return Generation(eos_token_ids=(), pad_token_id=0, max_new_tokens=0)
    return Generation(
        eos_token_ids=model.end_token_ids,
        pad_token_id=model.pad_token_id,
        max_new_tokens=model.config.max_new_tokens,
        start_token_id=model.start_token_id,
    )


def made_by(checkpoint: Path) -> dict[str, str]:
    """Versions, and the checkpoint's SHA-256 (configuration with the hashes of the frozen halves, and weights)."""
    parts = "".join(sha256_of(checkpoint / name) for name in ("config.json", WEIGHTS))
    return versions() | {"python": platform.python_version(), "checkpoint": hashlib.sha256(parts.encode()).hexdigest()}


def versions() -> dict[str, str]:
    """Of qforge and of every library that has a hand in a bundle."""
    return {name: _version(name) for name in ("qforge", *LIBRARIES)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # qforge itself, run from its source folder
