"""What engines cost at full size: time, peak memory and plan bytes of large graphs, built without a GPU.

Random weights in the shapes of published models, in FP16; nothing is downloaded. Every graph is traced in one process
and built in another, so that each peak is its own.

    python -m benchmarks.engines --work DIR --out benchmarks/results/engines.json
    python -m benchmarks.engines --work DIR --out one.json --case vit-b --compute-capability 8.6
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.fresh_process import peak_bytes
from benchmarks.machine import describe_machine
from benchmarks.results import json_text
from export.engines.builder import open_builder
from export.engines.plan import build_graph
from export.engines.profiles import profiles_of
from export.engines.refusals import require_buildable
from export.engines.targets import parse_capability
from export.graphs import Graph, graphs_of, vision_graph
from export.static_cache import static_graph
from export.trace import describe, trace
from runtime.bundle import read_bundle, write_manifest
from runtime.engine_manifest import EngineOptions
from runtime.errors import InputError
from runtime.files import write_text_atomic
from runtime.manifest import Generation, Limits, ModelFacts, Prompts
from runtime.preprocess import PreprocessSettings
from trainer.blip2 import Blip2
from trainer.bridge import Part
from trainer.config import ModelConfig, QFormerConfig
from trainer.new_halves import new_vision_tower
from trainer.towers import VisionTower

LIMITS = Limits(max_batch=8, max_positions=512, max_question_tokens=0, max_new_tokens=128)
MEAN = (0.48, 0.46, 0.41)
STD = (0.27, 0.26, 0.28)
GPUS = ("8.0", "8.6", "8.9", "12.0")
"""One plan for all of them, unless others are asked for."""


class Half(nn.Module):
    """A module that computes in FP16 between inputs and outputs of the types that a bundle promises."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.half()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As the module's own."""
        halved = (tensor.half() if tensor.is_floating_point() else tensor for tensor in tensors)
        return tuple(tensor.float() for tensor in self.module(*halved))


def _model(vision: dict[str, int], language: Any) -> Blip2:
    side = PreprocessSettings(height=224, width=224, resample="bicubic", mean=MEAN, std=STD)
    tower = VisionTower(new_vision_tower(image_size=224, **vision), -1, side)
    queries = QFormerConfig(queries=32, width=768, layers=12, heads=12, ffn_width=3072, vocabulary=1)
    config = ModelConfig(qformer=queries)
    parts: tuple[Part, ...] = ("language",)
    return Blip2(config, tower, language, None, None, False, parts).eval()


VIT_B = {"patch": 16, "width": 768, "layers": 12, "heads": 12}
VIT_G = {"patch": 14, "width": 1408, "layers": 39, "heads": 16}
TINY_VISION = {"patch": 56, "width": 64, "layers": 1, "heads": 4}


def _opt() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig()).eval()  # its defaults are OPT-125M


def _t5() -> T5ForConditionalGeneration:
    sizes = {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 32128}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def _half(graph: Graph) -> Graph:
    return Graph(graph.name, Half(graph.module).eval(), graph.inputs, graph.outputs, graph.hidden, graph.opset)


def _of(name: str, make: Callable[[], Blip2]) -> Callable[[], tuple[Blip2, Graph]]:
    def made() -> tuple[Blip2, Graph]:
        model = make()
        return model, _half(vision_graph(model) if name == "vision" else graphs_of(model)[name])

    return made


def _static_of(name: str, make: Callable[[], Blip2]) -> Callable[[], tuple[Blip2, Graph]]:
    def made() -> tuple[Blip2, Graph]:
        model = make()
        return model, static_graph(model, graphs_of(model)[name], "fp16", LIMITS)

    return made


CASES: dict[str, Callable[[], tuple[Blip2, Graph]]] = {
    "vit-b": _of("vision", lambda: _model(VIT_B, _opt())),
    "qformer-base": _of("qformer", lambda: _model({"patch": 14, "width": 1408, "layers": 1, "heads": 16}, _opt())),
    "opt-125m": _of("language", lambda: _model(TINY_VISION, _opt())),
    "opt-125m-static": _static_of("language", lambda: _model(TINY_VISION, _opt())),
    "flan-t5-small-encoder": _of("encoder", lambda: _model(TINY_VISION, _t5())),
    "flan-t5-small-decoder": _of("decoder", lambda: _model(TINY_VISION, _t5())),
    "flan-t5-small-decoder-static": _static_of("decoder", lambda: _model(TINY_VISION, _t5())),
    "vit-g": _of("vision", lambda: _model(VIT_G, _opt())),
}
"""Case → the model, random, and the graph that is measured."""


def trace_case(case: str, folder: Path) -> dict[str, Any]:
    """Write the case as a bundle of one graph; what that took."""
    torch.manual_seed(0)
    model, graph = CASES[case]()
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with torch.no_grad():
        trace(graph, folder)
    traced_s = time.perf_counter() - start
    (folder / "README.md").write_text(f"{case}, random weights\n", encoding="utf-8")
    write_manifest(
        folder,
        model=ModelFacts(
            style=model.style,
            queries=32,
            qformer_width=768,
            language_width=model.language_model.get_input_embeddings().embedding_dim,
            question_conditioned=False,
        ),
        precision="fp16",
        language_precision="fp16",
        target="tensorrt",
        limits=LIMITS,
        preprocess=model.preprocess,
        prompts=Prompts(caption="", vqa="{}"),
        generation=Generation(eos_token_ids=(2,), pad_token_id=1, max_new_tokens=32, start_token_id=0),
        graphs={graph.name: describe(folder / "onnx" / f"{graph.name}.onnx")},
        made_by={"benchmark": case},
    )
    onnx_bytes = sum(file.stat().st_size for file in (folder / "onnx").iterdir())
    return {"traced_s": round(traced_s, 1), "onnx_bytes": onnx_bytes, "peak_rss_bytes": peak_bytes()}


def build_case(folder: Path, gpus: Sequence[str]) -> dict[str, Any]:
    """Build the one graph of a bundle; what that took."""
    bundle, builder = read_bundle(folder), open_builder("tensorrt-rtx")
    (name,) = bundle.manifest.graphs
    capabilities = builder.capabilities(tuple(map(parse_capability, gpus)))
    profiles = profiles_of(name, bundle.manifest)
    before, cpu_before = peak_bytes(), time.process_time()
    require_buildable(bundle.graph(name), name, builder.engine, capabilities)
    built = build_graph(bundle.graph(name), name, builder, capabilities, profiles, EngineOptions())
    return {
        "graph": name,
        "profiles": len(profiles),
        "layers": len(built.layers),
        "cache_layers": built.layers.count("KV_CACHE_UPDATE"),
        "built_s": round(built.build_s, 1),
        "cpu_s": round(time.process_time() - cpu_before, 1),
        "plan_bytes": memoryview(built.plan).nbytes,
        "peak_rss_bytes": peak_bytes(),
        "peak_rss_before_bytes": before,
    }


def run(cases: Sequence[str], work: Path, gpus: Sequence[str]) -> dict[str, Any]:
    """Trace and build every case, each in processes of its own."""
    measured = {}
    for case in cases:
        folder = work / case
        if folder.exists():
            raise InputError(f"{folder}: expected nothing there, found a folder; name another --work")
        try:
            traced = _in_process(["--trace", case, "--work", str(folder)])
            options = [word for gpu in gpus for word in ("--compute-capability", gpu)]
            measured[case] = {"trace": traced, "build": _in_process(["--build", "--work", str(folder), *options])}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(case, json.dumps(measured[case]), file=sys.stderr, flush=True)
    return {
        "what": "FP16 graphs of published shapes with random weights, built by TensorRT-RTX without a GPU",
        "command": "python -m benchmarks.engines --work DIR --out FILE",
        "builder": open_builder("tensorrt-rtx").version,
        "compute_capabilities": list(gpus),
        "limits": LIMITS.model_dump(),
        "cases": measured,
        "machine": describe_machine(),
    }


def _in_process(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.engines", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """The commands above; `--trace` and `--build` are what it calls itself with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the graphs; emptied again")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; without it, all")
    parser.add_argument("--compute-capability", action="append", help="repeatable; without it, four in one plan")
    parser.add_argument("--trace", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    gpus = arguments.compute_capability or GPUS
    if arguments.trace:
        print(json.dumps(trace_case(arguments.trace, arguments.work)))
    elif arguments.build:
        print(json.dumps(build_case(arguments.work, gpus)))
    else:
        text = json_text(run(arguments.case or list(CASES), arguments.work, gpus))
        if arguments.out is not None:
            write_text_atomic(arguments.out, text)
        print(text)


if __name__ == "__main__":
    main()
