"""What each precision costs and gives, at published sizes with random weights: size, cosine, speed on this CPU.

ViT-B/16 at 224 pixels, Q-Former 12 x 768, OPT-125M and Flan-T5-small shapes. A few gains of the tower's LayerNorms are
12 times as large, as outlier channels of trained towers are. Real images calibrate and judge; random weights compare
precisions with each other and say nothing of answers.

    python -m benchmarks.precisions --work DIR --data captions.jsonl --out precisions.json
    python -m benchmarks.precisions --work DIR --data vqa_train.jsonl --out demo.json --checkpoint runs/demo/checkpoint
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from export.calibration import calibration_feeds, draw
from export.config import ExportConfig
from export.graphs import Arrays, graphs_of
from export.language_feeds import language_feeds
from export.pipeline import export_bundle
from export.precision.emulate import emulate, has_sixteen_bits
from export.precision.kept import REPORT
from export.trace import describe
from runtime.backends.ort import OrtEngine
from runtime.bundle import read_bundle
from runtime.errors import BundleError
from runtime.files import write_text_atomic
from runtime.precision import LanguagePrecision, Precision, Target
from runtime.progress import Progress
from trainer.blip2 import new_blip2
from trainer.checkpoint import load_checkpoint, write_checkpoint
from trainer.config import DEMO, ModelConfig, QFormerConfig
from trainer.new_halves import new_vision_tower
from trainer.towers import load_tokenizer

Form = tuple[Precision, LanguagePrecision, Target]
FORMS: tuple[Form, ...] = (
    ("fp16", "fp16", "onnxruntime"),
    ("bf16", "bf16", "onnxruntime"),
    ("int8", "int8", "onnxruntime"),
    ("fp8", "int4", "onnxruntime"),
    ("int8", "int8", "tensorrt"),
    ("fp8", "int4", "tensorrt"),
)
SIZES = "random weights: ViT-B/16 at 224 px, Q-Former 12 x 768, OPT-125M, Flan-T5-small; languages: a prefill of 4 rows"
OUTLIERS, GAIN = 6, 12.0
"""Channels per LayerNorm of the tower, and how much larger their gain is."""
JUDGED = 8
"""Runs of each graph that are compared, other images than those that calibrated."""
TIMED = 9
"""Runs of each that are timed, one of fp32 and one of the other in turn."""


def write_models(work: Path) -> dict[str, Path]:
    """A checkpoint with ViT-B, Q-Former-base and an OPT-125M shape, and one with a Flan-T5-small shape."""
    torch.manual_seed(0)
    tower = new_vision_tower(image_size=224, patch=16, width=768, layers=12, heads=12)
    rng = np.random.default_rng(0)
    for module in tower.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data[rng.choice(768, OUTLIERS, replace=False)] *= GAIN
    tower.save_pretrained(work / "vision")
    stored = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3}
    (work / "vision" / "preprocessor_config.json").write_text(json.dumps(stored))
    ids = {"eos_token_id": 2, "pad_token_id": 1}
    opt = OPTForCausalLM(OPTConfig(dropout=0.0, init_std=0.05, **ids))
    small = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32128}
    flan = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    t5 = T5ForConditionalGeneration(T5Config(**small, **flan, eos_token_id=2, pad_token_id=1))
    halves = {"opt": str(work / "vision"), "t5": DEMO}
    return {name: _checkpoint(work, name, model, halves[name]) for name, model in (("opt", opt), ("t5", t5))}


def _checkpoint(work: Path, name: str, language: PreTrainedModel, vision: str) -> Path:
    language.save_pretrained(work / name)
    load_tokenizer(DEMO, "language").save_pretrained(work / name)
    config = ModelConfig(
        vision=vision, language=str(work / name), qformer=QFormerConfig(), caption_prompt="a photo of", max_new_tokens=4
    )
    folder = work / f"{name}-checkpoint"
    folder.mkdir()
    model = new_blip2(config, question_conditioned=False)
    write_checkpoint(model, folder, stage="stage2", metrics={}, recipe_yaml="seed: 0\n")
    return folder


def measure(
    checkpoint: Path, names: Sequence[str], data: Path, work: Path, images: int, forms: Sequence[Form]
) -> list[dict[str, Any]]:
    """Export the checkpoint in these forms, verified as any export is; a row per form and graph of `names`.

    Only answers go unjudged: those of random weights are ties that any rounding breaks.
    """
    config = _any_answer(ExportConfig(calibration_images=images, verification_images=JUDGED, max_batch=4))
    exact_folder = work / f"{checkpoint.name}-fp32"
    _export(checkpoint, exact_folder, config, "fp32", data, None)
    model, exact = load_checkpoint(checkpoint), read_bundle(exact_folder, check_hashes=False)
    judged = draw(
        model, [data], calibration_images=images, verification_images=JUDGED, seed=0, progress=Progress(quiet=True)
    ).verification
    graphs, place = graphs_of(model), work / f"{checkpoint.name}-judged"
    feeds = {
        **calibration_feeds(model, graphs, judged, place / "image"),
        **language_feeds(exact, model, graphs, judged, place / "language"),
    }
    rows = list[dict[str, Any]]()
    for precision, language, target in forms:
        folder = work / f"{checkpoint.name}-{precision}-{language}-{target}"
        form = config.model_copy(update={"target": target, "language_precision": language})
        _export(checkpoint, folder, form, precision, data, exact_folder)
        bundle = read_bundle(folder)
        report = json.loads(bundle.file(REPORT).read_text())
        for name in names:
            written = report[name]
            row: dict[str, Any] = {"graph": name, "precision": written["precision"], "target": target}
            row |= {"kept": len(written["kept"]), "verified": written["verified"]}
            row |= compare(exact.graph(name), bundle.graph(name), feeds[name], precision == "fp8")
            print(json.dumps(row), flush=True)
            rows.append(row)
        shutil.rmtree(folder)
    return rows


def _any_answer(config: ExportConfig) -> ExportConfig:
    loose = {
        name: getattr(config, name).model_copy(update={"differing_answers": 1.0})
        for name in ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
    }
    return config.model_copy(update=loose)


def _export(
    checkpoint: Path, out: Path, config: ExportConfig, precision: Precision, data: Path, reuse: Path | None
) -> None:
    export_bundle(
        checkpoint,
        out,
        config,
        precision=precision,
        calibration=[data],
        recipe_yaml="seed: 0\n",
        reuse=reuse,
        progress=Progress(),
    )


def compare(exact: Path, other: Path, feeds: Sequence[Arrays], fp8: bool) -> dict[str, Any]:
    """Size, worst cosine over outputs and runs (on an emulation where the graph has 16-bit types), and speed."""
    sizes = {"bytes": other.stat().st_size, "fp32_bytes": exact.stat().st_size}
    found: dict[str, Any] = {**sizes, "size_of_fp32": round(sizes["bytes"] / sizes["fp32_bytes"], 4)}
    largest = [max(feeds, key=lambda feed: sum(array.size for array in feed.values()))]
    with OrtEngine(exact) as plain:
        try:
            with OrtEngine(other, fuse_int8=not fp8) as engine:
                found |= _speed(plain, engine, largest[0], other)
        except BundleError:
            found |= {"times_faster": None, "why": "onnxruntime's CPU has no arithmetic of this type"}
        if has_sixteen_bits(other):
            emulate(other)
        with OrtEngine(other, fuse_int8=not fp8) as engine:
            cosines = [_cosine(plain.run(feed), engine.run(_typed(feed, other))) for feed in feeds[:JUDGED]]
    return found | {"worst_cosine": round(min(cosines), 6), "mean_cosine": round(float(np.mean(cosines)), 6)}


def _speed(plain: OrtEngine, engine: OrtEngine, feed: Arrays, file: Path) -> dict[str, Any]:
    pairs, timed = [(plain, feed), (engine, _typed(feed, file))], (list[float](), list[float]())
    for number in range(TIMED + 1):
        for seconds, (runner, given) in zip(timed, pairs, strict=True):
            start = time.perf_counter()
            runner.run(given)
            if number:  # the first run warms up
                seconds.append(time.perf_counter() - start)
    ratios = np.array(timed[0]) / np.array(timed[1])
    fp32_ms, other_ms = (round(1000 * float(np.median(seconds)), 2) for seconds in timed)
    return {"times_faster": round(float(np.median(ratios)), 2), "fp32_ms": fp32_ms, "ms": other_ms}


def _typed(feed: Mapping[str, Any], file: Path) -> Arrays:
    """Cached keys and values in the type that the graph takes."""
    return {name: feed[name].astype(spec.dtype) for name, spec in describe(file).inputs.items()}


def _cosine(expected: Arrays, found: Arrays) -> float:
    """Smallest over the outputs."""
    pairs = [(expected[name].ravel().astype(np.float64), found[name].ravel().astype(np.float64)) for name in expected]
    return min(float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs)


def run(
    work: Path, data: Path, images: int, checkpoint: Path | None = None, forms: Sequence[Form] = FORMS
) -> dict[str, Any]:
    """Export, verify, measure; `work` is removed. `checkpoint`: a decoder-only model instead of the random ones."""
    work.mkdir(parents=True)
    try:
        if checkpoint is not None:
            rows = measure(checkpoint, ("vision", "qformer", "language"), data, work, images, forms)
        else:
            checkpoints = write_models(work)
            rows = measure(checkpoints["opt"], ("vision", "qformer", "language"), data, work, images, forms)
            # Its image side is the demo's, which has a result of its own: FP8 is for images like those it learned from.
            of_text = [("int8" if form[0] == "fp8" else form[0], *form[1:]) for form in forms]
            rows += measure(checkpoints["t5"], ("encoder", "decoder"), data, work, images, of_text)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "what": "precisions exported, verified and run on real images; speed beside fp32 in the same run",
        "model": SIZES if checkpoint is None else "a trained checkpoint",
        "calibration_images": images,
        "judged_runs": JUDGED,
        "rows": rows,
        "machine": describe_machine(),
    }


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to make and remove; a few GB")
    parser.add_argument("--data", type=Path, required=True, help="manifest of real images")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--images", type=int, default=32, help="images that ranges are measured on")
    parser.add_argument("--checkpoint", type=Path, help="a trained, decoder-only model instead of the random ones")
    names = list(dict.fromkeys(form[0] for form in FORMS))
    parser.add_argument("--precision", choices=names, nargs="+", default=names, help="forms whose vision graph has it")
    given = parser.parse_args()
    forms = [form for form in FORMS if form[0] in given.precision]
    write_text_atomic(given.out, json_text(run(given.work, given.data, given.images, given.checkpoint, forms)))


if __name__ == "__main__":
    main()
