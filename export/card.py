"""The bundle's README.md: what it is, how it was made, how large it is, how far from eager PyTorch, how to run it.

Every figure is read from the manifest or from the verification that has just passed.
"""

from collections.abc import Mapping

from export.verify import Verdict
from runtime.manifest import Manifest


def card(manifest: Manifest, verdict: Verdict, checkpoint_stage: str) -> str:
    """Markdown text."""
    model, limits, prompts = manifest.model, manifest.limits, manifest.prompts
    reads = f"reads the {model.qformer_reads}" if model.question_conditioned else "does not read the question"
    rows = verdict.captions + verdict.questions
    return f"""# qforge bundle, {manifest.precision}

A BLIP-2-style model (image encoder, Q-Former, projection, language model) as ONNX graphs that run without PyTorch.

- Checkpoint: trained up to `{checkpoint_stage}`, SHA-256 `{manifest.made_by["checkpoint"]}`
- Vision graph and Q-Former: {manifest.precision}. Language model: {manifest.language_precision}. Token embedding: fp32.
- Language model: {model.style}.
- {model.queries} queries of width {model.qformer_width}; language width {model.language_width}; the Q-Former {reads}.
- Images: {manifest.preprocess.height} x {manifest.preprocess.width} pixels, {manifest.preprocess.resample}
- Limits: {limits.max_batch} requests a batch, {limits.max_positions} positions, {limits.max_new_tokens} new tokens
- Prompts: caption `{prompts.caption!r}`, question `{prompts.vqa!r}`

## Run it

```bash
qforge caption . photo.jpg
qforge vqa . photo.jpg "what colour is the circle?"
qforge verify .
```

```python
import runtime

with runtime.load(".") as pipeline:
    print(pipeline.caption("photo.jpg")[0].text)
```

## Size

{_sizes(manifest)}

## Distance from eager PyTorch

Measured on {verdict.images} real images ({verdict.captions} captions, {verdict.questions} questions) with onnxruntime
on a CPU. Error is the largest difference as a fraction of the largest value. A bundle that misses a tolerance is never
written; all outputs are in `parity.json`.

{_parities(verdict)}

Greedy answers equal to eager PyTorch, token for token: {verdict.equal_answers} of {rows}.

## Made by

{_versions(manifest.made_by)}
"""


def _sizes(manifest: Manifest) -> str:
    lines = ["| graph | MiB | inputs | outputs |", "|---|---|---|---|"]
    for name, graph in manifest.graphs.items():
        size_bytes = graph.bytes + (graph.data.bytes if graph.data else 0)
        inputs, outputs = (_some(names) for names in (graph.inputs, graph.outputs))
        lines.append(f"| {name} | {size_bytes / 2**20:.2f} | {inputs} | {outputs} |")
    return "\n".join(lines)


def _some(names: Mapping[str, object]) -> str:
    """The first names; a cache has two tensors per layer."""
    first = list(names)[:3]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


def _parities(verdict: Verdict) -> str:
    """The worst output of each graph and case."""
    lines = [
        "| graph | case | precision | worst output | error | allowed | cosine | needed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for graph, case in dict.fromkeys((parity.graph, parity.case) for parity in verdict.parities):
        of_case = [parity for parity in verdict.parities if (parity.graph, parity.case) == (graph, case)]
        worst = max(of_case, key=lambda parity: parity.max_error)
        cosine = min(parity.cosine for parity in of_case)
        lines.append(
            f"| {graph} | {case} | {worst.precision} | {worst.output} | {worst.max_error:.1e} | "
            f"{worst.allowed_error:.1e} | {cosine:.6f} | {worst.allowed_cosine:g} |"
        )
    return "\n".join(lines)


def _versions(made_by: Mapping[str, str]) -> str:
    return "\n".join(f"- {name} {version}" for name, version in made_by.items() if name != "checkpoint")
