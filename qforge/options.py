"""What the verbs of the command line share: the command itself, and options that several of them have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

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
Stage = Literal["stage1", "stage2", "vqa"]
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
Backend = Annotated[str, typer.Option(help="Engine that runs the graphs; `qforge doctor` lists what is here.")]
ProviderName = Annotated[
    Provider, typer.Option("--provider", help="What computes under backend ort; never another one silently.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; without it, one per physical core.")]
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
