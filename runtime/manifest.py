"""What `manifest.json` holds: the promise between the exporter and every reader.

Changing a field means raising `FORMAT` and teaching `runtime.bundle` the old one. Shapes and types are stated here so
that a reader knows them without opening a graph.
"""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from runtime.errors import InputError
from runtime.precision import LanguagePrecision, Precision, Target
from runtime.preprocess import PreprocessSettings
from runtime.settings import Settings
from runtime.text import QFormerReads

FORMAT = 2
"""The manifest format that is written."""
READABLE = (1, FORMAT)
"""Formats this reader knows; 1 had neither `target` nor other types than fp32 and int8."""


class FileEntry(Settings):
    """One file of the bundle."""

    file: str
    """Path inside the bundle, `/` between its parts."""
    sha256: str
    """Hex digest of the content."""
    bytes: NonNegativeInt
    """Size (bytes)."""


class TensorSpec(Settings):
    """One named input or output of a graph."""

    dtype: str
    """numpy's name of the element type: float32, int64 …"""
    shape: tuple[int | str, ...]
    """A number for a fixed size, a name for one that varies."""


class GraphEntry(FileEntry):
    """One ONNX graph."""

    data: FileEntry | None
    """External weights; None when they are in the graph file."""
    inputs: dict[str, TensorSpec]
    """By name, in the graph's order."""
    outputs: dict[str, TensorSpec]
    """By name, in the graph's order."""
    made_from: str | None = None
    """SHA-256 of what this graph was made from; an export copies a graph whose hash is unchanged (`export.reuse`)."""
    on_cpu: bool = True
    """Whether ONNX Runtime's CPU can compute it; BF16 it cannot."""


class ModelFacts(Settings):
    """What the graphs are together."""

    style: Literal["decoder-only", "encoder-decoder", "none"]
    """Kind of language model, which decides the decode loop; none: the bundle searches and does not answer."""
    queries: PositiveInt
    """Query vectors, and so prefix positions, per image."""
    qformer_width: PositiveInt
    """Hidden size of the Q-Former."""
    language_width: PositiveInt | None
    """Embedding width of the language model; null where there is none."""
    question_conditioned: bool
    """Whether the Q-Former reads a text beside the image."""
    qformer_reads: QFormerReads = "question"
    """Which text: the normalised question (captions have none), or the language model's whole prompt."""


class Limits(Settings):
    """What the graphs were made and checked for."""

    max_batch: PositiveInt
    """Images or sequences in one run of a graph."""
    max_positions: NonNegativeInt
    """Positions of the language model, prefix included, of an encoder-decoder those that the encoder reads; 0 where
    there is none."""
    max_question_tokens: NonNegativeInt
    """Question tokens the Q-Former reads; 0 when the question does not condition it."""
    max_new_tokens: NonNegativeInt
    """Tokens a request may ask for; 0 where there is no language model."""
    max_text_tokens: NonNegativeInt = 0
    """Tokens of a text that the retrieval graphs read; 0 where there are none (bundles written before they existed)."""
    image_sizes: tuple[PositiveInt, ...] = ()
    """Sides (pixels) of square images that a request may ask for beside `preprocess`."""


class Prompts(Settings):
    """Text handed to the language model after the image; empty where there is none."""

    caption: str
    """For a caption."""
    vqa: str
    """For an answer; one `{}` is where the question goes."""


class Generation(Settings):
    """Defaults of decoding; no end token and no new tokens where there is no language model."""

    eos_token_ids: tuple[int, ...]
    """Any of them ends an answer."""
    pad_token_id: int
    """Fed for rows of a batch that have ended, and where prompts are shorter than the longest; the mask hides it."""
    max_new_tokens: NonNegativeInt
    """Tokens generated unless a request says otherwise."""
    start_token_id: int | None = None
    """What an encoder-decoder's decoder is fed first; None where the prompt comes first."""


class Manifest(Settings):
    """Everything in `manifest.json`."""

    format: Literal[1, 2]
    """Version of this layout."""
    digest: str
    """SHA-256 of the canonical JSON of all other keys; names this bundle in cache keys."""
    model: ModelFacts
    """What the graphs are together."""
    precision: Precision
    """Of the vision, Q-Former and retrieval graphs."""
    language_precision: LanguagePrecision
    """Of the language model's graphs; fp32 where there is none."""
    target: Target = "onnxruntime"
    """Who the graphs are written for (bundles without this field: ONNX Runtime)."""
    limits: Limits
    """Refused beyond."""
    preprocess: PreprocessSettings
    """Image file → pixels."""
    prompts: Prompts
    """Templates."""
    generation: Generation
    """Defaults."""
    graphs: dict[str, GraphEntry]
    """By name: vision; to answer: qformer, embed, then language, or encoder and decoder; to search: itc_image,
    itc_text, itm; for captions alone, if exported: fused."""
    files: dict[str, str]
    """Path inside the bundle → SHA-256 of every other file."""
    made_by: dict[str, str]
    """Name → version of what made the bundle."""

    @property
    def fuses_int8(self) -> bool:
        """Whether ONNX Runtime may fuse Q/DQ pairs with what they surround: it takes those of FP8 for INT8."""
        return self.precision != "fp8"

    def side(self, image_size: int | None) -> int | None:
        """The side (pixels) that a request's image is read at; None for the trained one.

        Raises:
            InputError: a size the bundle was not exported for.
        """
        trained, others = self.preprocess.height, self.limits.image_sizes
        if image_size in (None, trained):
            return None
        if image_size not in others:
            sizes = " or ".join(map(str, (trained, *others)))
            raise InputError(
                f"image_size: expected {sizes} (what this bundle was exported for), "
                f"found {image_size}; export one: qforge export --set export.image_sizes=[{image_size}]"
            )
        return image_size
