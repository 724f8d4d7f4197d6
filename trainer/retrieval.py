"""Eager PyTorch behind the same questions as a bundle that searches: the slow path that judges the fast one."""

from collections.abc import Sequence

import torch

from runtime.preprocess import ImageSource, preprocess_batch
from runtime.retrieval import Floats, ImageEmbeddings, caption_words
from trainer.blip2 import Blip2, TextBatch, text_batch
from trainer.bridge import Part

NEEDS: tuple[Part, ...] = ("text", "contrast", "matching")
"""Parts of the bridge that searching needs."""
EAGER_BATCH = 64


# Shape letters: B rows, N image tokens, E image width, Q queries, F contrastive width
class EagerRetrieval:
    """A `runtime.retrieval.Retriever` over the PyTorch model."""

    def __init__(self, model: Blip2) -> None:
        """CheckpointError when the model has no heads to search with."""
        model.bridge.need(*NEEDS)
        self.model = model.eval()
        self.max_batch = EAGER_BATCH

    @torch.no_grad()
    def embed_images(self, images: Sequence[ImageSource]) -> ImageEmbeddings:
        """Features [B, Q, F] for ITC and embeddings [B, N, E] for ITM."""
        pixels_BCHW = torch.from_numpy(preprocess_batch(images, self.model.preprocess)).to(self._device)
        embeds_BNE = self.model.encode_image(pixels_BCHW)
        features_BQF = self.model.bridge.image_features(self.model.bridge.image_keys(embeds_BNE), len(embeds_BNE))
        return ImageEmbeddings(features_BQF.cpu().numpy(), embeds_BNE.cpu().numpy())

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Floats:
        """Features [B, F] for ITC."""
        batch = self._tokens(texts)
        features_BF: Floats = self.model.bridge.text_features(batch.ids, batch.mask).cpu().numpy()
        return features_BF

    @torch.no_grad()
    def match(self, image_embeds_BNE: Floats, texts: Sequence[str]) -> Floats:
        """ITM logits [B, 2] (no match, match) of image b with text b."""
        batch = self._tokens(texts)
        keys = self.model.bridge.image_keys(torch.from_numpy(image_embeds_BNE).to(self._device))
        logits_B2: Floats = self.model.bridge.matching_logits(keys, batch.ids, batch.mask).cpu().numpy()
        return logits_B2

    @property
    def _device(self) -> torch.device:
        return self.model.bridge.query_tokens.device

    def _tokens(self, texts: Sequence[str]) -> TextBatch:
        return text_batch(self.model, [caption_words(text) for text in texts])
