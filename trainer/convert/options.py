"""What a user may say about an import; no torch here."""

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InputError


@dataclass(frozen=True)
class ImportOptions:
    """Everything beside the source; None: as the source has it."""

    vision: Path | None = None
    """LAVIS: folder of the frozen image encoder."""
    language: Path | None = None
    """LAVIS stage 2: folder of the frozen language model."""
    text_tokenizer: Path | None = None
    """LAVIS with a text branch: folder of BERT's tokenizer."""
    text_from: Path | None = None
    """Checkpoint whose text branch (embeddings, text FFN, heads, temperature) is taken over."""
    image_size: int | None = None
    """Side of the pixels; the tower's position embeddings are interpolated to it."""
    vision_layer: int | None = None
    """LAVIS: hidden state of the image encoder that the Q-Former sees; None: the last (-2 for its CLIP ViT-L)."""
    heads: int | None = None
    """LAVIS: attention heads of the Q-Former; a state dict does not say. None: width / 64, as in BERT."""
    caption_prompt: str | None = None
    vqa_prompt: str | None = None

    def refuse_folders(self, why: str) -> None:
        """InputError when a folder or number is given that only a LAVIS file needs."""
        for name in ("vision", "language", "text_tokenizer", "vision_layer", "heads"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is for LAVIS files; {why}")
