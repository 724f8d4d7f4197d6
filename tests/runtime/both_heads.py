"""The two tiny bundles in one: it names the strongest colour of an image, and finds images of a colour."""

from pathlib import Path

import onnx

from runtime.bundle import write_manifest
from runtime.files import atomic_folder
from runtime.manifest import Generation, Limits, ModelFacts, Prompts
from runtime.preprocess import PreprocessSettings
from tests.runtime.conftest import ID, SIZE, D, _embed, _graph_files, _language, _qformer, _tokenizer, _vision
from tests.runtime.retrieval_bundle import _itc_image, _itc_text, _itm


def write_bundle_with_both_heads(final: Path) -> Path:
    with atomic_folder(final) as folder:
        (folder / "onnx").mkdir()
        graphs = {
            "vision": _vision(),
            "qformer": _qformer(True),
            "embed": _embed(),
            "language": _language(),
            "itc_image": _itc_image(),
            "itc_text": _itc_text(),
            "itm": _itm(),
        }
        for name, model in graphs.items():
            onnx.save(model, folder / "onnx" / f"{name}.onnx")
        for name in ("tokenizer.json", "qformer_tokenizer.json"):
            _tokenizer().save(str(folder / name))
        write_manifest(
            folder,
            model=ModelFacts(
                style="decoder-only", queries=2, qformer_width=3, language_width=D, question_conditioned=True
            ),
            precision="fp32",
            language_precision="fp32",
            target="onnxruntime",
            limits=Limits(max_batch=3, max_positions=20, max_question_tokens=4, max_new_tokens=8, max_text_tokens=6),
            preprocess=PreprocessSettings(
                height=SIZE, width=SIZE, resample="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
            ),
            prompts=Prompts(caption="photo of", vqa="question {} answer"),
            generation=Generation(eos_token_ids=(ID["</s>"],), pad_token_id=ID["<pad>"], max_new_tokens=5),
            graphs={name: _graph_files(name, model) for name, model in graphs.items()},
            made_by={"tests": "1"},
        )
    return final
