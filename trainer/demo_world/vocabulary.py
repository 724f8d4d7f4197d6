"""Tokenizers of the demo's small halves, trained on what is told about its scenes.

An OPT-like one (byte-level BPE, texts begin with </s>), a T5-like one (the same, texts end with </s>) and a BERT-like
one for the Q-Former (WordPiece with [DEC]).
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trainer.language import Style

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
END = SPECIALS.index("</s>")


def train_language_tokenizer(texts: Sequence[str], style: Style) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the habits of the style's best-known family.

    OPT: </s> comes first. T5: every word is marked at its beginning, the first of a text too, and </s> comes last.
    """
    reads_whole = style == "encoder-decoder"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=reads_whole)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=768, special_tokens=list(SPECIALS), initial_alphabet=alphabet)
    )
    template = "$A </s>" if reads_whole else "</s> $A"
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", END)])
    begin = {} if reads_whole else {"bos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", **begin
    )


def train_text_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """BERT-like WordPiece with [DEC] for the Q-Former."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    piece = Tokenizer(models.WordPiece(_word_pieces(texts, marks), unk_token="[UNK]"))
    piece.normalizer, piece.pre_tokenizer = _as_bert()
    piece.add_special_tokens(marks)
    piece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", piece.token_to_id("[CLS]")), ("[SEP]", piece.token_to_id("[SEP]"))],
    )
    piece.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=piece,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[DEC]",
    )


def _as_bert() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def _word_pieces(texts: Sequence[str], marks: list[str]) -> dict[str, int]:
    """Piece → id; the same for the same texts in every process.

    tokenizers numbers the inner letters (`##a`) as it meets them in a hash map, and settles ties between pieces by
    those numbers: the pieces were others in every process. Reserved in front they have fixed numbers, and every ASCII
    word can be spelled.
    """
    letters = [chr(code) for code in range(33, 127)]
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = _as_bert()
    reserved = [*marks, *letters, *(f"##{letter}" for letter in letters)]
    trained.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=512, special_tokens=reserved))
    return trained.get_vocab()
