"""The verbs between our checkpoints and other people's files: import, to-hf."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from qforge.console import Outcome, must_be_ours
from qforge.recipe import Recipe
from runtime.errors import require


def import_(source: str, out: Path, options: Mapping[str, Any]) -> Outcome:
    """A self-contained checkpoint at `out`."""
    must_be_ours(out, "metrics.json")
    require("torch", extra="train", why="Importing a model")
    from trainer.convert import ImportOptions, import_checkpoint

    imported = import_checkpoint(source, out, ImportOptions(**options), lambda model: Recipe(model=model).to_yaml())
    for note in imported.notes:
        print(note, file=sys.stderr)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    model = imported.model
    data = {
        "checkpoint": str(out),
        "stage": imported.stage,
        "parts": list(imported.parts),
        "bytes": size,
        "notes": imported.notes,
    }
    lines = [
        f"Checkpoint: {out} ({size / 2**20:.1f} MiB)",
        f"{model.qformer.queries} queries, {model.qformer.layers} layers of width {model.qformer.width}; parts: "
        f"{', '.join(imported.parts)}; prompts: caption {model.caption_prompt!r}, question {model.vqa_prompt!r}",
        f"Next: qforge export {out} --out BUNDLE --precision fp32 --calibration FILE",
    ]
    return Outcome(data, "\n".join(lines))


def to_hf(checkpoint: Path, out: Path, kind: Literal["caption", "retrieval", "instruct"] | None) -> Outcome:
    """A folder for transformers at `out`."""
    must_be_ours(out, "qforge.json")
    require("torch", extra="train", why="Converting a checkpoint")
    from trainer.convert import write_hf
    from trainer.convert.to_hf import ARCHITECTURES

    written = write_hf(checkpoint, out, kind)
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    architecture = ARCHITECTURES[written.kind]
    data = {"out": str(out), "architecture": architecture, "beside": written.beside, "notes": written.notes}
    return Outcome(data, f"{architecture}: {out} ({len(written.beside)} tensors beside it, in qforge.safetensors)")
