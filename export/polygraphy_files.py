"""The recorded runs of a bundle as files that Polygraphy reads, to compare any engine with eager PyTorch.

    qforge verify runs/demo/bundle-fp32 --polygraphy recorded

One pair per graph and case: `GRAPH-CASE.inputs.json` for `--load-inputs`, `GRAPH-CASE.outputs.json` for
`--load-outputs`. Polygraphy's own functions write them.
"""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import require
from runtime.files import atomic_folder
from runtime.reference import REFERENCE, GraphCase, read_reference

COMMANDS = "commands.sh"
"""One command per pair; also what tells our folders from others'."""
RUNNER = "eager-pytorch"
"""Whose outputs these are, as Polygraphy shows it."""


def write_polygraphy_files(bundle: Bundle, out: Path) -> list[str]:
    """Write the folder `out`, an older one of ours replaced; returns the command for every graph and case.

    Raises:
        InputError: `out` holds foreign files.
        BackendUnavailable: polygraphy is not installed.
        BundleError: nothing is recorded in the bundle.
    """
    polygraphy_json: Any = require("polygraphy.json", extra="export", why="Writing files for Polygraphy")
    comparator: Any = require("polygraphy.comparator", extra="export", why="Writing files for Polygraphy")
    cases, commands = read_reference(bundle.file(REFERENCE)).cases, list[str]()
    with atomic_folder(out, replaces=COMMANDS) as folder:
        for case in cases:
            name = f"{case.graph}-{case.case}"
            polygraphy_json.save_json([case.inputs], str(folder / f"{name}.inputs.json"))
            results = comparator.RunResults()
            results.add([case.outputs], runner_name=RUNNER)
            results.save(str(folder / f"{name}.outputs.json"))
            commands.append(_command(bundle, case, out / name))
        (folder / COMMANDS).write_text("\n".join(["#!/bin/sh", "set -e", *commands]) + "\n", encoding="utf-8")
    return commands


def _command(bundle: Bundle, case: GraphCase, name: Path) -> str:
    """Compare the graph under ONNX Runtime; `--trt` in place of `--onnxrt` asks TensorRT.

    Our tolerance is a fraction of the largest value of an output, Polygraphy's `--atol` is absolute.
    """
    allowed = [
        f"{output}:{case.tolerances[output] * (float(np.abs(array).max(initial=0.0)) or 1.0):.3g}"
        for output, array in case.outputs.items()
    ]
    words = [
        *("polygraphy", "run", str(bundle.graph(case.graph)), "--onnxrt"),
        *("--load-inputs", f"{name}.inputs.json", "--load-outputs", f"{name}.outputs.json"),
        *("--atol", *allowed, "--rtol", "0"),
    ]
    return shlex.join(words)
