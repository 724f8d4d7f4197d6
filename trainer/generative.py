"""Learning through the frozen language model: its loss reaches the bridge through the soft prefix.

Stage 2 sees captions only: a decoder-only model says them; an encoder-decoder reads the beginning and says the rest
(prefix language modelling, the paper's section 3.3). The caption fine-tune has both say whole captions after a prompt.
In the VQA fine-tune the question conditions the Q-Former (it enters beside the queries, InstructBLIP's way, the nearest
published code to the paper's section 4.3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.text import qformer_text
from trainer.blip2 import Blip2, text_batch
from trainer.language import continuation
from trainer.losses import IGNORED
from trainer.targets import Target


# Shape letters: B pairs, N image tokens, E image width, Q queries, H Q-Former width, D language width, T text tokens,
# S positions of the language model's output, M of them that predict a token, V vocabulary
def language_loss(model: Blip2, features_BNE: Tensor, targets: Sequence[Target]) -> Tensor:
    """Loss (nats per token, rows weighing the same) of the answers and their end tokens."""
    return said_loss(model, query_states(model, features_BNE, targets), targets)


def query_states(model: Blip2, features_BNE: Tensor, targets: Sequence[Target]) -> Tensor:
    """The queries [B, Q, H] after they have seen image features, and the questions where the Q-Former is given them."""
    reads = model.config.qformer_reads
    texts = [qformer_text(reads, t.question, t.prompt) if model.question_conditioned else None for t in targets]
    return model.bridge.query_states(model.bridge.post_layernorm(features_BNE), *condition_tokens(model, texts))


def said_loss(model: Blip2, query_BQH: Tensor, targets: Sequence[Target]) -> Tensor:
    """`language_loss` from the queries on.

    Prefix and prompt are read, not predicted. A text longer than the limit is cut before its end token is added
    (LAVIS loses the end token). A one-word answer counts as much as a long caption (LAVIS averages over tokens, which
    lets the captions of a mixed batch drown its answers). The vocabulary-wide head sees only the positions that
    predict something.
    """
    speak = _decoder_only if model.style == "decoder-only" else _encoder_decoder
    given, labels_BS = speak(model, model.bridge.speech(query_BQH), targets)
    predicts_BS = labels_BS != IGNORED
    losses_M = F.cross_entropy(_logits_at(model, predicts_BS, given).float(), labels_BS[predicts_BS], reduction="none")
    totals_B = losses_M.new_zeros(len(targets)).index_add(0, predicts_BS.nonzero()[:, 0], losses_M)
    return (totals_B / predicts_BS.sum(1)).mean()


def condition_tokens(model: Blip2, texts: Sequence[str | None]) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Q-Former ids and mask [B, T]; a row without text is wholly masked. None when no row has any."""
    if all(text is None for text in texts):
        return None, None
    batch = text_batch(model, [text or "" for text in texts])
    given_B1 = torch.tensor([[text is not None] for text in texts], device=batch.mask.device)
    return batch.ids, batch.mask * given_B1


def _decoder_only(model: Blip2, prefix_BQD: Tensor, targets: Sequence[Target]) -> tuple[dict[str, Tensor], Tensor]:
    """What a decoder-only model is given, and the token that each of its positions predicts [B, S].

    It reads prefix, prompt (with its begin token, where the family has one), answer and end token, padded on the
    right. Without any prompt token the last query predicts the first word; what the last position says nobody reads.
    """
    ids, labels, before = [], [], prefix_BQD.shape[1] - 1
    for target in targets:
        read, said = continuation(model.tokenizer, target.prompt, target.answer)
        said = _ended(model, said, target.longest)
        ids.append(read + said)
        labels.append([IGNORED] * (before + len(read)) + said + [IGNORED])
    return _read(model, prefix_BQD, ids), _padded(labels, IGNORED, prefix_BQD.device)


def _encoder_decoder(model: Blip2, prefix_BQD: Tensor, targets: Sequence[Target]) -> tuple[dict[str, Tensor], Tensor]:
    """What an encoder-decoder is given, which reads prefix and prompt, and the tokens its decoder predicts [B, S]."""
    read = [list(model.tokenizer(target.prompt).input_ids) for target in targets]
    said = [_ended(model, model.tokenizer(t.answer, add_special_tokens=False).input_ids, t.longest) for t in targets]
    start, device = model.start_token_id, prefix_BQD.device
    assert start is not None, "load_language refuses an encoder-decoder without one"
    given = _padded([[start, *row[:-1]] for row in said], model.pad_token_id, device)
    # Pads come last, so nothing before them sees them.
    return _read(model, prefix_BQD, read) | {"decoder_input_ids": given}, _padded(said, IGNORED, device)


def _logits_at(model: Blip2, predicts_BS: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Logits [M, V] of the positions that predict something, row by row; the others never reach the head."""
    head = model.language_model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, states: (states[0][predicts_BS], *states[1:]))
    try:
        logits_MV: Tensor = model.language_model(**given, use_cache=False).logits
    finally:
        hook.remove()
    return logits_MV


def _read(model: Blip2, prefix_BQD: Tensor, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Embeddings [B, S, D] and mask [B, S] of prefix and tokens."""
    ids_BT = _padded(ids, model.pad_token_id, prefix_BQD.device)
    ones = [[1] * (prefix_BQD.shape[1] + len(row)) for row in ids]
    embeds_BTD = model.language_model.get_input_embeddings()(ids_BT)
    return {
        "inputs_embeds": torch.cat([prefix_BQD.to(embeds_BTD.dtype), embeds_BTD], dim=1),
        "attention_mask": _padded(ones, 0, prefix_BQD.device),
    }


def _ended(model: Blip2, ids: Sequence[int], longest: int | None) -> list[int]:
    """The tokens and the end token, within the limit."""
    return [*ids[: (longest or model.config.qformer.max_text_tokens) - 1], model.end_token_ids[0]]


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> Tensor:
    """[B, T], padded on the right."""
    longest = max(map(len, rows))
    padded = [[*row, *[filler] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device)
