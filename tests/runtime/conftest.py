"""A tiny real bundle whose answers can be told by hand: it names the strongest colour of an image.

Four ONNX graphs, written here with `onnx.helper` and run by the real onnxruntime. The prefix carries how red, green
and blue the image is; the language graph sums that evidence over all cached positions, so a lost cache or a wrong
prefix changes the answer. After any prompt it says "a", then the colour, then ends. The question word "opposite" makes
the Q-Former turn the evidence round.

Shape letters: B rows, S new positions, P cached positions, T tokens, V vocabulary, Q = 2 queries, D = 2V width
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from runtime.bundle import GraphFiles, write_manifest
from runtime.files import atomic_folder
from runtime.manifest import Generation, Limits, ModelFacts, Prompts, TensorSpec
from runtime.preprocess import PreprocessSettings
from runtime.reference import REFERENCE, ChainCase, GraphCase, write_reference

WORDS = "<pad> <s> </s> a red green blue photo of opposite colour question answer <unk>"
ID = {word: index for index, word in enumerate(WORDS.split())}
V = len(ID)
D = 2 * V
SIZE = 8
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture(scope="session")
def make_tiny_bundle() -> Callable[..., Path]:
    """Write a bundle under a path and return it; keywords change the limits or drop the question."""
    return write_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One question-conditioned bundle for the whole run; do not change it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def write_tiny_bundle(final: Path, *, question_conditioned: bool = True, **limits: int) -> Path:
    with atomic_folder(final) as folder:
        _write_reference(folder / REFERENCE)
        write_answering(folder, {}, question_conditioned=question_conditioned, **limits)
    return final


def write_answering(
    folder: Path, more: dict[str, onnx.ModelProto], *, question_conditioned: bool = True, **limits: int
) -> None:
    """The four graphs and `more`, both tokenizers, and a manifest of all that is in the folder."""
    graphs = {
        "vision": _vision(),
        "qformer": _qformer(question_conditioned),
        "embed": _embed(),
        "language": _language(),
        **more,
    }
    (folder / "onnx").mkdir()
    for name, model in graphs.items():
        onnx.save(model, folder / "onnx" / f"{name}.onnx")
    _tokenizer().save(str(folder / "tokenizer.json"))
    if question_conditioned:
        _tokenizer().save(str(folder / "qformer_tokenizer.json"))
    write_manifest(
        folder,
        model=ModelFacts(
            style="decoder-only",
            queries=2,
            qformer_width=3,
            language_width=D,
            question_conditioned=question_conditioned,
        ),
        precision="fp32",
        language_precision="fp32",
        target="onnxruntime",
        limits=Limits(**{"max_batch": 3, "max_positions": 20, "max_question_tokens": 4, "max_new_tokens": 8} | limits),
        preprocess=PreprocessSettings(
            height=SIZE, width=SIZE, resample="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
        ),
        prompts=Prompts(caption="photo of", vqa="question {} answer"),
        generation=Generation(eos_token_ids=(ID["</s>"],), pad_token_id=ID["<pad>"], max_new_tokens=5),
        graphs={name: _graph_files(name, model) for name, model in graphs.items()},
        made_by={"tests": "1"},
    )


def _write_reference(path: Path) -> None:
    """What the graphs must give, told by hand."""
    pixels_BCHW = np.zeros((4, 3, SIZE, SIZE), np.float32)
    for row, channel in enumerate((0, 1, 2, 1)):
        pixels_BCHW[row, channel] = 1.0
    vision = GraphCase(
        "vision",
        "colours",
        {"pixels": pixels_BCHW},
        {"image_embeds": pixels_BCHW.mean(axis=(2, 3))[:, None]},
        {"image_embeds": 1e-6},
    )
    prompt = (ID["<s>"], ID["photo"])
    chain = ChainCase(
        pixels_BCHW=pixels_BCHW,
        prompts=(prompt, prompt, (ID["<s>"],), prompt),
        questions=(None, None, None, None),
        token_ids=tuple((ID["a"], ID[colour]) for colour in ("red", "green", "blue", "green")),
        max_new_tokens=4,
        tolerance=0.0,
    )
    write_reference(path, [vision], chain)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ID["<s>"])])
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return tokenizer


def _vision() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "image_axes"], ["means"], keepdims=0),
        helper.make_node("Unsqueeze", ["means", "one"], ["image_embeds"]),
    ]
    constants = {"image_axes": np.array([2, 3]), "one": np.array([1])}
    return _model(nodes, {"pixels": (FLOAT, ["B", 3, SIZE, SIZE])}, {"image_embeds": (FLOAT, ["B", 1, 3])}, constants)


def _qformer(question_conditioned: bool) -> onnx.ModelProto:
    colours = np.zeros((3, D), np.float32)
    for channel, colour in enumerate(("red", "green", "blue")):
        colours[channel, V + ID[colour]] = 1.0
    inputs = {"image_embeds": (FLOAT, ["B", 1, 3])}
    constants = {"colours": colours}
    evidence, turning = "image_embeds", []
    if question_conditioned:
        evidence = "turned"
        inputs |= {"question_ids": (INT64, ["B", "T"]), "question_mask": (INT64, ["B", "T"])}
        constants |= {
            "opposite": np.array(ID["opposite"]),
            "token_axis": np.array([1]),
            "two": np.array(2.0, np.float32),
            "unit": np.array(1.0, np.float32),
        }
        turning = [
            helper.make_node("Equal", ["question_ids", "opposite"], ["is_opposite"]),
            helper.make_node("Cast", ["is_opposite"], ["opposite_int"], to=INT64),
            helper.make_node("Mul", ["opposite_int", "question_mask"], ["opposite_seen"]),
            helper.make_node("ReduceMax", ["opposite_seen", "token_axis"], ["opposite_any"], keepdims=1),
            helper.make_node("Unsqueeze", ["opposite_any", "token_axis"], ["opposite_B11"]),
            helper.make_node("Cast", ["opposite_B11"], ["opposite_float"], to=FLOAT),
            helper.make_node("Mul", ["opposite_float", "two"], ["twice"]),
            helper.make_node("Sub", ["unit", "twice"], ["sign"]),
            helper.make_node("Mul", ["image_embeds", "sign"], ["turned"]),
        ]
    nodes = [
        *turning,
        helper.make_node("MatMul", [evidence, "colours"], ["query"]),
        helper.make_node("Concat", ["query", "query"], ["prefix"], axis=1),
    ]
    return _model(nodes, inputs, {"prefix": (FLOAT, ["B", 2, D])}, constants)


def _embed() -> onnx.ModelProto:
    table = np.eye(V, D, dtype=np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])]
    return _model(
        nodes, {"input_ids": (INT64, ["B", "T"])}, {"inputs_embeds": (FLOAT, ["B", "T", D])}, {"table": table}
    )


def _language() -> onnx.ModelProto:
    follows = np.zeros((V, V), np.float32)
    colours = [ID["red"], ID["green"], ID["blue"]]
    follows[:, ID["a"]] = 50.0
    follows[ID["a"]] = 0.0
    follows[ID["a"], colours] = 50.0
    follows[colours] = 0.0
    follows[colours, ID["</s>"]] = 50.0
    nodes = [
        helper.make_node("Split", ["inputs_embeds"], ["words", "evidence"], axis=2, num_outputs=2),
        helper.make_node("Unsqueeze", ["words", "one"], ["keys"]),
        helper.make_node("Unsqueeze", ["evidence", "one"], ["values"]),
        helper.make_node("Concat", ["past_key_0", "keys"], ["present_key_0"], axis=2),
        helper.make_node("Concat", ["past_value_0", "values"], ["present_value_0"], axis=2),
        helper.make_node("Cast", ["attention_mask"], ["mask_float"], to=FLOAT),
        helper.make_node("Unsqueeze", ["mask_float", "mask_axes"], ["mask_B1P1"]),
        helper.make_node("Mul", ["present_value_0", "mask_B1P1"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "sum_axes"], ["evidence_BV"], keepdims=0),
        helper.make_node("Gather", ["words", "last"], ["last_word"], axis=1),
        helper.make_node("MatMul", ["last_word", "follows"], ["next_word"]),
        helper.make_node("Add", ["next_word", "evidence_BV"], ["logits"]),
    ]
    past, present = (FLOAT, ["B", 1, "P", V]), (FLOAT, ["B", 1, "P+S", V])
    return _model(
        nodes,
        {
            "inputs_embeds": (FLOAT, ["B", "S", D]),
            "attention_mask": (INT64, ["B", "P+S"]),
            "past_key_0": past,
            "past_value_0": past,
        },
        {"logits": (FLOAT, ["B", V]), "present_key_0": present, "present_value_0": present},
        {
            "one": np.array([1]),
            "mask_axes": np.array([1, 3]),
            "sum_axes": np.array([1, 2]),
            "last": np.array(-1),
            "follows": follows,
        },
    )


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list]],
    outputs: dict[str, tuple[int, list]],
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _graph_files(name: str, model: onnx.ModelProto) -> GraphFiles:
    def specs(values) -> dict[str, TensorSpec]:
        return {
            value.name: TensorSpec(
                dtype="int64" if value.type.tensor_type.elem_type == INT64 else "float32",
                shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        }

    return GraphFiles(
        file=f"onnx/{name}.onnx", inputs=specs(model.graph.input), outputs=specs(model.graph.output), data=None
    )
