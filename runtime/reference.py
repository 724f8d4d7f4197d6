"""reference.npz: what eager PyTorch gave for a few inputs, so that a device can check its engines without torch.

The layout is defined here, by its reader; the exporter writes it with `write_reference`. One key per array:

    graph/<name>/<case>/in/<input>      graph/<name>/<case>/out/<output>      graph/<name>/<case>/tolerance/<output>
    chain/pixels [n,3,H,W]    chain/prompt_ids, chain/question_ids, chain/token_ids [n,T] (rows filled up with -1)
    chain/max_new_tokens      chain/tolerance
    retrieval/pixels [n,3,H,W]    retrieval/text_ids [n,T]    retrieval/itc [n]    retrieval/match_logits [n,2]
    retrieval/tolerance

A bundle that only searches has no `chain`, one that only answers no `retrieval`.
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


@dataclass(frozen=True)
class RetrievalCase:
    """Recorded scores of the whole way from pixels and tokens, row by row."""

    pixels_BCHW: npt.NDArray[np.float32]
    texts: tuple[tuple[int, ...], ...]
    """Q-Former ids of each row's text."""
    itc_B: npt.NDArray[np.float32]
    """Eager's largest cosine."""
    match_logits_B2: npt.NDArray[np.float32]
    """Eager's ITM logits."""
    tolerance: float
    """Largest error allowed of either, as a fraction of eager's largest value."""


def write_reference(
    path: Path, cases: Sequence[GraphCase], chain: ChainCase | None, retrieval: RetrievalCase | None = None
) -> None:
    """Write reference.npz."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    if chain is not None:
        arrays |= {
            "chain/pixels": chain.pixels_BCHW,
            "chain/prompt_ids": _filled(chain.prompts),
            "chain/question_ids": _filled([ids or () for ids in chain.questions]),
            "chain/token_ids": _filled(chain.token_ids),
            "chain/max_new_tokens": np.array(chain.max_new_tokens, np.int64),
            "chain/tolerance": np.array(chain.tolerance, np.float64),
        }
    if retrieval is not None:
        arrays |= {
            "retrieval/pixels": retrieval.pixels_BCHW,
            "retrieval/text_ids": _filled(retrieval.texts),
            "retrieval/itc": retrieval.itc_B,
            "retrieval/match_logits": retrieval.match_logits_B2,
            "retrieval/tolerance": np.array(retrieval.tolerance, np.float64),
        }
    for case in cases:
        head = f"graph/{case.graph}/{case.case}"
        arrays |= {f"{head}/in/{name}": array for name, array in case.inputs.items()}
        arrays |= {f"{head}/out/{name}": array for name, array in case.outputs.items()}
        arrays |= {f"{head}/tolerance/{name}": np.array(value, np.float64) for name, value in case.tolerances.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reference:
    """What reference.npz holds."""

    cases: list[GraphCase]
    chain: ChainCase | None
    """None in a bundle that only searches."""
    retrieval: RetrievalCase | None
    """None in a bundle that only answers."""


def read_reference(path: Path) -> Reference:
    """Read reference.npz; BundleError when it is not one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, npt.NDArray[Any]] = dict(file)
        reference = Reference(
            _graph_cases(arrays),
            _chain(arrays) if "chain/pixels" in arrays else None,
            _retrieval(arrays) if "retrieval/pixels" in arrays else None,
        )
        if reference.chain is None and reference.retrieval is None:
            raise KeyError("nothing recorded")
        return reference
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise BundleError(f"{path}: expected recorded eager results, found other data; export again") from error


def _chain(arrays: dict[str, npt.NDArray[Any]]) -> ChainCase:
    return ChainCase(
        pixels_BCHW=arrays["chain/pixels"],
        prompts=_rows(arrays["chain/prompt_ids"]),
        questions=tuple(ids or None for ids in _rows(arrays["chain/question_ids"])),
        token_ids=_rows(arrays["chain/token_ids"]),
        max_new_tokens=int(arrays["chain/max_new_tokens"]),
        tolerance=float(arrays["chain/tolerance"]),
    )


def _retrieval(arrays: dict[str, npt.NDArray[Any]]) -> RetrievalCase:
    return RetrievalCase(
        pixels_BCHW=arrays["retrieval/pixels"],
        texts=_rows(arrays["retrieval/text_ids"]),
        itc_B=arrays["retrieval/itc"],
        match_logits_B2=arrays["retrieval/match_logits"],
        tolerance=float(arrays["retrieval/tolerance"]),
    )


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
