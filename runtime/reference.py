"""reference.npz: what eager PyTorch gave for a few inputs, so that a device can check its engines without torch.

The layout is defined here, by its reader; the exporter writes it with `write_reference`. One key per array:

    graph/<name>/<case>/in/<input>      graph/<name>/<case>/out/<output>      graph/<name>/<case>/tolerance/<output>
    chain/pixels [n,3,H,W]    chain/prompt_ids, chain/question_ids, chain/token_ids [n,T] (rows filled up with -1)
    chain/max_new_tokens      chain/tolerance
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.errors import BundleError

REFERENCE = "reference.npz"
FILL = -1
"""Fills rows of ids that are shorter than the longest; never a token."""


@dataclass(frozen=True)
class GraphCase:
    """One recorded run of one graph."""

    graph: str
    case: str
    """Tells several runs of a graph apart: "prefill", "step" …"""
    inputs: dict[str, npt.NDArray[Any]]
    outputs: dict[str, npt.NDArray[Any]]
    """Eager's."""
    tolerances: dict[str, float]
    """Output → largest error allowed, as a fraction of the largest value in eager's output."""


@dataclass(frozen=True)
class ChainCase:
    """Recorded greedy answers of the whole chain."""

    pixels_BCHW: npt.NDArray[np.float32]
    prompts: tuple[tuple[int, ...], ...]
    """Prompt ids of the language model, row by row."""
    questions: tuple[tuple[int, ...] | None, ...]
    """Question ids of the Q-Former, row by row; None for a caption."""
    token_ids: tuple[tuple[int, ...], ...]
    """Eager's greedy answers, end token excluded."""
    max_new_tokens: int
    tolerance: float
    """Largest fraction of rows whose tokens may differ: 0 for fp32."""


def write_reference(path: Path, cases: Sequence[GraphCase], chain: ChainCase) -> None:
    """Write reference.npz."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "chain/pixels": chain.pixels_BCHW,
        "chain/prompt_ids": _filled(chain.prompts),
        "chain/question_ids": _filled([ids or () for ids in chain.questions]),
        "chain/token_ids": _filled(chain.token_ids),
        "chain/max_new_tokens": np.array(chain.max_new_tokens, np.int64),
        "chain/tolerance": np.array(chain.tolerance, np.float64),
    }
    for case in cases:
        head = f"graph/{case.graph}/{case.case}"
        arrays |= {f"{head}/in/{name}": array for name, array in case.inputs.items()}
        arrays |= {f"{head}/out/{name}": array for name, array in case.outputs.items()}
        arrays |= {f"{head}/tolerance/{name}": np.array(value, np.float64) for name, value in case.tolerances.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_reference(path: Path) -> tuple[list[GraphCase], ChainCase]:
    """Read reference.npz; BundleError when it is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, npt.NDArray[Any]] = dict(file)
        chain = ChainCase(
            pixels_BCHW=arrays["chain/pixels"],
            prompts=_rows(arrays["chain/prompt_ids"]),
            questions=tuple(ids or None for ids in _rows(arrays["chain/question_ids"])),
            token_ids=_rows(arrays["chain/token_ids"]),
            max_new_tokens=int(arrays["chain/max_new_tokens"]),
            tolerance=float(arrays["chain/tolerance"]),
        )
        return _graph_cases(arrays), chain
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{path}: expected recorded eager results, found other data; export again") from error


def _graph_cases(arrays: dict[str, npt.NDArray[Any]]) -> list[GraphCase]:
    cases: dict[tuple[str, str], GraphCase] = {}
    for key, array in arrays.items():
        if not key.startswith("graph/"):
            continue
        _, graph, name, kind, tensor = key.split("/", 4)
        case = cases.setdefault((graph, name), GraphCase(graph, name, {}, {}, {}))
        if kind == "tolerance":
            case.tolerances[tensor] = float(array)
        else:
            (case.inputs if kind == "in" else case.outputs)[tensor] = array
    return list(cases.values())


def _filled(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    ids_BT = np.full((len(rows), max(map(len, rows))), FILL, np.int64)
    for row, ids in enumerate(rows):
        ids_BT[row, : len(ids)] = ids
    return ids_BT


def _rows(ids_BT: npt.NDArray[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(token) for token in row if token != FILL) for row in ids_BT)
