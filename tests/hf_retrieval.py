"""transformers' own retrieval model with the weights of ours, the judge of ITC and ITM scores.

Its vision tower is exchanged for ours (any tower may stand there with us); everything behind it, and the scores, are
transformers' code.
"""

from typing import Any

import numpy as np
import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig, Blip2VisionConfig

from runtime.preprocess import preprocess_batch
from trainer.blip2 import Blip2, text_batch
from trainer.checkpoint import bridge_tensors

ONLY_OURS = ("temperature", "itg_head.", "language_projection.", "vision_model.")


class OurTower(torch.nn.Module):
    def __init__(self, model: Blip2) -> None:
        super().__init__()
        self.encode = model.encode_image

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (self.encode(pixel_values),)


def hf_twin(model: Blip2) -> Blip2ForImageTextRetrieval:
    sizes = model.config.qformer
    unused = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 14}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(hidden_size=model.vision.width, **unused).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.ffn_width,
            cross_attention_frequency=sizes.cross_attention_frequency,
            vocab_size=len(model.text_tokenizer),
            use_qformer_text_input=True,
        ).to_dict(),
        num_query_tokens=sizes.queries,
        image_text_hidden_size=sizes.contrastive_width,
    )
    theirs = Blip2ForImageTextRetrieval(config).eval()
    tensors = {key: value for key, value in bridge_tensors(model).items() if not key.startswith(ONLY_OURS)}
    report = theirs.load_state_dict(tensors, strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith("vision_model.") for key in report.missing_keys)
    theirs.vision_model = OurTower(model)
    return theirs


@torch.no_grad()
def hf_scores(model: Blip2, images: list, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """ITC [images, texts] and ITM logits [images, texts, 2]; every text by itself, so nothing is padded."""
    theirs = hf_twin(model)
    pixels = torch.from_numpy(preprocess_batch(images, model.preprocess))
    itc, itm = [], []
    for text in texts:
        batch = text_batch(model, [text])
        given = {"pixel_values": pixels, "input_ids": batch.ids, "attention_mask": batch.mask}
        itc.append(theirs(**given).logits_per_image[:, 0].numpy())
        rows = {name: tensor.expand(len(images), -1) for name, tensor in given.items() if name != "pixel_values"}
        itm.append(theirs(pixel_values=pixels, **rows, use_image_text_matching_head=True).logits_per_image.numpy())
    return np.stack(itc, axis=1), np.stack(itm, axis=1)
