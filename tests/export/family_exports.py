"""Language models of six shapes as bundles, for the tests of what they answer and of the forms they are written in."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from export import pipeline
from export.config import ExportConfig
from export.graphs import Graph
from export.pipeline import export_bundle
from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import Bundle, read_bundle
from runtime.pipeline import Pipeline
from runtime.progress import Progress
from tests.families import write_family
from trainer.blip2 import Blip2, new_blip2
from trainer.checkpoint import load_checkpoint, write_checkpoint
from trainer.generate import EagerPipeline

QUIET = Progress(quiet=True)
CONFIG = ExportConfig(verification_images=4, calibration_images=4, max_batch=8)
ENCODER_DECODERS = ("t5", "flan")
READS_PROMPTS = ("llama", "flan")
"""Their Q-Former is given the whole prompt, InstructBLIP's way."""


@dataclass(frozen=True)
class Family:
    """One shape, from checkpoint to bundle."""

    checkpoint: Path
    model: Blip2
    bundle: Bundle

    def again(self, out: Path, config: ExportConfig, manifests: list[Path]) -> Bundle:
        """Exported once more with other settings, from the same traced graphs."""
        exported = export_bundle(
            self.checkpoint,
            out,
            config,
            precision="fp32",
            calibration=manifests,
            recipe_yaml="{}\n",
            reuse=self.bundle.path,
            progress=QUIET,
        )
        return read_bundle(exported)


def often_said(model: Blip2, images: list[Path]) -> int:
    """A token that random weights love to say, but not first: as end token it lets some answers end early."""
    answers = [answer.token_ids for answer in EagerPipeline(model).answer([Request(image) for image in images])]
    first = {ids[0] for ids in answers if ids}
    return Counter(token for ids in answers for token in ids if token not in first).most_common(1)[0][0]


def answered(bundle: Bundle, requests: list[Request]) -> list[tuple[int, ...]]:
    with Pipeline(bundle, device=Device(threads=1), cache_bytes=0) as opened:
        return [answer.token_ids for answer in opened.answer(requests)]


def parity(bundle: Bundle) -> list[dict]:
    return json.loads((bundle.path / "parity.json").read_text())["graphs"]


def family_exporter(
    model: Blip2, bundle_fp32: Bundle, manifests: list[Path], images: list[Path], root: Path
) -> Callable[[str], Family]:
    """Family by name, exported in fp32 when it is first asked for."""
    made = dict[str, Family]()
    trace = pipeline.trace

    def traced(graph: Graph, folder: Path) -> Path:
        if graph.name not in ("vision", "qformer"):
            return trace(graph, folder)
        file = folder / bundle_fp32.manifest.graphs[graph.name].file
        shutil.copyfile(bundle_fp32.graph(graph.name), file)
        return file

    def exported(name: str) -> Family:
        config = write_family(name, model.config, root / name / "language").model_copy(
            update={
                "qformer_reads": "prompt" if name in READS_PROMPTS else "question",
                "caption_prompt": "a picture of",
            }
        )
        blip2 = new_blip2(config, question_conditioned=True).eval()
        blip2.bridge.load_state_dict(model.bridge.state_dict())
        blip2.config = config.model_copy(update={"end_token_ids": (2, often_said(blip2, images))})
        checkpoint = root / name / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(blip2, checkpoint, stage="vqa", metrics={}, recipe_yaml="{}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "trace", traced)
            out = export_bundle(
                checkpoint,
                root / name / "bundle",
                CONFIG,
                precision="fp32",
                calibration=manifests,
                recipe_yaml="{}\n",
                reuse=None,
                progress=QUIET,
            )
        return Family(checkpoint, load_checkpoint(checkpoint), read_bundle(out))

    def cached(name: str) -> Family:
        if name not in made:
            made[name] = exported(name)
        return made[name]

    return cached
