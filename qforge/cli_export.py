"""The verbs that make something of a checkpoint or a bundle: export, calibrate, build, prepare, export-triton.

As in qforge/cli.py, nothing heavy is imported here.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qforge.console import Outcome, verb
from qforge.options import BundleFolder, CheckpointFolder, Heads, Overrides, app
from runtime.precision import LanguagePrecision, Precision, RangeMethod, Target

Engine = Literal["tensorrt", "tensorrt-rtx"]
Hardware = Literal["none", "ampere-plus", "same-compute-capability"]
GateTask = Literal["caption", "vqa", "retrieval", "agreement"]


@verb(app, "export", "qforge export runs/demo/checkpoint --out bundle --precision int8 --calibration vqa_train.jsonl")
def export(
    checkpoint: CheckpointFolder,
    out: Annotated[Path, typer.Option("--out", help="Bundle folder to write.")],
    precision: Annotated[Precision, typer.Option(help="Numeric type of the vision graph and the Q-Former.")],
    calibration: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="Manifest of real images: ranges, verification. May be repeated."),
    ],
    language_precision: Annotated[
        LanguagePrecision | None, typer.Option(help="Of the language model; without it, the recipe's.")
    ] = None,
    target: Annotated[
        Target | None, typer.Option(help="Who will run the graphs; without it, the recipe's, which is ONNX Runtime.")
    ] = None,
    range_method: Annotated[
        RangeMethod | None, typer.Option(help="How INT8 and FP8 ranges are found; without it, the recipe's.")
    ] = None,
    heads: Annotated[
        Heads | None,
        typer.Option(help="What it can do: caption and vqa, index and search; without it, what was trained last."),
    ] = None,
    static_cache: Annotated[
        bool, typer.Option("--static-cache", help="Also a decoder with a fixed-size cache, for TensorRT; fp16, bf16.")
    ] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="Also a graph for captions with vision and Q-Former in one; larger bundle.")
    ] = False,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="Bundle whose unchanged graphs are copied; an older --out serves too."),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="Images that ranges are measured on; fewer in FILE is an error.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Points (percent) that may be lost against PyTorch; nodes are put back until it holds."),
    ] = None,
    gate_data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Manifest of held-out items that --max-drop is measured on.")
    ] = None,
    gate_task: Annotated[
        GateTask | None, typer.Option(help="What is measured; agreement: greedy answers that are PyTorch's.")
    ] = None,
    gate_items: Annotated[int | None, typer.Option(help="Items at most, chosen by seed.")] = None,
    gate_plot: Annotated[
        bool | None, typer.Option(help="pareto.png of all candidates; without it, where matplotlib is installed.")
    ] = None,
    overrides: Overrides = None,
) -> Outcome:
    """Write a bundle from a checkpoint.

    It is verified against PyTorch first; nothing is written when it misses a tolerance, or loses more accuracy than
    --max-drop allows. Ends with the size and latency of every graph on this machine. Settings are those of the recipe
    in the checkpoint. FILE may also be the calibration.json of `qforge calibrate` or of another bundle: the very same
    images are taken again.
    """
    from qforge import verbs_bundle

    options = {
        "language_precision": language_precision,
        "target": target,
        "range_method": range_method,
        "heads": heads,
        "static_cache": static_cache or None,
        "fused": fused or None,
        "calibration_images": calibration_images,
        "gate.max_drop": max_drop,
        "gate.data": gate_data,
        "gate.task": gate_task,
        "gate.items": gate_items,
        "gate.plot": gate_plot,
    }
    return verbs_bundle.export(checkpoint, out, precision, calibration, reuse, options, overrides or [])


@verb(
    app, "calibrate", "qforge calibrate runs/demo/checkpoint --data vqa_train.jsonl --images 128 --out calibration.json"
)
def calibrate(
    checkpoint: CheckpointFolder,
    data: Annotated[
        list[Path], typer.Option("--data", metavar="FILE", help="Manifest of real images. May be repeated.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Record to write; an older one is replaced.")],
    images: Annotated[
        int | None, typer.Option(help="Images, chosen by seed; without it, the recipe's. Fewer in FILE is an error.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the choice; without it, the recipe's.")] = None,
    method: Annotated[
        RangeMethod | None, typer.Option(help="How a range follows from the values seen; without it, the recipe's.")
    ] = None,
    heads: Annotated[Heads | None, typer.Option(help="Graphs to measure: those that answer, search, or both.")] = None,
    overrides: Overrides = None,
) -> Outcome:
    """Measure activation ranges on real images.

    Writes which images, their hashes and the ranges; `qforge export --calibration` takes the record up.
    """
    from qforge import verbs_bundle

    options = {"calibration_images": images, "seed": seed, "range_method": method, "heads": heads}
    return verbs_bundle.calibrate(checkpoint, data, out, options, overrides or [])


@verb(
    app,
    "build",
    "qforge build bundle-fp16 --engine tensorrt-rtx --compute-capability 8.6 --compute-capability 8.9",
)
def build(
    bundle: BundleFolder,
    engine: Annotated[
        Engine, typer.Option(help="Builder: tensorrt for the GPU here, tensorrt-rtx for RTX cards, also without a GPU.")
    ],
    capabilities: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            metavar="N.N",
            help="GPU that the plans must run on; repeatable. Without it: the GPU here, or RTX cards from 8.6 on.",
        ),
    ] = None,
    graphs: Annotated[
        list[str] | None, typer.Option("--graph", metavar="NAME", help="Graph to build; repeatable. Without it, all.")
    ] = None,
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", help="Batch with kernels of its own; repeatable. Without it: 1, 2, 4 … to the limit."),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 (fastest build) to 5 (fastest plan); without it, the builder's own.")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Weights may stay in host memory, for a GPU too small for them.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Plans that newer TensorRT of the same major version loads.")
    ] = False,
    hardware_compatibility: Annotated[
        Hardware, typer.Option(help="TensorRT: GPUs that may run the plans besides the one here.")
    ] = "none",
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TensorRT: kernel timings, read and written again.")
    ] = None,
    workspace_mib: Annotated[int | None, typer.Option(help="Scratch memory of a layer on the GPU (MiB).")] = None,
) -> Outcome:
    """Build engines from a bundle's graphs.

    Numeric types are those of the graphs. What a GPU cannot do is refused before anything is built; plans appear in
    the bundle's engines/ when all are finished.
    """
    from qforge import verbs_build

    options = {
        "optimization_level": optimization_level,
        "weight_streaming": weight_streaming,
        "version_compatible": version_compatible,
        "hardware_compatibility": hardware_compatibility,
        "workspace_mib": workspace_mib,
    }
    return verbs_build.build(bundle, engine, capabilities or [], graphs or [], batches or [], timing_cache, options)


@verb(app, "prepare", "qforge prepare runs/demo/bundle-int8")
def prepare(bundle: BundleFolder) -> Outcome:
    """Prepare a bundle's graphs for this machine's processor.

    A bundle then opens faster, takes less memory, and processes share its weights; answers stay the same. Takes disk:
    about twice the graphs. Kept in the bundle's prepared/, used only where it fits.
    """
    from qforge import verbs_build

    return verbs_build.prepare(bundle)


@verb(app, "export-triton", "qforge export-triton runs/demo/bundle-fp32 --out models --max-batch 8")
def export_triton(
    bundle: BundleFolder,
    out: Annotated[Path, typer.Option("--out", help="Model repository to write; an older one of ours is replaced.")],
    engine: Annotated[
        Literal["onnxruntime", "tensorrt"],
        typer.Option(help="What runs the graphs: the ONNX files, or the plans that `qforge build` made."),
    ] = "onnxruntime",
    max_batch: Annotated[
        int | None, typer.Option(help="Largest batch that Triton joins; without it, the bundle's limit.")
    ] = None,
    instances: Annotated[int, typer.Option(help="Copies of every model that run side by side.")] = 1,
) -> Outcome:
    """Write a bundle as a Triton model repository.

    One model per graph, and one that chains them: image and question in, text out.
    """
    from qforge import verbs_bundle

    return verbs_bundle.export_triton(bundle, out, engine, max_batch, instances)
