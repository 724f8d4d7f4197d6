"""The `qforge` command: one function per verb, which says its options and hands over.

Nothing heavy is imported here, so `qforge --help` answers at once; each verb imports the module that does the work.

    qforge run recipes/demo.yaml --out runs/demo
"""

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qforge.console import INTERRUPTED, Outcome, verb
from qforge.devices import device_for
from qforge.gone import explained
from qforge.options import (
    Backend,
    BundleFolder,
    CacheDir,
    Candidates,
    CheckpointFolder,
    EitherFolder,
    ImageSize,
    Init,
    MaxNewTokens,
    Overrides,
    Prompt,
    Provider,
    ProviderName,
    RecipeFile,
    RunFolder,
    Stage,
    Stream,
    Task,
    Threads,
    app,
    data,
    decodes,
)

if TYPE_CHECKING:
    from runtime.decoding import Decoding


@verb(app, "run", "qforge run recipes/demo.yaml --out runs/demo --set stage1.steps=200")
def run(recipe: RecipeFile, out: RunFolder, init: Init = None, overrides: Overrides = None) -> Outcome:
    """Train, export, verify, benchmark, report.

    Finished steps are skipped as long as nothing they were made from has changed.
    """
    from qforge import verbs_train

    return verbs_train.run(recipe, out, init, overrides or [])


@verb(app, "train", "qforge train recipes/demo.yaml --out runs/demo --stage stage1")
def train(
    recipe: RecipeFile,
    out: RunFolder,
    stage: Annotated[
        Stage | None,
        typer.Option(help="Train this stage, and those it goes on from when missing; without, all of the recipe."),
    ] = None,
    init: Init = None,
    overrides: Overrides = None,
) -> Outcome:
    """Train the stages in order.

    `qforge run` with the same recipe and folder goes on from there.
    """
    from qforge import verbs_train

    return verbs_train.train(recipe, out, stage, init, overrides or [])


@verb(data, "check", "qforge data check data/captions_train.jsonl")
def data_check(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Data set in any format; or a folder, or shards.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="manifest, coco, karpathy, flickr30k, vqav2, records, webdataset or huggingface; "
            "without it, told by the content.",
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to read, such as train; without it, all.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images; without it, that of FILE.")] = None,
    answers: Annotated[Path | None, typer.Option(help="VQAv2's annotations, beside its questions in FILE.")] = None,
) -> Outcome:
    """Read every row and image of a data set.

    Prints counts and problems. Exit 1 when there are problems. Reads our manifest (JSON Lines), COCO captions, Karpathy
    splits, Flickr30k, VQAv2, LAVIS and LLaVA records, webdataset tars, Hugging Face datasets.
    """
    from qforge import verbs_train

    return verbs_train.data_check(path, form, split, images, answers)


@verb(data, "demo", "qforge data demo --out world --set data.demo.train_scenes=500")
def data_demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; replaced when it holds a demo world.")],
    overrides: Overrides = None,
) -> Outcome:
    """Draw the demo world.

    Scenes of shapes with captions and questions, in the manifest format.
    """
    from qforge import verbs_train

    return verbs_train.data_demo(out, overrides or [])


@verb(app, "import", "qforge import Salesforce/blip2-opt-2.7b --out checkpoint")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Hugging Face folder or hub id of a BLIP-2, or a LAVIS .pth.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint folder to write.")],
    vision: Annotated[Path | None, typer.Option(metavar="DIR", help="LAVIS: folder of the image encoder.")] = None,
    language: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LAVIS stage 2: folder of the language model.")
    ] = None,
    text_tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="LAVIS stage 1, retrieval: folder of BERT's tokenizer.")
    ] = None,
    text_from: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="Checkpoint that gives a stage-2 model its text branch back.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the pixels; positions are interpolated.")] = None,
    vision_layer: Annotated[
        int | None, typer.Option(help="LAVIS: hidden state that is read; without it, the last (CLIP ViT-L: -2).")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="LAVIS: heads of the Q-Former; without it, width / 64.")] = None,
    caption_prompt: Annotated[str | None, typer.Option(help="Prompt of captions; without it, the source's.")] = None,
    vqa_prompt: Annotated[str | None, typer.Option(help="Prompt of answers; {} is the question.")] = None,
) -> Outcome:
    """Make a checkpoint of a published model.

    Weights are streamed and checked key by key; nothing is written when anything does not fit.
    """
    from qforge import verbs_convert

    options = {
        "vision": vision,
        "language": language,
        "text_tokenizer": text_tokenizer,
        "text_from": text_from,
        "image_size": image_size,
        "vision_layer": vision_layer,
        "heads": heads,
        "caption_prompt": caption_prompt,
        "vqa_prompt": vqa_prompt,
    }
    return verbs_convert.import_(source, out, options)


@verb(app, "to-hf", "qforge to-hf runs/mine/checkpoint --out blip2-mine")
def to_hf(
    checkpoint: CheckpointFolder,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    kind: Annotated[
        Literal["caption", "retrieval", "instruct"] | None,
        typer.Option("--as", help="Layout; without it, the one that says most about the checkpoint."),
    ] = None,
) -> Outcome:
    """Write a folder that transformers loads.

    What its layout has no place for lies beside it, and `qforge import` reads it back.
    """
    from qforge import verbs_convert

    return verbs_convert.to_hf(checkpoint, out, kind)


from qforge import cli_export  # noqa: E402, F401 - its verbs register themselves, at this place of the help


@verb(app, "verify", "qforge verify runs/demo/bundle-int8")
def verify(
    bundle: BundleFolder,
    backend: Backend = None,
    provider: ProviderName = None,
    polygraphy: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write the recorded inputs and outputs there, as Polygraphy reads them."),
    ] = None,
) -> Outcome:
    """Replay a bundle's recorded inputs on this machine.

    Compares with the outputs that PyTorch gave at export. Exit 1 when one is missed.
    """
    from qforge import verbs_bundle

    return verbs_bundle.verify(bundle, device_for(bundle, backend, provider, None), polygraphy)


@verb(app, "inspect", "qforge inspect runs/demo/bundle-int8")
def inspect(path: EitherFolder) -> Outcome:
    """Say what is in a bundle or checkpoint."""
    from qforge import verbs_bundle

    return verbs_bundle.inspect(path)


@verb(app, "doctor", "qforge doctor")
def doctor() -> Outcome:
    """Say what this machine can run.

    And which install brings the rest.
    """
    from qforge import doctor

    return doctor.doctor()


@verb(app, "caption", "qforge caption runs/demo/bundle-int8 photo.jpg other.png --num-beams 5 --json")
@decodes
def caption(
    bundle: BundleFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = None,
    image_size: ImageSize = None,
    cache_dir: CacheDir = None,
    stream: Stream = False,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
    *,
    decoding: "Decoding",
) -> Outcome:
    """Describe images."""
    from qforge import verbs_answer

    how = verbs_answer.How(prompt, max_new_tokens, image_size, decoding, stream, cache_dir)
    return verbs_answer.caption(bundle, images, how, device_for(bundle, backend, provider, threads))


@verb(app, "vqa", 'qforge vqa runs/demo/bundle-int8 picture.png "what colour is the circle?" --stream')
@decodes
def vqa(
    bundle: BundleFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="Questions about it.")],
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = None,
    image_size: ImageSize = None,
    cache_dir: CacheDir = None,
    stream: Stream = False,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
    *,
    decoding: "Decoding",
) -> Outcome:
    """Answer questions about an image."""
    from qforge import verbs_answer

    how = verbs_answer.How(prompt, max_new_tokens, image_size, decoding, stream, cache_dir)
    return verbs_answer.vqa(bundle, image, questions, how, device_for(bundle, backend, provider, threads))


from qforge import cli_cache, cli_chat, cli_data, cli_retrieval  # noqa: E402, F401 - as above


@verb(app, "evaluate", "qforge evaluate runs/demo/bundle-int8 --data runs/demo/data/vqa_test.jsonl --task vqa")
@decodes
def evaluate(
    path: EitherFolder,
    manifest: Annotated[Path, typer.Option("--data", metavar="FILE", help="Manifest to score on.")],
    task: Annotated[Task, typer.Option(help="What is asked of the images.")],
    batch_size: Annotated[int, typer.Option(help="Requests answered together (caption, vqa).")] = 8,
    candidates: Candidates = 128,
    image_size: ImageSize = None,
    cache_dir: CacheDir = None,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
    *,
    decoding: "Decoding",
) -> Outcome:
    """Score a bundle or checkpoint on a data set.

    Retrieval: recall at 1, 5 and 10 in both directions, by contrast alone (itc) and re-ranked by matching (itm).
    """
    from qforge import verbs_bundle, verbs_retrieval

    device = device_for(path, backend, provider, threads)
    if task == "retrieval":
        verbs_retrieval.require_plain(image_size, cache_dir, decoding)
        return verbs_retrieval.evaluate(path, manifest, candidates, device)
    return verbs_bundle.evaluate(path, manifest, task, batch_size, image_size, device, cache_dir, decoding)


from qforge import cli_tune  # noqa: E402, F401 - as above


@verb(
    app,
    "bench",
    "qforge bench runs/demo/bundle-fp32 runs/demo/bundle-int8 --against runs/demo/checkpoint \\\n"
    "    --data runs/demo/data --out bench",
)
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles of one checkpoint.")],
    against: Annotated[Path, typer.Option(metavar="CKPT", help="Checkpoint they were made from.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for result.json, report.md and answers.png.")],
    root: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Folder of the manifests; without it, the recipe's.")
    ] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="What computes the bundles' graphs; without it, the recipe's.")
    ] = None,
    overrides: Overrides = None,
) -> Outcome:
    """Compare bundles with eager PyTorch.

    Same inputs, same run: accuracy, latency by phase, memory, size.

    Benchmark settings and the names of the manifests are those of the recipe in the checkpoint.
    """
    from qforge import verbs_bundle

    return verbs_bundle.bench(bundles, against, out, root, provider, overrides or [])


def main() -> None:
    """Entry point of the `qforge` command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name or a text that this terminal cannot show is no failure
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(prog_name="qforge", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
        path = getattr(getattr(error, "ctx", None), "command_path", "qforge")
        message = explained(message, path)
        if not message.startswith("Usage"):
            message = f"{' '.join(message.split())} See: {path} --help"  # choices stand on lines of their own
        print(message, file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before or after a verb; within one, the verb says so itself
        print(INTERRUPTED, file=sys.stderr)
        code = 2
    sys.exit(code)
