"""Eager PyTorch behind the same questions as the bundle: the slow path that judges every fast one.

Decoding is transformers' own `generate`, so the comparison is with code we did not write.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from runtime.answers import Alternative, Answer, Request
from runtime.decoding import GREEDY, Decoding
from runtime.errors import InputError
from runtime.preprocess import PreprocessSettings, preprocess_batch
from runtime.text import qformer_text
from trainer.blip2 import Blip2
from trainer.decoding import generate_settings
from trainer.generative import condition_tokens


# Shape letters: B requests, Q queries, D language width, T prompt tokens
class EagerPipeline:
    """An `Answerer` over the PyTorch model."""

    def __init__(self, model: Blip2, *, draws: bool = False) -> None:
        """`draws`: whether it may sample; its texts are told by seed and batch, and are not those of a bundle."""
        self.model = model.eval()
        self._draws = draws
        self._templates = {"caption": model.config.caption_prompt, "vqa": model.config.vqa_prompt}

    @torch.no_grad()
    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int | None = None, decoding: Decoding = GREEDY
    ) -> list[Answer]:
        """Answer all requests as one batch, at most `max_new_tokens` (default: the model's) tokens each.

        Raises:
            ImageError: an image cannot be read.
            InputError: a bad prompt, question or size, or a decoding that eager PyTorch has otherwise than bundles.
        """
        model, marks = self.model, [time.perf_counter()]
        pixels_BCHW = torch.from_numpy(preprocess_batch([r.image for r in requests], self._preprocess(requests)))
        marks.append(time.perf_counter())
        image_embeds_BNE = model.encode_image(pixels_BCHW)
        marks.append(time.perf_counter())
        prompts = [request.filled_prompt(**self._templates) for request in requests]
        prefix_BQD = model.query_prefix(image_embeds_BNE, *self._conditions(requests))
        marks.append(time.perf_counter())
        ids = [model.tokenizer(prompt).input_ids for prompt in prompts]
        settings = generate_settings(decoding, model, [len(row) for row in ids], draws=self._draws)
        embeds, mask = self._with_prompts(prefix_BQD, ids)
        first_token = _FirstToken()
        with _seeded(decoding):
            ids_BT = model.language_model.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=model.config.max_new_tokens if max_new_tokens is None else max_new_tokens,
                eos_token_id=list(model.end_token_ids),
                pad_token_id=model.pad_token_id,
                stopping_criteria=StoppingCriteriaList([first_token]),
                **settings,
            )
        marks += [first_token.at or marks[-1], time.perf_counter()]
        names = ("preprocess", "vision", "qformer", "prefill", "decode")
        timings_ms = {name: (b - a) * 1e3 for name, (a, b) in zip(names, pairwise(marks), strict=True)}
        timings_ms["total"] = (marks[-1] - marks[0]) * 1e3
        said, many = [self._kept(row, decoding) for row in ids_BT.tolist()], decoding.num_return_sequences
        return [
            self._finish(request, said[row * many : (row + 1) * many], timings_ms)
            for row, request in enumerate(requests)
        ]

    def _preprocess(self, requests: Sequence[Request]) -> PreprocessSettings:
        """For the one size that all requests ask for; InputError when there are two, or the tower cannot read it."""
        trained, others = self.model.preprocess.height, self.model.vision.other_sides
        sides = {request.image_size or trained for request in requests}
        if len(sides) > 1 or not sides <= {trained, *others}:
            raise InputError(
                f"image_size: expected one of {', '.join(map(str, (trained, *others)))} for the whole batch of eager "
                f"PyTorch, found {', '.join(map(str, sorted(sides)))}"
            )
        return self.model.preprocess.at(sides.pop())

    def _conditions(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What the Q-Former reads beside the images."""
        if not self.model.question_conditioned:
            return None, None
        reads = self.model.config.qformer_reads
        texts = [qformer_text(reads, r.question, r.own_prompt(**self._templates)) for r in requests]
        return condition_tokens(self.model, texts)

    def _with_prompts(self, prefix_BQD: Tensor, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prefix and prompt embeddings [B, S, D] and their mask [B, S].

        Short rows of a decoder-only model are padded on the left, as `generate` wants them; those of an encoder on the
        right.
        """
        longest = max(map(len, ids))
        embed = self.model.language_model.get_input_embeddings()
        queries, rows, masks = prefix_BQD.shape[1], [], []
        for prefix_QD, row in zip(prefix_BQD, ids, strict=True):
            text_TD = embed(torch.tensor(row, dtype=torch.long, device=prefix_QD.device))
            filler = text_TD.new_zeros(longest - len(row), text_TD.shape[1])
            parts, marks = [prefix_QD.to(text_TD.dtype), text_TD], [1] * (queries + len(row))
            pads = [0] * len(filler)
            left = self.model.style == "decoder-only"
            rows.append(torch.cat([filler, *parts] if left else [*parts, filler]))
            masks.append(pads + marks if left else marks + pads)
        return torch.stack(rows), torch.tensor(masks, device=prefix_BQD.device)

    def _kept(self, ids: list[int], decoding: Decoding) -> tuple[int, ...]:
        """What was said, without the decoder's first token, which was given, and from the end token on."""
        said = ids if self.model.style == "decoder-only" else ids[1:]
        ends = [place for place, token in enumerate(said) if token in self.model.end_token_ids]
        kept = said[: min(ends, default=len(said))]
        while decoding.stop_strings and kept and kept[-1] == self.model.pad_token_id:  # they end rows without its token
            kept.pop()
        return tuple(kept)

    def _finish(self, request: Request, said: list[tuple[int, ...]], timings_ms: dict[str, float]) -> Answer:
        texts = [self.model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
        (text, *others), (ids, *other_ids) = texts, said
        alternatives = tuple(Alternative(*other) for other in zip(others, other_ids, strict=True))
        return Answer(request.image_name, request.question, text, ids, timings_ms, alternatives)


@contextmanager
def _seeded(decoding: Decoding) -> Iterator[None]:
    """PyTorch's random numbers as the seed says inside, and as they were before afterwards."""
    with torch.random.fork_rng(enabled=decoding.do_sample):
        if decoding.seed is not None:
            torch.manual_seed(decoding.seed)
        yield


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there; never stops anything."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
