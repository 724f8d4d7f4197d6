"""A tiny real bundle that searches, whose scores can be told by hand: it compares colours.

An image's feature is how red, green and blue it is, a text's the colours it names; both of length one, so ITC is their
cosine. ITM reads the same, but "opposite" turns its verdict round, which ITC does not notice: re-ranking shows.

Shape letters: B rows, T tokens, V vocabulary
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from runtime.bundle import write_manifest
from runtime.files import atomic_folder
from runtime.manifest import Generation, Limits, ModelFacts, Prompts
from runtime.preprocess import PreprocessSettings
from runtime.reference import REFERENCE, GraphCase, RetrievalCase, write_reference
from tests.runtime.conftest import FLOAT, ID, INT64, SIZE, V, _graph_files, _model, _tokenizer, _vision

COLOURS = ("red", "green", "blue")
LOGIT = 10.0
"""ITM's match logit of a picture in just the colour that is named."""


def write_retrieval_bundle(final: Path, *, max_batch: int = 3) -> Path:
    with atomic_folder(final) as folder:
        (folder / "onnx").mkdir()
        graphs = {"vision": _vision(), "itc_image": _itc_image(), "itc_text": _itc_text(), "itm": _itm()}
        for name, model in graphs.items():
            onnx.save(model, folder / "onnx" / f"{name}.onnx")
        _tokenizer().save(str(folder / "qformer_tokenizer.json"))
        _write_reference(folder / REFERENCE)
        write_manifest(
            folder,
            model=ModelFacts(style="none", queries=1, qformer_width=3, language_width=None, question_conditioned=False),
            precision="fp32",
            language_precision="fp32",
            target="onnxruntime",
            limits=Limits(
                max_batch=max_batch, max_positions=0, max_question_tokens=0, max_new_tokens=0, max_text_tokens=6
            ),
            preprocess=PreprocessSettings(
                height=SIZE, width=SIZE, resample="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
            ),
            prompts=Prompts(caption="", vqa=""),
            generation=Generation(eos_token_ids=(), pad_token_id=0, max_new_tokens=0),
            graphs={name: _graph_files(name, model) for name, model in graphs.items()},
            made_by={"tests": "1"},
        )
    return final


def _write_reference(path: Path) -> None:
    pixels_BCHW = np.zeros((4, 3, SIZE, SIZE), np.float32)
    for row, channel in enumerate((0, 1, 2, 2)):
        pixels_BCHW[row, channel] = 1.0
    texts = tuple((ID["<s>"], ID[colour]) for colour in ("red", "green", "red", "blue"))
    itc = np.array([1, 1, 0, 1], np.float32)
    logits = np.stack([np.zeros(4), LOGIT * itc], axis=1).astype(np.float32)
    case = GraphCase(
        "vision",
        "colours",
        {"pixels": pixels_BCHW},
        {"image_embeds": pixels_BCHW.mean((2, 3))[:, None]},
        {"image_embeds": 1e-6},
    )
    write_reference(path, [case], None, RetrievalCase(pixels_BCHW, texts, itc, logits, 1e-6))


def _itc_image() -> onnx.ModelProto:
    nodes = [helper.make_node("LpNormalization", ["image_embeds"], ["image_features"], axis=-1, p=2)]
    return _model(nodes, {"image_embeds": (FLOAT, ["B", 1, 3])}, {"image_features": (FLOAT, ["B", 1, 3])}, {})


def _text_nodes() -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Which colours a text names: `colours` [B, 3]."""
    table = np.zeros((V, 3), np.float32)
    for channel, colour in enumerate(COLOURS):
        table[ID[colour], channel] = 1.0
    nodes = [
        helper.make_node("Gather", ["table", "text_ids"], ["words"]),
        helper.make_node("Cast", ["text_mask"], ["mask_float"], to=FLOAT),
        helper.make_node("Unsqueeze", ["mask_float", "last_axis"], ["mask_BT1"]),
        helper.make_node("Mul", ["words", "mask_BT1"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "token_axis"], ["named"], keepdims=0),
        helper.make_node("LpNormalization", ["named"], ["colours"], axis=-1, p=2),
    ]
    return nodes, {"table": table, "last_axis": np.array([2]), "token_axis": np.array([1])}


TEXT = {"text_ids": (INT64, ["B", "T"]), "text_mask": (INT64, ["B", "T"])}


def _itc_text() -> onnx.ModelProto:
    nodes, constants = _text_nodes()
    nodes.append(helper.make_node("Identity", ["colours"], ["text_feature"]))
    return _model(nodes, TEXT, {"text_feature": (FLOAT, ["B", 3])}, constants)


def _itm() -> onnx.ModelProto:
    """[0, 10 · cosine]; turned round when the text says "opposite"."""
    nodes, constants = _text_nodes()
    nodes += [
        helper.make_node("LpNormalization", ["image_embeds"], ["unit_B13"], axis=-1, p=2),
        helper.make_node("Squeeze", ["unit_B13", "token_axis"], ["unit"]),
        helper.make_node("Mul", ["unit", "colours"], ["products"]),
        helper.make_node("ReduceSum", ["products", "token_axis"], ["cosine"], keepdims=1),
        helper.make_node("Equal", ["text_ids", "opposite"], ["is_opposite"]),
        helper.make_node("Cast", ["is_opposite"], ["opposite_int"], to=INT64),
        helper.make_node("Mul", ["opposite_int", "text_mask"], ["opposite_seen"]),
        helper.make_node("ReduceMax", ["opposite_seen", "token_axis"], ["opposite_any"], keepdims=1),
        helper.make_node("Cast", ["opposite_any"], ["opposite_float"], to=FLOAT),
        helper.make_node("Mul", ["opposite_float", "twice"], ["turned"]),
        helper.make_node("Add", ["turned", "logit"], ["factor"]),
        helper.make_node("Mul", ["cosine", "factor"], ["match"]),
        helper.make_node("Mul", ["match", "nothing"], ["no_match"]),
        helper.make_node("Concat", ["no_match", "match"], ["match_logits"], axis=1),
    ]
    constants |= {
        "opposite": np.array(ID["opposite"]),
        "logit": np.array(LOGIT, np.float32),
        "twice": np.array(-2 * LOGIT, np.float32),
        "nothing": np.array(0.0, np.float32),
    }
    return _model(nodes, {"image_embeds": (FLOAT, ["B", 1, 3]), **TEXT}, {"match_logits": (FLOAT, ["B", 2])}, constants)
