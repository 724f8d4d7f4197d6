"""The verb that finds the fastest way of running a bundle here.

As in qforge/cli.py, nothing heavy is imported here.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qforge.console import Outcome, verb
from qforge.options import app


@verb(
    app,
    "tune",
    "qforge tune runs/demo/bundle-fp32 runs/demo/bundle-int8 --max-drop 1 \\\n"
    "    --data runs/demo/data/vqa_val.jsonl --limit 100",
)
def tune(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="A bundle, or several of one checkpoint.")],
    max_drop: Annotated[
        float, typer.Option(help="Points (percent) that may be lost against the FP32 bundle, or the first one.")
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Held-out manifest; without it, the answers of PyTorch in the bundle."
        ),
    ] = None,
    task: Annotated[
        Literal["caption", "vqa"] | None,
        typer.Option(help="What is asked of the images; without it, vqa where rows have questions."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows measured, from the first on; without it, all.")] = None,
) -> Outcome:
    """Find the fastest way to run bundles here.

    Every back-end, provider and thread count that this machine has answers the same requests in turn. Each bundle
    keeps its fastest that loses no more than --max-drop, and every verb without --backend, --provider and --threads,
    and `qforge.load` without them, then runs it so on this machine.
    """
    from qforge import verbs_tune

    return verbs_tune.tune(bundles, max_drop, manifest, task, limit)
