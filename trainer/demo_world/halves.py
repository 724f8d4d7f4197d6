"""The small frozen halves of the demo: a vision tower and a language model, really pre-trained on the demo world.

The vision tower learns, supervised, what lies under each of its patches (shape, colour, size, where the object's
centre is, which one it is from the left and from the top) and what the whole picture holds. The language model
learns text alone: documents that tell the facts of one scene and then describe it or ask about it, so that, like a
large one, it can read captions and answers off its context. Only train-split scenes are used. The folders are
ordinary Hugging Face ones in fp16 (about 5 MB together).

    python -m trainer.demo_world.halves OUT      # what made trainer/demo_halves/; see its record.json
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from runtime.preprocess import PreprocessSettings, preprocess
from runtime.progress import Progress
from trainer.config import DemoHalvesConfig, ModelConfig
from trainer.demo_world.draw import CLUTTER, draw
from trainer.demo_world.language import QuestionWriter, caption, facts, notes
from trainer.demo_world.scene import COLOURS, RADIUS, SHAPES, WIDE, Scene, Split, random_scenes
from trainer.towers import new_language_model, new_vision_tower

SIDE, PATCH = 64, 8
GRID = SIDE // PATCH
PIXELS = PreprocessSettings(height=SIDE, width=SIDE, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
DRAWN = 128
"""Side of the drawn picture before it is resized (pixels)."""
COVERED = 0.08
"""A patch shows an object when the object covers at least this share of it."""
PLACES = ("first", "second", "third", "fourth")
LABELS: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "size": list(RADIUS),
    "from_left": list(PLACES),
    "from_top": list(PLACES),
}
"""What a patch is asked about the object it shows."""
DOCUMENT_TOKENS = 54
"""Documents are cut here; notes fill up what the facts leave."""
QUESTIONS = 4
"""Questions asked about one scene, each in a document of its own."""
NOTES = 8
"""Most notes in one document."""
OPEN_WEIGHT, ANSWER_WEIGHT = 0.1, 4.0
"""Weight of a token the facts do not decide (facts, wording of questions) and of an answer; what else is told has 1."""


# Shape letters: B images, N patches, E image width, T tokens
class PatchTeacher(nn.Module):
    """Linear heads that ask the tower what each patch and the whole picture show; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patch_heads = nn.ModuleList(nn.Linear(width, 1 + len(names)) for names in LABELS.values())
        self.centre = nn.Linear(width, 2)
        self.counts = nn.Linear(width, len(SHAPES) + len(COLOURS) + len(SHAPES) * len(COLOURS))
        self.cluttered = nn.Linear(width, 1)

    def forward(
        self, features_BNE: Tensor, patches: Tensor, centres: Tensor, counts: Tensor, cluttered_BN: Tensor
    ) -> Tensor:
        """Sum of the losses; patches [B, 5, N] (0 = none), centres [B, N, 2], counts [B, K], cluttered [B, 1 + N].

        Every token is asked whether it shows clutter, the first one about the whole picture: asked of the picture alone
        it was not learned.
        """
        features_BNE = self.norm(features_BNE)
        tokens_BNE = features_BNE[:, 1:]
        loss = torch.zeros(())
        for i, head in enumerate(self.patch_heads):
            loss = loss + F.cross_entropy(head(tokens_BNE).flatten(0, 1), patches[:, i].flatten())
        shown = (patches[:, 0] > 0).unsqueeze(-1)
        loss = loss + 4 * ((self.centre(tokens_BNE) - centres) ** 2 * shown).sum() / shown.sum().clamp(min=1)
        loss = loss + ((self.counts(features_BNE[:, 0]) - counts) ** 2).mean()
        return loss + F.binary_cross_entropy_with_logits(self.cluttered(features_BNE).squeeze(-1), cluttered_BN)


def _targets(scene: Scene, object_map: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of one picture: patches [5, N], centres [N, 2], counts of shapes and colours [K], clutter [1 + N]."""
    cells = object_map.reshape(GRID, PATCH, GRID, PATCH).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    cover = np.stack([(cells == i + 1).mean(1) for i in range(len(scene.objects))])
    winner = np.where(cover.max(0) >= COVERED, cover.argmax(0), -1)
    patches, centres = np.zeros((len(LABELS), GRID**2), np.int64), np.zeros((GRID**2, 2), np.float32)
    counts = np.zeros((len(SHAPES) + 1, len(COLOURS) + 1), np.float32)
    for i, o in enumerate(scene.objects):
        above = sum(other.y < o.y for other in scene.objects)
        values = (o.shape, o.colour, o.size, PLACES[i], PLACES[above])
        for row, (value, names) in enumerate(zip(values, LABELS.values(), strict=True)):
            patches[row, winner == i] = 1 + names.index(value)
        centres[winner == i] = (2 * o.x - 1, 2 * o.y - 1)
        counts[SHAPES.index(o.shape), list(COLOURS).index(o.colour)] += 1
    counts[-1, :-1], counts[:-1, -1] = counts[:-1, :-1].sum(0), counts[:-1, :-1].sum(1)
    cluttered = np.array([scene.cluttered, *(cells == CLUTTER).any(1)], np.float32)
    return patches, centres, counts.flatten()[:-1], cluttered


def pretrain_vision(config: DemoHalvesConfig, out: Path, progress: Progress) -> dict[str, float]:
    """Train the tower, save it to `out`; returns the share it says rightly of held-out object patches and pictures."""
    torch.manual_seed(config.seed)
    train = _drawn(random_scenes(config.scenes, "train", config.seed + 1000, WIDE), config.seed)
    held = _drawn(random_scenes(256, "val", config.seed + 1000, WIDE), config.seed + 1)
    tower = new_vision_tower(image_size=SIDE, patch=PATCH, width=128, layers=6, heads=4)
    teacher = PatchTeacher(128)
    order = torch.Generator().manual_seed(config.seed)

    def step() -> Tensor:
        rows = torch.randint(len(train[0]), (config.vision_batch_size,), generator=order)
        pixels, *labels = (part[rows] for part in train)
        return teacher(tower(_to_float(pixels)).last_hidden_state, *labels)

    _optimise([tower, teacher], step, config.vision_steps, config.vision_learning_rate, progress, "vision tower")
    tower.half().save_pretrained(out)
    stored = {
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
        "resample": 3,
        "size": {"height": SIDE, "width": SIDE},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(stored, indent=2) + "\n")
    tower.float().eval()
    with torch.no_grad():
        features_BNE = teacher.norm(tower(_to_float(held[0])).last_hidden_state)
        shown = held[1][:, 0] > 0
        right = {
            f"patch_{kind}": (head(features_BNE[:, 1:]).argmax(-1) == held[1][:, i])[shown]
            for i, (kind, head) in enumerate(zip(LABELS, teacher.patch_heads, strict=True))
        }
        right["cluttered"] = (teacher.cluttered(features_BNE[:, 0]).squeeze(-1) > 0) == held[4][:, 0].bool()
    return {kind: round(float(hits.float().mean()), 4) for kind, hits in right.items()}


def _drawn(scenes: list[Scene], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pixels [n, 3, H, W] as uint8, to be brought to floats batch by batch, and the labels `PatchTeacher` asks for."""
    rng = np.random.default_rng(seed)
    neutral = PIXELS.model_copy(update={"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)})
    pixels, labels = np.empty((len(scenes), 3, SIDE, SIDE), np.uint8), []
    for i, scene in enumerate(scenes):
        picture, objects = draw(scene, DRAWN, rng)
        pixels[i] = np.rint(preprocess(picture, neutral))
        labels.append(_targets(scene, np.asarray(objects.resize((SIDE, SIDE), 0))))
    patches, centres, counts, cluttered = (torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True))
    return torch.from_numpy(pixels), patches, centres, counts, cluttered


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1.0


def _optimise(
    modules: list[nn.Module], step: Callable[[], Tensor], steps: int, rate: float, progress: Progress, title: str
) -> None:
    parameters = [p for module in modules for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=max(0.05, 2 / steps))
    with progress.bar(title, steps) as bar:
        for _ in range(steps):
            loss = step()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            bar.advance(loss=float(loss))


@dataclass(frozen=True)
class Document:
    """One scene as text: its facts, then what a reader of the facts can say."""

    facts: str
    told: tuple[tuple[str, str], ...]
    """(what is given, what follows from it and the facts); nothing is given for a caption."""
    weight: float
    """How much a token of what follows counts."""


def documents(scene: Scene, writer: QuestionWriter, rng: np.random.Generator, prompt: str) -> list[Document]:
    """Short documents about a scene: a caption, questions one by one, and notes.

    The notes ("the star blue small", "the stars: 2") are there for density: a dozen words in one document that only a
    look into the facts decides. The model begins with them alone; without them it guesses among the colours it sees
    for thousands of steps.
    """
    told = facts(scene)
    made = [Document(told, (("", caption(scene)),), 1.0)]
    for question in writer.ask(scene, QUESTIONS):
        made.append(Document(told, ((prompt.format(question.text), f" {question.answer}"),), ANSWER_WEIGHT))
    if len(scene.objects) > 1:
        for page in notes(scene, rng, WIDE).values():
            said = [note for i in rng.permutation(len(page)) for note in page[i]]
            made.append(Document(told, tuple(said[:NOTES]), 1.0))
    return made


def weighted_tokens(tokenizer: PreTrainedTokenizerFast, doc: Document) -> tuple[list[int], list[float]]:
    """Token ids of a document and how much each counts: what the facts decide counts more than what they do not."""
    ids = tokenizer(doc.facts).input_ids  # every text begins with </s>
    weights = [OPEN_WEIGHT] * len(ids)
    for given, said in doc.told:
        heard, spoken = tokenizer(given).input_ids, tokenizer(said, add_special_tokens=False).input_ids
        ids += heard + spoken
        weights += [OPEN_WEIGHT] * len(heard) + [doc.weight] * len(spoken)
    return [*ids, tokenizer.eos_token_id], [*weights, 1.0]


def train_tokenizers(texts: list[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """An OPT-like byte-level BPE (texts begin with </s>) and a BERT-like WordPiece with [DEC]."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=768, special_tokens=specials, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    language = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    piece = Tokenizer(models.WordPiece(_word_pieces(texts, marks), unk_token="[UNK]"))
    piece.normalizer, piece.pre_tokenizer = _as_bert()
    piece.add_special_tokens(marks)
    piece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", piece.token_to_id("[CLS]")), ("[SEP]", piece.token_to_id("[SEP]"))],
    )
    piece.decoder = decoders.WordPiece()
    text = PreTrainedTokenizerFast(
        tokenizer_object=piece,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        bos_token="[DEC]",
    )
    return language, text


def _as_bert() -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def _word_pieces(texts: list[str], marks: list[str]) -> dict[str, int]:
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


def pretrain_language(config: DemoHalvesConfig, out: Path, text_out: Path, progress: Progress) -> dict[str, float]:
    """Train tokenizers and language model; returns held-out weighted loss and answers read off the facts."""
    torch.manual_seed(config.seed)
    rng, writer = np.random.default_rng(config.seed), QuestionWriter(config.seed, WIDE)
    prompt = ModelConfig().vqa_prompt

    def written(scenes_told: int, split: Split) -> list[Document]:
        scenes = random_scenes(scenes_told, split, config.seed + 2000, WIDE)
        return [doc for scene in scenes for doc in documents(scene, writer, rng, prompt)]

    train_docs, held = written(config.told_scenes, "train"), written(128, "val")
    tokenizer, text_tokenizer = train_tokenizers(
        [text for doc in train_docs for text in (doc.facts, *(given + said for given, said in doc.told))]
    )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_language_model(vocabulary=len(tokenizer), width=128, layers=4, heads=4, positions=256, end=end, pad=pad)

    def batch(docs: list[Document]) -> tuple[Tensor, Tensor]:
        """Ids and weights [B, T], cut or padded on the right to the same length; padding has no weight."""
        ids, weights = torch.full((len(docs), DOCUMENT_TOKENS), pad), torch.zeros(len(docs), DOCUMENT_TOKENS)
        for row, doc in enumerate(docs):
            tokens, counts = (part[:DOCUMENT_TOKENS] for part in weighted_tokens(tokenizer, doc))
            ids[row, : len(tokens)], weights[row, : len(tokens)] = torch.tensor(tokens), torch.tensor(counts)
        return ids, weights

    train = batch(train_docs)
    every = torch.arange(len(train_docs))
    dense = torch.tensor([i for i, doc in enumerate(train_docs) if len(doc.told) > 1])
    order, taken = torch.Generator().manual_seed(config.seed), count()

    def loss_of(ids_BT: Tensor, weights_BT: Tensor) -> Tensor:
        logits = model(input_ids=ids_BT).logits  # what follows a token, pads included, never reaches it
        weights = weights_BT[:, 1:].flatten()
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
        return (losses * weights).sum() / weights.sum()

    def step() -> Tensor:
        among = dense if next(taken) < config.note_steps else every
        rows = among[torch.randint(len(among), (config.language_batch_size,), generator=order)]
        return loss_of(train[0][rows], train[1][rows])

    _optimise([model], step, config.language_steps, config.language_learning_rate, progress, "language model")
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    text_tokenizer.save_pretrained(text_out)
    model.float().eval()
    with torch.no_grad():
        loss = float(loss_of(*batch(held)))
        right = []
        for doc in (doc for doc in held if doc.weight == ANSWER_WEIGHT):
            asked, said = doc.told[0]
            ids = torch.tensor([tokenizer(doc.facts).input_ids + tokenizer(asked).input_ids])
            right.append(tokenizer.decode(int(model(input_ids=ids).logits[0, -1].argmax())) == said)
    return {"weighted_loss_nats": round(loss, 4), "answers_read_off_context": round(float(np.mean(right)), 4)}


def build_halves(config: DemoHalvesConfig, out: Path, progress: Progress) -> Path:
    """Make the folders `vision`, `language` and `text` below `out`, and `record.json`: what was made and how well."""
    start = time.perf_counter()
    vision = pretrain_vision(config, out / "vision", progress)
    vision_s = time.perf_counter() - start
    language = pretrain_language(config, out / "language", out / "text", progress)
    record = {
        "settings": config.model_dump(exclude={"rebuild"}),
        "held_out": vision | language,
        "seconds": {"vision": round(vision_s), "language": round(time.perf_counter() - start - vision_s)},
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
    }
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    return out


if __name__ == "__main__":
    build_halves(DemoHalvesConfig(), Path(sys.argv[1]), Progress())
