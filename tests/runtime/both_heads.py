"""The two tiny bundles in one: it names the strongest colour of an image, and finds images of a colour."""

from pathlib import Path

from runtime.files import atomic_folder
from tests.runtime.conftest import write_answering
from tests.runtime.retrieval_bundle import _itc_image, _itc_text, _itm


def write_bundle_with_both_heads(final: Path) -> Path:
    with atomic_folder(final) as folder:
        searching = {"itc_image": _itc_image(), "itc_text": _itc_text(), "itm": _itm()}
        write_answering(folder, searching, max_text_tokens=6)
    return final
