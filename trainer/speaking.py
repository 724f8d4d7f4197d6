"""The objectives that learn through the language model: stage 2, the caption fine-tune, the VQA fine-tune."""

import math

import torch
from torch import Tensor

from runtime.dataset import Row
from runtime.text import normalise_caption
from trainer.blip2 import Blip2, text_batch
from trainer.config import Stage2Config
from trainer.data import ImageRows
from trainer.draws import StepDraws
from trainer.generative import language_loss, query_states, said_loss
from trainer.losses import itc_loss, same_image, similarities
from trainer.ranks import Ranks
from trainer.stage1 import number_of
from trainer.targets import Target, caption_target, question_target, split_target, turn_target


# Shape letters: B rows of this process, Q queries, H Q-Former width, C contrastive width
class Stage2:
    """Captions, which an encoder-decoder reads the beginning of; image-text contrast beside it where it has a weight.

    The contrast is ITC of stage 1 over the rows of all processes (of one part of an accumulated batch), on the very
    queries that the language model is given. Gradients reach both sides of every pair.
    """

    def __init__(self, config: Stage2Config, train: ImageRows) -> None:
        self.config, self.train = config, train

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Loss of the rows at `indices`, every row weighing the same, and its terms when there are two."""
        rows, features_BNE = self.train.batch(indices, draws)
        target_of = caption_target if model.style == "decoder-only" else split_target
        targets = [target_of(model, row, draws.row(place)) for place, row in enumerate(rows)]
        query_BQH = query_states(model, features_BNE, targets)
        said = said_loss(model, query_BQH, targets)
        if not self.config.itc_weight:
            return said, {}
        itc = self._contrast(model, query_BQH, rows, draws, ranks)
        return said + self.config.itc_weight * itc, {"lm": float(said.detach()), "itc": float(itc.detach())}

    def _contrast(self, model: Blip2, query_BQH: Tensor, rows: list[Row], draws: StepDraws, ranks: Ranks) -> Tensor:
        captions = [str(draws.row(place, "contrast").choice(row.captions)) for place, row in enumerate(rows)]
        texts = text_batch(model, [normalise_caption(caption) for caption in captions])
        image_BQC = model.bridge.likeness(query_BQH)
        text_BC = model.bridge.text_features(texts.ids, texts.mask)
        numbers_B = torch.tensor([number_of(row.image_id) for row in rows], device=query_BQH.device)
        return itc_loss(
            model.bridge.over_temperature(similarities(image_BQC, ranks.gather_with_gradient(text_BC))),
            model.bridge.over_temperature(similarities(ranks.gather_with_gradient(image_BQC), text_BC).T),
            same_image(numbers_B, ranks.gather(numbers_B)),
            self.config.label_smoothing,
        )


class CaptionObjective:
    """The caption fine-tune: whole captions after the prompt, for both kinds of language model (LAVIS #364)."""

    def __init__(self, train: ImageRows) -> None:
        self.train = train

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Loss of the rows at `indices`, every row weighing the same."""
        rows, features_BNE = self.train.batch(indices, draws)
        targets = [caption_target(model, row, draws.row(place)) for place, row in enumerate(rows)]
        return language_loss(model, features_BNE, targets), {}


class VqaObjective:
    """The VQA fine-tune over question rows and dialogues, with `caption_fraction` of each batch from caption rows, so
    that one model keeps both skills.
    """

    def __init__(
        self, questions: ImageRows, captions: ImageRows, caption_fraction: float, dialogue_tokens: int
    ) -> None:
        self.questions, self.captions, self.caption_fraction = questions, captions, caption_fraction
        self.dialogue_tokens = dialogue_tokens

    def loss(self, model: Blip2, indices: list[int], draws: StepDraws, ranks: Ranks) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch, every row weighing the same.

        Which places are captions, of rows drawn at random, depends on their number in the global batch alone, evenly
        spread: every process has about as many.
        """
        described = [place for place in range(len(indices)) if self._is_caption(draws.place(place))]
        asked = [place for place in range(len(indices)) if not self._is_caption(draws.place(place))]
        targets, features = list[Target](), list[Tensor]()
        if asked:
            rows, features_BNE = self.questions.batch([indices[place] for place in asked], draws.at(asked))
            targets += [self._asked(model, row, draws, place) for place, row in zip(asked, rows, strict=True)]
            features.append(features_BNE)
        if described:
            drawn = [self.captions.any_row(draws.row(place, "row")) for place in described]
            rows, features_BNE = self.captions.batch(drawn, draws.at(described))
            targets += [
                caption_target(model, row, draws.row(place)) for place, row in zip(described, rows, strict=True)
            ]
            features.append(features_BNE)
        return language_loss(model, torch.cat(features), targets), {}

    def _asked(self, model: Blip2, row: Row, draws: StepDraws, place: int) -> Target:
        if row.turns:
            return turn_target(model, row, draws.row(place), self.dialogue_tokens)
        return question_target(model, row, draws.row(place))

    def _is_caption(self, place: int) -> bool:
        """True for `caption_fraction` of any row of consecutive places, to the nearest."""
        share = self.caption_fraction
        return math.floor((place + 1) * share + 0.5) > math.floor(place * share + 0.5)
