"""All that a bundle passed: its answers, its scores, or both."""

from dataclasses import asdict, dataclass
from typing import Any

from export.judge import Parity
from export.retrieval_verify import RetrievalVerdict
from export.verify import Verdict
from runtime.reference import ChainCase, GraphCase, RetrievalCase


@dataclass(frozen=True)
class Verdicts:
    """Both ways begin with the vision graph; how it fared on the way to answers then stands for both."""

    answers: Verdict | None
    """None in a bundle that only searches."""
    scores: RetrievalVerdict | None
    """None in a bundle that only answers."""

    @property
    def parities(self) -> tuple[Parity, ...]:
        """Each output of each graph once."""
        answers = self.answers.parities if self.answers else ()
        scores = self.scores.parities if self.scores else ()
        return (*answers, *(parity for parity in scores if parity.graph not in {known.graph for known in answers}))

    @property
    def cases(self) -> tuple[GraphCase, ...]:
        """Each case of each graph once, for reference.npz."""
        answers = self.answers.cases if self.answers else ()
        scores = self.scores.cases if self.scores else ()
        return (*answers, *(case for case in scores if case.graph not in {known.graph for known in answers}))

    @property
    def chains(self) -> tuple[ChainCase | None, RetrievalCase | None]:
        """Whole answers and whole scores, for reference.npz."""
        return self.answers.chain if self.answers else None, self.scores.chain if self.scores else None

    def as_json(self) -> dict[str, Any]:
        """What parity.json says."""
        answers = self.answers.as_json() if self.answers else {}
        scores = {"retrieval_scores": self.scores.as_json()} if self.scores else {}
        return answers | scores | {"graphs": [asdict(parity) for parity in self.parities]}
