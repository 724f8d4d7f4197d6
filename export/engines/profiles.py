"""Which shapes a plan is built for: one profile for each usual batch, and one for everything up to the limits.

TensorRT chooses kernels for the usual shape of a profile and accepts all between its smallest and largest. The limits
come from the bundle's manifest, where every varying axis has a name. A language model has two profiles a batch, because
it works in two ways: reading a prompt (`prefill`, no cached positions yet) and adding one token (`step`).

A bundle that reads images of several sizes states the sides, and not how many tokens its vision tower makes of them;
that is in the outputs of eager PyTorch that the bundle recorded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from runtime.bundle import Bundle
from runtime.engine_manifest import EngineProfile
from runtime.errors import InputError
from runtime.manifest import GraphEntry, Limits, Manifest
from runtime.reference import REFERENCE, read_reference

USUAL_PROMPT = 16
"""Prompt tokens beside the image prefix for which kernels are chosen."""


@dataclass(frozen=True)
class Span:
    """Smallest, usual and largest size of an axis."""

    least: int
    usual: int
    most: int

    def __add__(self, other: "Span") -> "Span":
        return Span(self.least + other.least, self.usual + other.usual, self.most + other.most)

    def at(self, place: int) -> int:
        """0 smallest, 1 usual, 2 largest."""
        return (self.least, self.usual, self.most)[place]


def exact_batches(limits: Limits) -> tuple[int, ...]:
    """1, 2, 4, 8 … up to the bundle's limit."""
    return tuple(1 << power for power in range(limits.max_batch.bit_length()))


def patches_of(bundle: Bundle) -> Span | None:
    """Tokens of an image at the smallest, the trained and the largest side; None where there is one side only.

    Raises:
        InputError: the bundle recorded no outputs of its vision graph at one of them.
    """
    if not bundle.manifest.limits.image_sizes:
        return None
    sides = _sides(bundle.manifest, bundle.manifest.preprocess.height)
    file = bundle.file(REFERENCE)
    vision = [case for case in read_reference(file).cases if case.graph == "vision"]
    tokens = {case.inputs["pixels"].shape[2]: case.outputs["image_embeds"].shape[1] for case in vision}
    if missing := {sides.least, sides.usual, sides.most} - tokens.keys():
        raise InputError(
            f"{file}: expected the vision graph's outputs at every image size, found none at {min(missing)} pixels; "
            f"export the bundle again"
        )
    return Span(tokens[sides.least], tokens[sides.usual], tokens[sides.most])


def profiles_of(
    name: str, manifest: Manifest, batches: Sequence[int] | None = None, *, patches: Span | None = None
) -> tuple[EngineProfile, ...]:
    """Profiles of one graph: for each of `batches` (None: 1, 2, 4 …), then for any batch.

    `patches` is what `patches_of` tells of the bundle.

    Raises:
        InputError: a batch beyond the limit, or a varying axis whose range is not known here.
    """
    entry, limits = manifest.graphs[name], manifest.limits
    wanted = exact_batches(limits) if batches is None else tuple(dict.fromkeys(batches))
    if beyond := [batch for batch in wanted if not 1 <= batch <= limits.max_batch]:
        raise InputError(f"--batch: expected 1 to {limits.max_batch} (this bundle's limit), found {beyond[0]}")
    spans = {f"batch-{batch}": Span(batch, batch, batch) for batch in wanted}
    if limits.max_batch > 1 or not spans:
        spans["range"] = Span(1, limits.max_batch, limits.max_batch)
    axes = _axes(name, manifest) | ({} if patches is None else {"patches": patches})
    varying = {axis for spec in entry.inputs.values() for axis in spec.shape if isinstance(axis, str)}
    if not varying:
        return ()
    profiles = list[EngineProfile]()
    for title, batch in spans.items():
        for suffix, sizes in _phases(varying, axes).items():
            profiles.append(_profile(f"{title}{suffix}", name, entry, {**sizes, "batch": batch}))
    return tuple(profiles)


def _axes(graph: str, manifest: Manifest) -> dict[str, Span]:
    """Axis → its range in this graph."""
    limits, queries = manifest.limits, manifest.model.queries
    tokens = {"qformer": limits.max_question_tokens, "embed": limits.max_positions}.get(graph, limits.max_text_tokens)
    prompt = min(queries + USUAL_PROMPT, limits.max_positions)
    # A decoder-only model caches what it reads and says; an encoder-decoder's decoder what it says.
    cached = limits.max_positions if manifest.model.style == "decoder-only" else limits.max_new_tokens
    return {
        "tokens": Span(1, min(USUAL_PROMPT, max(tokens, 1)), max(tokens, 1)),
        "read": Span(1, prompt, limits.max_positions),
        "new": Span(1, prompt, limits.max_positions),
        "past": Span(0, cached // 2, max(cached - 1, 0)),
        "height": _sides(manifest, manifest.preprocess.height),
        "width": _sides(manifest, manifest.preprocess.width),
    }


def _sides(manifest: Manifest, trained: int) -> Span:
    """Side of an image (pixels): the smallest, the trained and the largest that a request may ask for."""
    sides = (trained, *manifest.limits.image_sizes)
    return Span(min(sides), trained, max(sides))


def _phases(varying: Iterable[str], axes: Mapping[str, Span]) -> dict[str, dict[str, Span]]:
    """Suffix of the profile's name → sizes of all axes but the batch."""
    if "new" not in varying:
        return {"": dict(axes)}
    return {
        "-prefill": {**axes, "past": Span(0, 0, 0)},
        "-step": {**axes, "new": Span(1, 1, 1)},
    }


def _profile(title: str, graph: str, entry: GraphEntry, sizes: Mapping[str, Span]) -> EngineProfile:
    def size(axis: int | str, tensor: str) -> Span:
        if isinstance(axis, int):
            return Span(axis, axis, axis)
        spans = [_span(part, sizes) for part in axis.split(" + ")]
        if any(span is None for span in spans):
            raise InputError(
                f"graph '{graph}': input '{tensor}' has a varying size '{axis}' whose range is not known; expected "
                f"{', '.join(sizes)} or sums of them; export the bundle again"
            )
        return sum((span for span in spans if span is not None), Span(0, 0, 0))

    shapes = {}
    for tensor, spec in entry.inputs.items():
        if any(isinstance(axis, str) for axis in spec.shape):
            spans = [size(axis, tensor) for axis in spec.shape]
            least, usual, most = (tuple(span.at(place) for span in spans) for place in range(3))
            shapes[tensor] = (least, usual, most)
    return EngineProfile(name=title, shapes=shapes)


def _span(part: str, sizes: Mapping[str, Span]) -> Span | None:
    return Span(int(part), int(part), int(part)) if part.isdecimal() else sizes.get(part)
