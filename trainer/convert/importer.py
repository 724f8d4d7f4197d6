"""`qforge import`: a published model becomes a checkpoint of ours, whole or not at all."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from runtime.errors import CheckpointError, InputError, MissingFile
from trainer.bridge import PARTS, Part, part_of
from trainer.checkpoint import WEIGHTS, read_config
from trainer.config import ModelConfig
from trainer.convert.hf import read_hf
from trainer.convert.lavis import read_lavis
from trainer.convert.model import Imported, merged, self_contained, write_imported
from trainer.convert.options import ImportOptions
from trainer.convert.side import SIDE, read_side
from trainer.convert.stream import read_safetensors

TEXT_PARTS: tuple[Part, ...] = ("text", "contrast", "matching", "generation", "temperature")
SAME_SIZES = (
    "queries",
    "width",
    "layers",
    "heads",
    "ffn_width",
    "cross_attention_frequency",
    "layer_norm_eps",
    "activation",
)
"""What two Q-Formers must share for the text branch of one to fit the other."""


def import_checkpoint(
    source: str, out: Path, options: ImportOptions, recipe_yaml: Callable[[ModelConfig], str]
) -> Imported:
    """Read `source` and write the self-contained checkpoint `out`.

    Args:
        source: Hugging Face folder, folder of `qforge to-hf`, LAVIS `.pth`, or the hub id of a Hugging Face folder.
        out: Checkpoint folder; an older checkpoint of that name is replaced.
        options: What the source does not say.
        recipe_yaml: The recipe that fits a model, as text; kept in the checkpoint.

    Raises:
        InputError, MissingFile, CheckpointError: see `read_hf` and `read_lavis`; nothing is written then.
    """
    path = Path(source)
    if not path.exists():
        path = _from_hub(source)
    _require_apart(path, out)
    if (path / SIDE).is_file():
        options.refuse_folders(f"{path} holds its own halves")
        imported = read_side(path, options)
    elif path.is_dir():
        imported = read_hf(path, options)
    else:
        imported = read_lavis(path, options)
    if options.text_from is not None:
        imported = with_text_branch(imported, options.text_from)
    write_imported(imported, out, recipe_yaml)
    return imported


def with_text_branch(imported: Imported, donor: Path) -> Imported:
    """The model with the text branch (and its tokenizer) of the checkpoint `donor`.

    Raises:
        InputError: the model has a text branch already.
        CheckpointError: the donor has none, or its Q-Former has other sizes.
    """
    if "text" in imported.parts:
        raise InputError("--text-from: this model has a text branch of its own; leave the option out")
    config = read_config(donor)
    if "text" not in config.parts:
        raise CheckpointError(f"--text-from {donor}: expected a checkpoint with a text branch, found one without")
    ours, theirs = imported.model.qformer, config.model.qformer
    for name in SAME_SIZES:
        if getattr(ours, name) != getattr(theirs, name):
            raise CheckpointError(
                f"--text-from {donor}: expected a Q-Former with {name} {getattr(ours, name)}, found "
                f"{getattr(theirs, name)}; the two share layers and must be of one size"
            )
    given = tuple(part for part in TEXT_PARTS if part in config.parts and part not in imported.parts)
    weights = read_safetensors(donor / WEIGHTS)
    pieces = {key: piece for key, piece in weights.items() if part_of(key) in given}
    rows = weights["embeddings.word_embeddings.weight"].shape[0]
    taken = ("text_positions", "contrastive_width", "max_text_tokens")
    qformer = ours.model_copy(update={name: getattr(theirs, name) for name in taken} | {"vocabulary": rows})
    sources = self_contained(imported.language is not None, True)
    return replace(
        imported,
        model=imported.model.model_copy(update={"qformer": qformer, **sources}),
        parts=tuple(part for part in PARTS if part in (*imported.parts, *given)),
        bridge=merged(imported.bridge, pieces),
        text_tokenizer=partial(shutil.copytree, donor / "text_tokenizer", dirs_exist_ok=True),
    )


def _require_apart(source: Path, out: Path) -> None:
    """The result replaces `out` whole; it must not be what is read, nor hold it."""
    source, out = source.resolve(), out.resolve()
    if source == out or out in source.parents:
        raise InputError(f"{out}: --out would replace the source {source}; choose another folder")


def _from_hub(source: str) -> Path:
    """Fetch a folder from the hub, saying so; InputError when `source` is no hub id or the hub is out of reach."""
    from huggingface_hub import list_repo_files, snapshot_download

    if source.count("/") != 1 or source.startswith((".", "/", "~")) or source.endswith((".pth", ".pt", ".bin")):
        raise MissingFile(
            f"{source}: expected a Hugging Face folder, a LAVIS .pth or a hub id (owner/name), found nothing"
        )
    print(f"{source} is no folder here; fetching it from the hub", file=sys.stderr, flush=True)
    try:
        safe = any(name.endswith(".safetensors") for name in list_repo_files(source))
        wanted = ["*.json", "*.txt", "*.model", "*.safetensors" if safe else "*.bin"]
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # the hub's client and the network below it raise what they like
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: no such folder here, and the hub did not give it ({reason}); fetch it where there is a "
            f"network, then give its folder"
        ) from error
