"""Accumulation that enlarges the contrastive batch (GradCache, arXiv 2101.06983).

A contrastive loss couples all rows of a batch, so the mean over its parts is another, easier loss. Here every part is
embedded once without a graph; the loss over the embeddings of all parts, of all processes, gives each embedding its
gradient; then part by part is embedded again, with the same dropout, and takes its gradient from there. Memory is that
of one part, the gradient that of the whole batch.
"""

from typing import Any, Protocol

from torch import Tensor

from trainer.blip2 import Blip2
from trainer.draws import StepDraws
from trainer.ranks import Ranks


# Shape letters: b rows of a part, B rows of this process
class CoupledObjective(Protocol):
    """An objective whose loss is one term over the embeddings of all rows, and terms that are means over rows.

    Its `loss` is these three in order, on one part that is the whole of this process' rows.
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
