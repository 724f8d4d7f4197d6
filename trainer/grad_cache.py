"""Accumulation that enlarges the contrastive batch (GradCache, arXiv 2101.06983).

A contrastive loss couples all rows of a batch, so the mean over its parts is another, easier loss. Here every part is
embedded once without a graph; the loss over the embeddings of all parts, of all processes, gives each embedding its
gradient; then part by part is embedded again, with the same dropout, and takes its gradient from there. Memory is that
of one part, the gradient that of the whole batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trainer.blip2 import Blip2
from trainer.draws import StepDraws
from trainer.ranks import Ranks


# Shape letters: b rows of a part, B rows of this process
@runtime_checkable
class CoupledObjective(Protocol):
    """An objective whose loss is one term over the embeddings of all rows, and terms that are means over rows.

    Its `loss` is these four in order, on one part that is the whole of this process' rows.
    """

    def read(self, model: Blip2, indices: list[int], draws: StepDraws) -> Any:
        """Rows of one part: texts, tokens, image features. Nothing of it carries a gradient."""
        ...

    def embed(self, model: Blip2, part: Any) -> tuple[tuple[Tensor, ...], Any]:
        """Embeddings [b, …] of a part that the coupled term reads, and what `rest` can use of the same pass."""
        ...

    def couple(
        self, model: Blip2, embeddings: tuple[Tensor, ...], parts: list[Any], draws: StepDraws, ranks: Ranks
    ) -> tuple[Tensor, dict[str, float], list[Any]]:
        """The coupled term over the embeddings [B, …] of all parts, its figures, and for each part what was drawn.

        Gathers over the processes; what is drawn (negatives, fetched by `ranks.fetch_rows`) is over the global batch.
        """
        ...

    def rest(self, model: Blip2, part: Any, kept: Any, drawn: Any, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """The other terms for one part: means over its rows. `kept` is of `embed`, `drawn` of `couple`."""
        ...


class PartSteps(Protocol):
    """What of a step the parts share: `trainer.stepper.Stepper`."""

    def seed(self, draws: StepDraws, part: int) -> None:
        """Seed dropout of a part."""
        ...

    def autocast(self) -> torch.autocast:
        """The precision of forward passes."""
        ...

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is taken."""
        ...

    def backward(
        self,
        loss: Callable[[], tuple[Tensor, dict[str, float]]],
        *,
        share: float,
        last: bool,
        extra: Callable[[], Tensor] | None = None,
    ) -> tuple[float, dict[str, float]]:
        """Forward and backward of one part."""
        ...


def backward(
    objective: CoupledObjective,
    model: Blip2,
    indices: list[int],
    parts: Sequence[range],
    draws: StepDraws,
    ranks: Ranks,
    steps: PartSteps,
) -> tuple[float, dict[str, float]]:
    """Gradients of the rows at `indices`, taken in `parts`, as of one batch; returns loss and figures.

    Image features that the tower computes with gradient are read a second time; those of wrong images from other parts
    give the tower no gradient.
    """

    def read(number: int) -> Any:
        places = parts[number]
        return objective.read(model, [indices[place] for place in places], draws.at(places))

    given, embedded = list[Any](), list[tuple[Tensor, ...]]()
    with torch.no_grad(), steps.autocast():
        for number in range(len(parts)):
            steps.seed(draws, number)
            given.append(read(number))
            embedded.append(objective.embed(model, given[number])[0])
    leaves = tuple(torch.cat(of_parts).requires_grad_() for of_parts in zip(*embedded, strict=True))
    with steps.autocast():
        coupled, figures, drawn = objective.couple(model, leaves, given, draws, ranks)
    if coupled.requires_grad:
        steps.scaled(coupled).backward()
    touched = [parameter for parameter in model.parameters() if parameter.grad is not None]
    total, again = float(coupled.detach()), model.vision.trained
    for number, places in enumerate(parts):
        steps.seed(draws, number)
        part = read(number) if again else given[number]
        last = number == len(parts) - 1
        kept: list[tuple[tuple[Tensor, ...], Any]] = []

        def rest(part: Any = part, drawn: Any = drawn[number], kept: Any = kept) -> tuple[Tensor, dict[str, float]]:
            kept.append(objective.embed(model, part))
            return objective.rest(model, part, kept[0][1], drawn, ranks)

        def surrogate(kept: Any = kept, places: range = places, last: bool = last) -> Tensor:
            """A term with the gradient that the coupled term has for these embeddings."""
            terms = [
                (rows * leaf.grad[places.start : places.stop]).sum()
                for rows, leaf in zip(kept[0][0], leaves, strict=True)
                if leaf.grad is not None and rows.requires_grad
            ]
            # What the coupled term reached directly (the temperature) must take part in the exchange of gradients.
            terms += [(parameter * 0).sum() for parameter in touched if last]
            return torch.stack(terms).sum() if terms else coupled.new_zeros(())

        loss, more = steps.backward(rest, share=1 / len(parts), last=last, extra=surrogate)
        total += loss / len(parts)
        for name, value in more.items():
            figures[name] = figures.get(name, 0.0) + value / len(parts)
    return total, figures
