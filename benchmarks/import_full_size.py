"""What an import costs at full size: time and memory for a folder of BLIP-2 OPT-2.7B's shape with random weights.

The folder (7.5 GB in fp16, parts of 2 GB) is generated part by part, imported by `qforge import` in a process of its
own and deleted again; 16 GB of disk are needed meanwhile. Nothing is downloaded.

    python -m benchmarks.import_full_size --work DIR --out benchmarks/results/import-opt-2.7b.json
    python -m benchmarks.import_full_size --work DIR --out small.json --size 2gb
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from runtime.errors import InputError
from runtime.files import write_text_atomic
from trainer.config import DEMO
from trainer.convert.check import expected_tensors
from trainer.convert.stream import Chunks, Piece, write_weights
from trainer.towers import load_tokenizer

GB = 10**9
POOL_BYTES = 32 << 20
"""Random numbers that every tensor is filled from; what they are does not matter, only how many."""
OFFSET_BYTES = 22_222
"""From where one tensor begins in the pool to where the next does: an engine builder keeps equal tensors once."""
SAMPLE_S = 0.002
"""Pause between two looks at a process's memory."""
FFN_RATIO, VISION_HEAD = 6144 / 1408, 88
"""ViT-g's feed-forward width over its own, and the width of a head."""


@dataclass(frozen=True)
class Shape:
    """How large the generated model is."""

    vision_layers: int
    language_layers: int
    part_bytes: int
    width: int = 2560
    vocabulary: int = 50_304
    vision_width: int = 1408
    qformer_layers: int = 12


SHAPES = {
    "opt-2.7b": Shape(vision_layers=39, language_layers=32, part_bytes=2 * GB),
    "vit-g": Shape(vision_layers=39, language_layers=2, part_bytes=GB, width=512, vocabulary=8_000),
    "2gb": Shape(vision_layers=6, language_layers=8, part_bytes=GB // 2),
    "tiny": Shape(vision_layers=1, language_layers=4, part_bytes=48 << 20, width=512, vocabulary=8_000),
    "tinier": Shape(1, 1, part_bytes=GB, width=320, vocabulary=2_000, vision_width=352, qformer_layers=2),
}
"""Published size; its image side with a small language model; a quarter of it in small parts; one for tests of imports,
one for tests of exports."""

IMPORT = """
import json, sys, threading, time
from pathlib import Path
from qforge.recipe import Recipe
from trainer.convert import ImportOptions, import_checkpoint
import transformers.models.opt.modeling_opt, transformers.models.blip_2.modeling_blip_2  # what any import loads

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], memory("RssAnon"))
        time.sleep(SAMPLE_S)

before = {"resident": memory("VmRSS"), "anonymous": memory("RssAnon")}
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
import_checkpoint(sys.argv[1], Path(sys.argv[2]), ImportOptions(), lambda model: Recipe(model=model).to_yaml())
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "before": before,
    "peak": {"resident": memory("VmHWM"), "anonymous": peak[0]},
}))
"""


def write_folder(folder: Path, shape: Shape) -> int:
    """A `Blip2ForConditionalGeneration` folder of that shape in fp16, never in memory; returns its weights' bytes."""
    text_config = {
        "model_type": "opt",
        "hidden_size": shape.width,
        "word_embed_proj_dim": shape.width,
        "ffn_dim": 4 * shape.width,
        "num_hidden_layers": shape.language_layers,
        "num_attention_heads": shape.width // 80 if shape.width % 80 == 0 else shape.width // 64,
        "vocab_size": shape.vocabulary,
        "eos_token_id": 2,
    }
    config = Blip2Config(
        vision_config={
            "num_hidden_layers": shape.vision_layers,
            "hidden_size": shape.vision_width,
            "intermediate_size": round(FFN_RATIO * shape.vision_width),
            "num_attention_heads": shape.vision_width // VISION_HEAD,
        },
        qformer_config={"num_hidden_layers": shape.qformer_layers, "encoder_hidden_size": shape.vision_width},
        text_config=text_config,
        num_query_tokens=32,
        image_token_index=shape.vocabulary - 1,
    )
    config.architectures = [Blip2ForConditionalGeneration.__name__]
    config.dtype = torch.float16
    expected = expected_tensors(lambda: Blip2ForConditionalGeneration(config))
    expected.pop("language_model.lm_head.weight")  # tied
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 224, "width": 224})
    Blip2Processor(images, load_tokenizer(DEMO, "language"), 32).save_pretrained(folder)
    pool = np.random.default_rng(0).normal(0, 0.02, POOL_BYTES // 2).astype(np.float16).data.cast("B")
    pieces = {
        key: _random_piece(tuple(tensor.shape), pool, number * OFFSET_BYTES % POOL_BYTES, folder)
        for number, (key, tensor) in enumerate(expected.items())
    }
    write_weights(folder, pieces, shape.part_bytes)
    return sum(piece.nbytes for piece in pieces.values())


def _random_piece(shape: tuple[int, ...], pool: memoryview, start: int, folder: Path) -> Piece:
    def chunks() -> Chunks:
        left, place = piece.nbytes, start
        while left:
            chunk = pool[place : place + min(left, POOL_BYTES - place)]
            yield chunk
            left, place = left - len(chunk), 0

    piece = Piece("F16", shape, folder, chunks)
    return piece


def measure(folder: Path, out: Path) -> dict[str, Any]:
    """Import `folder` in a fresh process: seconds, and memory (bytes) before and at its peak.

    `resident` counts mapped pages of files too; `anonymous` is what the process itself keeps.
    """
    command = [sys.executable, "-c", IMPORT.replace("SAMPLE_S", str(SAMPLE_S)), str(folder), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def run(size: str, work: Path) -> dict[str, Any]:
    """Generate, import, delete; what it took."""
    shape = SHAPES[size]
    source, checkpoint = work / "source", work / "checkpoint"
    if source.exists() or checkpoint.exists():
        raise InputError(f"{work}: expected a folder without source/ and checkpoint/, which this would replace")
    try:
        start = time.perf_counter()
        weights_bytes = write_folder(source, shape)
        generated_s = time.perf_counter() - start
        parts = [path.stat().st_size for path in source.glob("*.safetensors")]
        measured = measure(source, checkpoint)
        written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    finally:
        for folder in (source, checkpoint):
            shutil.rmtree(folder, ignore_errors=True)
    peak, before = measured["peak"], measured["before"]
    return {
        "what": f"qforge import of a generated BLIP-2 folder ({size}), random fp16 weights",
        "command": f"python -m benchmarks.import_full_size --size {size} --work DIR --out FILE",
        "source": {"weights_bytes": weights_bytes, "parts": len(parts), "largest_part_bytes": max(parts)},
        "checkpoint_bytes": written,
        "generated_s": round(generated_s, 1),
        "imported_s": round(measured["seconds"], 1),
        "memory_bytes": {
            "note": "of the whole process; 'before' is Python with torch and transformers, nothing read yet",
            "before": before,
            "peak": peak,
            "grown": {name: peak[name] - before[name] for name in peak},
        },
        "peak_resident_over_largest_part": round(peak["resident"] / max(parts), 3),
        "machine": describe_machine(),
    }


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the generated model; emptied again")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--size", choices=SHAPES, default="opt-2.7b")
    arguments = parser.parse_args()
    text = json_text(run(arguments.size, arguments.work))
    write_text_atomic(arguments.out, text)
    print(text)


if __name__ == "__main__":
    main()
