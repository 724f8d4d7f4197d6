"""The verb for a conversation about an image: chat.

As in qforge/cli.py, nothing heavy is imported here.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qforge.console import Outcome, verb
from qforge.options import (
    Backend,
    BundleFolder,
    CacheDir,
    ImageSize,
    MaxNewTokens,
    Prompt,
    ProviderName,
    Threads,
    app,
    decodes,
)

if TYPE_CHECKING:
    from runtime.decoding import Decoding


@verb(app, "chat", "qforge chat runs/demo/bundle-int8 picture.png < questions.txt")
@decodes
def chat(
    bundle: BundleFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file.")],
    prompt: Prompt = None,
    max_new_tokens: MaxNewTokens = None,
    image_size: ImageSize = None,
    cache_dir: CacheDir = None,
    backend: Backend = None,
    provider: ProviderName = None,
    threads: Threads = None,
    *,
    decoding: "Decoding",
) -> Outcome:
    """Talk about an image: a question a line, each answered with what was said before.

    Reads the terminal or a pipe; Ctrl-D ends. With --json a line per answer. A question that cannot be answered is
    told on stderr and the conversation goes on; from a pipe, exit 2 at its end.
    """
    from qforge import verbs_chat
    from qforge.devices import device_for

    how = verbs_chat.How(prompt, max_new_tokens, image_size, decoding, cache_dir)
    return verbs_chat.chat(bundle, image, how, device_for(bundle, backend, provider, threads))
