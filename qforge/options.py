"""What the verbs of the command line share: the command itself, and options that several of them have."""

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qforge.console import Outcome, Verb

if TYPE_CHECKING:
    from runtime.decoding import Decoding

app = typer.Typer(
    name="qforge",
    help="Train a BLIP-2-style model, export it, and run it without PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data = typer.Typer(help="Data sets: check one, or draw the demo world.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data")

Task = Literal["caption", "vqa", "retrieval"]
Stage = Literal["stage1", "stage2", "caption", "vqa", "retrieval"]
Heads = Literal["generate", "retrieval", "both"]
Dtype = Literal["float16", "float32"]
Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, such as recipes/demo.yaml.")]
RunFolder = Annotated[Path, typer.Option("--out", help="Folder of the run; the same folder again goes on.")]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `qforge export` made.")]
CheckpointFolder = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder.")]
EitherFolder = Annotated[Path, typer.Argument(metavar="BUNDLE|CKPT", help="Bundle, or checkpoint folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, such as stage1.steps=50; repeatable."),
]
Init = Annotated[
    Path | None,
    typer.Option(metavar="CKPT", help="Checkpoint to begin from, with its model; the stages behind it are left out."),
]
Backend = Annotated[
    str | None, typer.Option(help="ort, or trt for plans on a GPU; without it, what qforge tune found, or ort.")
]
ProviderName = Annotated[
    Provider | None,
    typer.Option("--provider", help="What computes under backend ort (cpu); never another one silently."),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; without it, one per physical core, or as tuned.")]
Prompt = Annotated[str | None, typer.Option(help="Replaces the bundle's prompt; {} is the question.")]
Candidates = Annotated[
    int, typer.Option(help="Best of the contrastive ranking that matching looks at again; 0: none, which is fastest.")
]
ImageSize = Annotated[
    int | None, typer.Option(help="Side that images are read at (pixels), one the bundle has; without it, as trained.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the images seen so far, shared by processes; see qforge cache --help."),
]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest text (tokens); without it, the bundle's own limit.")]
Stream = Annotated[bool, typer.Option("--stream", help="Print text as it is said; with --json a line per token.")]

DECODING: dict[str, Any] = {
    "num_beams": Annotated[int | None, typer.Option(help="Beam search with so many hypotheses.")],
    "length_penalty": Annotated[float | None, typer.Option(help="Beams: above 0 favours long texts (1.0).")],
    "early_stopping": Annotated[
        Literal["true", "false", "never"] | None,
        typer.Option(help="Beams: end with the first finished ones, when better is unlikely (false), or impossible."),
    ],
    "no_repeat_ngram_size": Annotated[int | None, typer.Option(help="No run of so many tokens is said twice.")],
    "repetition_penalty": Annotated[float | None, typer.Option(help="Above 1: what was said becomes less likely.")],
    "min_new_tokens": Annotated[int | None, typer.Option(help="Shortest text (tokens).")],
    "do_sample": Annotated[bool | None, typer.Option("--do-sample", help="Draw tokens by their probability.")],
    "temperature": Annotated[float | None, typer.Option(help="Sampling: below 1 sharpens the odds (1.0).")],
    "top_k": Annotated[int | None, typer.Option(help="Sampling: draw among so many likeliest; 0: all (50).")],
    "top_p": Annotated[float | None, typer.Option(help="Sampling: draw among the likeliest of this total (1.0).")],
    "seed": Annotated[int | None, typer.Option(help="Sampling: the same seed draws the same text.")],
    "num_return_sequences": Annotated[int | None, typer.Option(help="Texts per image, of beams or draws.")],
    "stop_strings": Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End behind this text; repeatable.")],
}
"""Option → what it means: transformers' names, the fields of `runtime.decoding.Decoding`. Unsaid ones are None."""


def decodes(function: Verb) -> Verb:
    """Give a verb every option of DECODING; they reach it as one value, its argument `decoding`."""
    own = inspect.signature(function)
    others = [parameter for name, parameter in own.parameters.items() if name != "decoding"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in DECODING.items()
    ]

    @functools.wraps(function)
    def with_decoding(**arguments: Any) -> Outcome:
        said = {name: arguments.pop(name) for name in DECODING}
        return function(**arguments, decoding=_decoding(said))

    with_decoding.__signature__ = own.replace(parameters=[*others, *options])  # type: ignore[attr-defined]
    return with_decoding


def _decoding(said: dict[str, Any]) -> "Decoding":
    """What the flags say; InputError with one sentence for what contradicts itself."""
    from runtime.decoding import Decoding  # here, so that --help stays light

    given = {name: value for name, value in said.items() if value is not None}
    if given.get("early_stopping") in ("true", "false"):
        given["early_stopping"] = given["early_stopping"] == "true"
    if "stop_strings" in given:
        given["stop_strings"] = tuple(given["stop_strings"])
    return Decoding(**given)
