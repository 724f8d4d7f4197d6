"""A whole caption on a CPU, from image file to text: INT8 bundles against transformers, eager and compiled.

One model at published sizes with random weights (benchmarks/transformers_peers.py), in one run: everybody answers the
same images with the same number of tokens, in turn, and who begins rotates. Ratios are taken over the calls of a round.

    python -m benchmarks.cpu_chain --work DIR --data captions.jsonl --out benchmarks/results/cpu-chain.json

`--work` keeps the model and the bundles (5 GB), so that a second run measures at once.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.bandwidth import reading_ms
from benchmarks.fresh_process import run_fresh
from benchmarks.machine import cpu_seconds, describe_machine
from benchmarks.results import json_text
from benchmarks.transformers_peers import SIZES, Blip2Peer, Size, write_blip2
from runtime import load
from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import read_bundle
from runtime.dataset import read_manifest
from runtime.decoding import Decoding
from runtime.estimates import percentile, ratio_of_medians
from runtime.files import write_text_atomic

TOKENS = 20
BATCH = 8
THREADS = 2
QUESTION = "what is shown in this picture?"
PROMPT = "a photo of"
FORMS = {"int8": ("int8", "int8"), "int8-int4": ("int8", "int4")}
"""Bundle → precision of vision and Q-Former, and of the language model's weights."""
BACKENDS = ("ort", "openvino")
"""What runs them."""
PEERS = {
    "eager-fp32": (torch.float32, False),
    "eager-bf16": (torch.bfloat16, False),
    "compiled-bf16": (torch.bfloat16, True),
}
EAGER = "eager-fp32"
CASES = {
    "caption": (1, TOKENS),
    "first_token": (1, 1),
    "batch": (BATCH, TOKENS),
    "second_question": (1, 1),
}
"""Case → images, tokens. Of `second_question`, the image was asked about before: a bundle remembers it."""
SETTINGS = (
    "export.calibration_images=32",
    "export.verification_images=8",
    f"export.max_batch={BATCH}",
    f"model.max_new_tokens={TOKENS}",
    "export.int8.differing_answers=1",
    "export.int4.differing_answers=1",
)
"""Answers of random weights are ties, which any rounding breaks."""


class Contestant(Protocol):
    """Who answers."""

    def say(self, images: Sequence[Path], prompt: str, tokens: int) -> list[tuple[int, ...]]:
        """Exactly so many tokens for each image."""
        ...


class BundlePeer:
    """A bundle asked as transformers is."""

    def __init__(self, bundle: Path, backend: str, cache_bytes: int) -> None:
        self._pipeline = load(bundle, backend, threads=THREADS, cache_bytes=cache_bytes)

    def say(self, images: Sequence[Path], prompt: str, tokens: int) -> list[tuple[int, ...]]:
        """See `Contestant`."""
        requests = [Request(image, prompt=prompt) for image in images]
        exactly = Decoding(min_new_tokens=tokens)
        return [answer.token_ids for answer in self._pipeline.answer(requests, max_new_tokens=tokens, decoding=exactly)]


def ways(bundles: dict[str, Path]) -> dict[str, tuple[Path, str]]:
    """Name of a way to run a bundle → the bundle, and the back-end."""
    return {f"{name} {backend}": (bundle, backend) for name, bundle in bundles.items() for backend in BACKENDS}


def make(work: Path, data: Path, size: Size, settings: Sequence[str] = SETTINGS) -> tuple[Path, dict[str, Path]]:
    """(the model as transformers reads it, its bundles); what is there already is used again."""
    source, checkpoint = work / "source", work / "checkpoint"
    if not source.exists():
        write_blip2(source, size)
    if not checkpoint.exists():
        _qforge("import", str(source), "--out", str(checkpoint))
    bundles = dict[str, Path]()
    words = [word for setting in settings for word in ("--set", setting)]
    for name, (precision, language) in FORMS.items():
        earlier = [word for bundle in list(bundles.values())[:1] for word in ("--reuse", str(bundle))]
        bundles[name] = work / f"bundle-{name}"
        if not bundles[name].exists():
            form = ["--precision", precision, "--language-precision", language, "--calibration", str(data), *earlier]
            _qforge("export", str(checkpoint), "--out", str(bundles[name]), *form, *words)
    return source, bundles


def _qforge(*words: str) -> None:
    subprocess.run([sys.executable, "-c", "from qforge.cli import main; main()", *words], check=True)


def measure(
    contestants: dict[str, dict[str, Contestant]],
    images: Sequence[Path],
    rounds: int,
    between: Callable[[str], None] = lambda _case: None,
) -> dict[str, dict[str, list[float]]]:
    """Case → name → milliseconds of every round; one more round before them warms up and is not kept.

    `between` is called with the case after each round that is kept.
    """
    taken: dict[str, dict[str, list[float]]] = {}
    for case, (count, tokens) in CASES.items():
        names = list(contestants[case])
        taken[case] = {name: [] for name in names}
        for number in range(rounds + 1):
            start = number * count % len(images)
            asked = [images[(start + place) % len(images)] for place in range(count)]
            for place in range(len(names)):
                name = names[(number + place) % len(names)]
                who, prompt = contestants[case][name], PROMPT
                if case == "second_question":
                    who.say(asked, "is it a dog?", 1)
                    prompt = f"Question: {QUESTION} Answer:"
                gc.collect()
                began = time.perf_counter()
                said = who.say(asked, prompt, tokens)
                taken_ms = 1000 * (time.perf_counter() - began)
                if [len(ids) for ids in said] != [tokens] * count:
                    raise AssertionError(f"{name}: expected {tokens} tokens each, found {list(map(len, said))}")
                if number:
                    taken[case][name].append(taken_ms)
            if number:
                between(case)
    return taken


class Floors:
    """What it takes to read each bundle's language weights once, measured between the rounds that say tokens.

    What memory gives moves by half within a minute on a shared machine.
    """

    def __init__(self, ours: dict[str, tuple[Path, str]]) -> None:
        self.weight_bytes = {
            name: read_bundle(path, check_hashes=False).manifest.graphs["language"].bytes
            for name, (path, _) in ours.items()
        }
        self.samples_ms: dict[int, list[float]] = {nbytes: [] for nbytes in self.weight_bytes.values()}

    def between(self, case: str) -> None:
        """Measure once more, in the cases that a token's time is made of."""
        if case in ("caption", "first_token"):
            for nbytes, samples_ms in self.samples_ms.items():
                samples_ms.append(reading_ms(nbytes, THREADS))


def summarise(taken: dict[str, dict[str, list[float]]], ours: Collection[str], floors: Floors) -> dict[str, Any]:
    """What the samples say: medians, ratios to each peer with their intervals, and the distance to memory's floor."""
    found: dict[str, Any] = {"cases": {}, "per_token": {}}
    for case, of_case in taken.items():
        found["cases"][case] = {
            name: {
                "median_ms": round(percentile(samples, 50), 2),
                "samples_ms": [round(sample, 2) for sample in samples],
                "times_faster_than": {
                    peer: ratio_of_medians(of_case[peer], samples, seed=0) for peer in PEERS if peer in of_case
                }
                if name in ours
                else {},
            }
            for name, samples in of_case.items()
        }
    for name in taken["caption"]:
        pairs = zip(taken["caption"][name], taken["first_token"][name], strict=True)
        per_token_ms = percentile([(whole - first) / (TOKENS - 1) for whole, first in pairs], 50)
        found["per_token"][name] = {"ms": round(per_token_ms, 3)}
        if name in ours:
            samples = floors.samples_ms[floors.weight_bytes[name]]
            found["per_token"][name] |= {
                "weight_bytes": floors.weight_bytes[name],
                "floor_samples_ms": [round(sample, 3) for sample in samples],
                "of_floor": round(per_token_ms / percentile(samples, 50), 2),
            }
    return found


def memory_and_start(checkpoint: Path, ours: dict[str, tuple[Path, str]], images: Sequence[Path]) -> dict[str, Any]:
    """Each in a process of its own: what it takes to be ready, and the most memory it had while answering."""
    asked = [Request(image) for image in images[:4]]
    found = {EAGER: run_fresh("eager", checkpoint, asked, device=Device(threads=THREADS), max_new_tokens=TOKENS)}
    for name, (path, backend) in ours.items():
        device = Device(backend, threads=THREADS)
        found[name] = run_fresh("bundle", path, asked, device=device, max_new_tokens=TOKENS)
    for figures in found.values():
        figures["ready_ms"] = figures["loaded_ms"] - figures["imported_ms"]
        figures["peak_of_eager"] = figures["peak_bytes"] / found[EAGER]["peak_bytes"]
    return found


def run(
    work: Path, data: Path, rounds: int, size: str = "opt-125m", settings: Sequence[str] = SETTINGS
) -> dict[str, Any]:
    """Make what is missing, then measure."""
    work.mkdir(parents=True, exist_ok=True)
    source, bundles = make(work, data, SIZES[size], settings)
    images = [row.image for row in read_manifest(data)][: 2 * BATCH]
    ours = ways(bundles)
    for bundle, backend in ours.values():  # what is checked, compiled or packed once is done before anything is timed
        load(bundle, backend, threads=THREADS).close()
    fresh = memory_and_start(work / "checkpoint", ours, images)
    torch.set_num_threads(THREADS)
    peers: dict[str, Contestant] = {
        name: Blip2Peer(source, dtype, compiled) for name, (dtype, compiled) in PEERS.items()
    }
    plain: dict[str, Contestant] = {name: BundlePeer(*way, 0) for name, way in ours.items()}
    remember: dict[str, Contestant] = {name: BundlePeer(*way, 64 << 20) for name, way in ours.items()}
    contestants = {case: peers | (remember if case == "second_question" else plain) for case in CASES}
    floors, before = Floors(ours), cpu_seconds()
    taken = measure(contestants, images, rounds, floors.between)
    after = cpu_seconds()
    others = (after[0] - before[0] - (after[1] - before[1])) / (after[0] - before[0])
    return {
        "what": f"BLIP-2 ({size}), random weights, from image file to text",
        "command": "python -m benchmarks.cpu_chain --work DIR --data FILE --out FILE",
        "settings": {"threads": THREADS, "tokens": TOKENS, "batch": BATCH, "rounds": rounds, "export": list(settings)},
        **summarise(taken, ours, floors),
        "fresh_process": fresh,
        "cpu_share_of_others": round(others, 4),
        "machine": describe_machine(),
    }


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and its bundles (5 GB), kept")
    parser.add_argument("--data", type=Path, required=True, help="manifest of real images")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of everybody in every case")
    given = parser.parse_args()
    write_text_atomic(given.out, json_text(run(given.work, given.data, given.rounds)))


if __name__ == "__main__":
    main()
