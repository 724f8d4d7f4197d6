"""The bundle's README.md: what it is, how it was made, how large it is, how far from eager PyTorch, how to run it.

Every figure is read from the manifest or from the verification that has just passed.
"""

import platform
from collections.abc import Mapping, Sequence

from export.gate.gate import Gate, story
from export.judge import Parity
from export.latency import Timing, table
from export.verdicts import Verdicts
from runtime.cores import physical_cores
from runtime.manifest import Manifest


def card(
    manifest: Manifest,
    verdict: Verdicts,
    checkpoint_stage: str,
    timings: Sequence[Timing],
    probed: Mapping[str, int],
    gate: Gate | None = None,
) -> str:
    """Markdown text; `probed` says how often each graph ran on extreme inputs."""
    parts = "image encoder, Q-Former" + (", projection, language model" if verdict.answers else "")
    return f"""# qforge bundle, {manifest.precision}

A BLIP-2-style model ({parts}) as ONNX graphs that run without PyTorch.

{_facts(manifest, checkpoint_stage)}

## Run it

{_usage(verdict)}

## Size and latency

{_measured(timings)}

{table(manifest, timings)}

## Inputs and outputs

{_tensors(manifest)}

## Distance from eager PyTorch

Measured with onnxruntime on a CPU, on {_measured_on(verdict)}. Error is the largest difference as a fraction of the
largest value. A bundle that misses a tolerance is never written; all outputs are in `parity.json`.

{_parities(verdict.parities)}

{_outcome(verdict)}

Every graph also ran on black, white and saturated images, the longest prompt and no question ({sum(probed.values())}
runs), and gave finite numbers.
{_gate(gate)}
## Made by

{_versions(manifest.made_by)}
"""


def _facts(manifest: Manifest, checkpoint_stage: str) -> str:
    model, limits, prompts = manifest.model, manifest.limits, manifest.prompts
    lines = [
        f"Checkpoint: trained up to `{checkpoint_stage}`, SHA-256 `{manifest.made_by['checkpoint']}`",
        f"Vision graph and Q-Former: {manifest.precision}."
        + (f" Language model: {manifest.language_precision}. Token embedding: fp32." if model.language_width else ""),
        f"{model.queries} queries of width {model.qformer_width}",
        f"Images: {manifest.preprocess.height} x {manifest.preprocess.width} pixels, {manifest.preprocess.resample}"
        + "".join(f"; {side} x {side} with `--image-size {side}`" for side in limits.image_sizes),
    ]
    if limits.max_text_tokens:
        lines.append(f"Searching: texts of up to {limits.max_text_tokens} tokens, {limits.max_batch} pairs a batch")
    if model.language_width:
        reads = f"reads the {model.qformer_reads}" if model.question_conditioned else "does not read the question"
        lines += [
            f"Answering: {model.style} language model of width {model.language_width}; the Q-Former {reads}.",
            f"Limits: {limits.max_batch} requests a batch, {limits.max_positions} positions, "
            f"{limits.max_new_tokens} new tokens",
            f"Prompts: caption `{prompts.caption!r}`, question `{prompts.vqa!r}`",
        ]
    return "\n".join(f"- {line}" for line in lines)


ANSWERING = """```bash
qforge caption . photo.jpg
qforge vqa . photo.jpg "what colour is the circle?"
qforge verify .
```

```python
import runtime

with runtime.load(".") as pipeline:
    print(pipeline.caption("photo.jpg")[0].text)
```"""
SEARCHING = """```bash
qforge index . photos/ --out photos.index
qforge search photos.index "a red circle"
qforge verify .
```"""


def _usage(verdict: Verdicts) -> str:
    return "\n\n".join([*([ANSWERING] if verdict.answers else []), *([SEARCHING] if verdict.scores else [])])


def _measured_on(verdict: Verdicts) -> str:
    found = []
    if verdict.answers:
        of = verdict.answers
        found.append(f"{of.images} real images ({of.captions} captions, {of.questions} questions)")
    if verdict.scores:
        found.append(f"{verdict.scores.pairs} pairs of {verdict.scores.images} real images with real captions")
    return " and ".join(found)


def _outcome(verdict: Verdicts) -> str:
    lines = []
    if verdict.answers:
        of = verdict.answers
        rows = of.captions + of.questions
        lines.append(f"Greedy answers equal to eager PyTorch, token for token: {of.equal_answers} of {rows}.")
    if verdict.scores:
        lines.append(
            f"Scores of whole searches: ITC cosines within {verdict.scores.itc_error:.1e} of eager PyTorch's, ITM "
            f"logits within {verdict.scores.match_error:.1e}."
        )
    return "\n\n".join(lines)


def _gate(gate: Gate | None) -> str:
    """Nothing where no drop was limited."""
    return "" if gate is None else f"\n## Accuracy gate\n\n{story(gate)}\n"


def _measured(timings: Sequence[Timing]) -> str:
    runs = min((timing.runs for timing in timings), default=0)
    return (
        f"Latency is a first figure, not a benchmark (that is `qforge bench`): the median of {runs} or more runs with "
        f"onnxruntime on {physical_cores()} CPU cores of the machine that exported ({platform.machine()}), on the "
        f"inputs recorded in `reference.npz`."
    )


def _tensors(manifest: Manifest) -> str:
    lines = ["| graph | inputs | outputs |", "|---|---|---|"]
    for name, graph in manifest.graphs.items():
        inputs, outputs = (_some(names) for names in (graph.inputs, graph.outputs))
        lines.append(f"| {name} | {inputs} | {outputs} |")
    return "\n".join(lines)


def _some(names: Mapping[str, object]) -> str:
    """The first names; a cache has two tensors per layer."""
    first = list(names)[:3]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def _parities(parities: Sequence[Parity]) -> str:
    """The worst output of each graph and case."""
    lines = [
        "| graph | case | precision | worst output | error | allowed | cosine | needed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for graph, case in dict.fromkeys((parity.graph, parity.case) for parity in parities):
        of_case = [parity for parity in parities if (parity.graph, parity.case) == (graph, case)]
        worst = max(of_case, key=lambda parity: parity.max_error)
        cosine = min(parity.cosine for parity in of_case)
        lines.append(
            f"| {graph} | {case} | {worst.precision} | {worst.output} | {worst.max_error:.1e} | "
            f"{worst.allowed_error:.1e} | {cosine:.6f} | {worst.allowed_cosine:g} |"
        )
    return "\n".join(lines)


def _versions(made_by: Mapping[str, str]) -> str:
    return "\n".join(f"- {name} {version}" for name, version in made_by.items() if name != "checkpoint")
