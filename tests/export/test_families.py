"""Language models of six shapes, exported: the bundle answers as transformers' own `generate`, token for token.

Every model has the same vision tower and bridge weights as the tiny model of conftest.py, so those two graphs are
copied from its bundle; the export judges them again like all others.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import pipeline
from export.calibration import question_ids
from export.config import ExportConfig
from export.graphs import Graph
from export.pipeline import export_bundle
from export.precision.cast import cast_graph
from export.precision.emulate import emulate
from export.precision.files import read_structure
from export.precision.half import write_half
from runtime.answers import Request
from runtime.backends import Device
from runtime.bundle import Bundle, read_bundle
from runtime.checks import relative_error
from runtime.decoding import Decoding
from runtime.errors import BackendUnavailable, CheckFailed, InputError
from runtime.pipeline import Pipeline
from runtime.preprocess import preprocess_batch
from runtime.reference import REFERENCE, read_reference
from runtime.replay import replay
from runtime.stopwatch import Stopwatch
from tests.export.conftest import QUIET
from tests.families import FAMILIES, SPARE_ROWS, write_family
from tests.onnx_graphs import run_graph
from tests.plain import assert_plain
from trainer.blip2 import Blip2, new_blip2
from trainer.checkpoint import load_checkpoint, write_checkpoint
from trainer.generate import EagerPipeline

CONFIG = ExportConfig(verification_images=4, calibration_images=4, max_batch=8)
ENCODER_DECODERS = ("t5", "flan")
READS_PROMPTS = ("llama", "flan")
"""Their Q-Former is given the whole prompt, InstructBLIP's way."""


@dataclass(frozen=True)
class Family:
    """One shape, from checkpoint to bundle."""

    checkpoint: Path
    model: Blip2
    bundle: Bundle

    def again(self, out: Path, config: ExportConfig, manifests: list[Path]) -> Bundle:
        """Exported once more with other settings, from the same traced graphs."""
        exported = export_bundle(
            self.checkpoint,
            out,
            config,
            precision="fp32",
            calibration=manifests,
            recipe_yaml="{}\n",
            reuse=self.bundle.path,
            progress=QUIET,
        )
        return read_bundle(exported)


@pytest.fixture(scope="session")
def images(world: Path) -> list[Path]:
    return sorted((world / "images").glob("train-*.png"))


@pytest.fixture(scope="session")
def asked(images: list[Path]) -> list[Request]:
    """24 images, three requests each: a caption, a question, and a prompt or question of another length."""
    found = []
    for number, image in enumerate(images):
        other = Request(image, "how many blue ones are there", "{}") if number % 2 else Request(image, prompt="two")
        found += [Request(image), Request(image, f"what is left of number {number}?"), other]
    return found


@pytest.fixture(scope="session")
def family(
    model: Blip2, bundle_fp32: Bundle, manifests: list[Path], images: list[Path], tmp_path_factory
) -> Callable[[str], Family]:
    """Family by name, exported in fp32 when it is first asked for."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Family]()
    trace = pipeline.trace

    def traced(graph: Graph, folder: Path) -> Path:
        if graph.name not in ("vision", "qformer"):
            return trace(graph, folder)
        file = folder / bundle_fp32.manifest.graphs[graph.name].file
        shutil.copyfile(bundle_fp32.graph(graph.name), file)
        return file

    def exported(name: str) -> Family:
        config = write_family(name, model.config, root / name / "language").model_copy(
            update={
                "qformer_reads": "prompt" if name in READS_PROMPTS else "question",
                "caption_prompt": "a picture of",
            }
        )
        blip2 = new_blip2(config, question_conditioned=True).eval()
        blip2.bridge.load_state_dict(model.bridge.state_dict())
        blip2.config = config.model_copy(update={"end_token_ids": (2, _often_said(blip2, images))})
        checkpoint = root / name / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(blip2, checkpoint, stage="vqa", metrics={}, recipe_yaml="{}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "trace", traced)
            out = export_bundle(
                checkpoint,
                root / name / "bundle",
                CONFIG,
                precision="fp32",
                calibration=manifests,
                recipe_yaml="{}\n",
                reuse=None,
                progress=QUIET,
            )
        return Family(checkpoint, load_checkpoint(checkpoint), read_bundle(out))

    def cached(name: str) -> Family:
        if name not in made:
            made[name] = exported(name)
        return made[name]

    return cached


def _often_said(model: Blip2, images: list[Path]) -> int:
    """A token that random weights love to say, but not first: as end token it lets some answers end early."""
    answers = [answer.token_ids for answer in EagerPipeline(model).answer([Request(image) for image in images])]
    first = {ids[0] for ids in answers if ids}
    return Counter(token for ids in answers for token in ids if token not in first).most_common(1)[0][0]


def answered(bundle: Bundle, requests: list[Request]) -> list[tuple[int, ...]]:
    with Pipeline(bundle, device=Device(threads=1), cache_bytes=0) as opened:
        return [answer.token_ids for answer in opened.answer(requests)]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bundle_answers_token_for_token(name: str, family, asked: list[Request]) -> None:
    made = family(name)
    expected = [answer.token_ids for answer in EagerPipeline(made.model).answer(asked)]
    together = answered(made.bundle, asked)
    assert together == expected
    lengths = {len(ids) for ids in expected}
    assert max(lengths) == made.model.config.max_new_tokens, "some answers run to the limit"
    assert min(lengths) < made.model.config.max_new_tokens, "some answers end by an end token"
    assert len(set(expected)) >= 12, "a model that always says the same would prove nothing"
    assert max(len(set(ids)) for ids in expected) >= 4, "not one token repeated"


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_of_the_bundle_are_those_of_transformers(name: str, family, asked: list[Request]) -> None:
    """The cache that ONNX Runtime gave is gathered; the settings are in tests/runtime/decoding."""
    made, some = family(name), asked[:24]
    decoding = Decoding(num_beams=3, early_stopping=True, length_penalty=0.5, no_repeat_ngram_size=2)
    expected = [answer.token_ids for answer in EagerPipeline(made.model).answer(some, decoding=decoding)]
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        answers = opened.answer(some, decoding=decoding)
    assert [answer.token_ids for answer in answers] == expected != answered(made.bundle, some)


@pytest.mark.parametrize("name", FAMILIES)
def test_single_requests_equal_the_batch(name: str, family, asked: list[Request]) -> None:
    made, some = family(name), asked[:8]
    assert len({len(prompt_ids(made.model, request)) for request in some}) >= 3, "prompts of unequal length"
    together = answered(made.bundle, some)
    assert together == [answered(made.bundle, [request])[0] for request in some]
    eager = EagerPipeline(made.model)
    assert together == [eager.answer([request])[0].token_ids for request in some]


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_step_equal_one_uncached_pass(name: str, family, asked: list[Request]) -> None:
    """Teacher forcing by transformers' forward, against what the bundle's graphs gave step by step."""
    made, request = family(name), asked[1]
    model, seen = made.model, []
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        speaker = opened._decoder._decoder if name in ENCODER_DECODERS else opened._decoder._language
        run = speaker.run

        def noted(feeds, into):
            outputs = run(feeds, into)
            seen.append(outputs["logits"][0])
            return outputs

        speaker.run = noted
        (answer,) = opened.answer([request])
    logits = whole_pass(model, request, list(answer.token_ids))[: len(seen)]
    assert len(seen) >= 2
    np.testing.assert_allclose(np.stack(seen), logits, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ENCODER_DECODERS])
def test_what_was_read_before_is_not_read_again(name: str, family, images: list[Path], monkeypatch) -> None:
    """Turns about one image, most beginning with one before: the graph begins behind what it knows."""
    made, fed = family(name), list[int]()
    turns = ["what is left", "what is left of it? one two", "what is left of it? one two three", "how many?"]
    prompts = [made.model.tokenizer(turn).input_ids for turn in (*turns, turns[1])]
    pixels_BCHW = preprocess_batch(images[:2], made.model.preprocess)
    with (
        Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as forgets,
        Pipeline(made.bundle, device=Device(threads=1), cache_bytes=1 << 24) as remembers,
    ):
        prefix_BQD = forgets._encoder.encode(pixels_BCHW, [None, None], Stopwatch())
        engine = remembers._decoder._language
        run = engine.run
        monkeypatch.setattr(
            engine, "run", lambda feeds, into: fed.append(feeds["inputs_embeds"].shape[1]) or run(feeds, into)
        )
        for row in range(2):
            for prompt in prompts:
                asked = (prefix_BQD[row : row + 1], [prompt], 8, Stopwatch())
                assert remembers._decoder.generate(*asked) == forgets._decoder.generate(*asked)
        counted = remembers.statistics()["prompts"]
    assert counted["hits"] == 2 * (len(prompts) - 1), "all but the first about each image"
    first = [positions for positions in fed if positions > 1]
    assert len(first) == 2 * (len(prompts) - 1), "a prefill of one position looks like a step"
    assert sum(first) < 2 * sum(4 + len(prompt) for prompt in prompts) / 2


@torch.no_grad()
def whole_pass(model: Blip2, request: Request, said: list[int]) -> np.ndarray:
    """Logits [T, V] that predict what was said, and what would have come next."""
    pixels_BCHW = torch.from_numpy(preprocess_batch([request.image], model.preprocess))
    condition = torch.tensor([question_ids(model, request)])
    prefix_BQD = model.query_prefix(model.encode_image(pixels_BCHW), condition, torch.ones_like(condition))
    embed, prompt = model.language_model.get_input_embeddings(), prompt_ids(model, request)
    if model.style == "encoder-decoder":
        given = torch.cat([prefix_BQD, embed(torch.tensor([prompt]))], dim=1)
        ids = torch.tensor([[model.start_token_id, *said]])
        return model.language_model(inputs_embeds=given, decoder_input_ids=ids).logits[0].numpy()
    given = torch.cat([prefix_BQD, embed(torch.tensor([[*prompt, *said]]))], dim=1)
    return model.language_model(inputs_embeds=given).logits[0, -1 - len(said) :].numpy()


def prompt_ids(model: Blip2, request: Request) -> list[int]:
    text = request.filled_prompt(caption=model.config.caption_prompt, vqa=model.config.vqa_prompt)
    return model.tokenizer(text).input_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_bundle_states(name: str, family) -> None:
    made = family(name)
    manifest, own = made.bundle.manifest, made.model
    cases = {(entry["graph"], entry["case"]) for entry in parity(made.bundle)}
    if name in ENCODER_DECODERS:
        assert manifest.model.style == "encoder-decoder"
        assert list(manifest.graphs) == ["vision", "qformer", "embed", "encoder", "decoder"]
        assert {("encoder", "run"), ("decoder", "prefill"), ("decoder", "step")} < cases
        assert (manifest.limits.max_positions, manifest.limits.max_new_tokens) == (512, 512)
        assert manifest.generation.start_token_id == 1
    else:
        assert manifest.model.style == "decoder-only"
        assert list(manifest.graphs) == ["vision", "qformer", "embed", "language"]
        assert {("language", "prefill"), ("language", "step")} < cases
        assert (manifest.limits.max_positions, manifest.limits.max_new_tokens) == (96, 92)
        assert manifest.generation.start_token_id is None
    assert manifest.model.qformer_reads == own.config.qformer_reads
    assert manifest.generation.eos_token_ids == own.end_token_ids == own.config.end_token_ids
    assert manifest.generation.pad_token_id == (2 if own.tokenizer.pad_token_id is None else 1)
    speaker = manifest.graphs["decoder" if name in ENCODER_DECODERS else "language"]
    assert speaker.outputs["logits"].shape == ("batch", len(own.tokenizer) + SPARE_ROWS)
    assert max(entry["max_error"] for entry in parity(made.bundle)) < 2e-5
    assert all(check.ok for check in replay(made.bundle))


def parity(bundle: Bundle) -> list[dict]:
    return json.loads((bundle.path / "parity.json").read_text())["graphs"]


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_encoder_graph_holds_no_more_than_it_needs(name: str, family) -> None:
    """Of the decoder only what makes cross-attention keys and values; no embedding table in either."""
    made = family(name)
    model = made.model.language_model
    bytes_of = {graph: entry.bytes for graph, entry in made.bundle.manifest.graphs.items()}
    table = model.shared.weight.nbytes
    cross = sum(p.nbytes for n, p in model.decoder.named_parameters() if "EncDecAttention.k" in n or "Attention.v" in n)
    encoder = sum(p.nbytes for p in model.encoder.parameters()) - table
    assert bytes_of["encoder"] < encoder + cross + 40_000
    decoder = sum(p.nbytes for p in model.decoder.parameters())
    assert bytes_of["decoder"] < decoder + 60_000, "the head is there, the table is not"


@pytest.mark.parametrize("name", READS_PROMPTS)
def test_the_prompt_reaches_the_qformer(name: str, family, images: list[Path]) -> None:
    """Captions too are conditioned: another caption prompt is another prefix; the cache tells them apart."""
    bundle = family(name).bundle
    with Pipeline(bundle, device=Device(threads=1), cache_bytes=1 << 20) as opened:
        read = [opened._question_ids(Request(images[0], prompt=prompt)) for prompt in (None, "a picture of", "Two")]
        assert read[0] == read[1] != read[2]
        question = Request(images[0], "What colour?")
        assert opened._question_ids(question) == opened._qformer_tokenizer.encode("Question: what colour? Answer:")
        for prompt in (None, "a picture of", "Two"):
            opened.caption(images[0], prompt=prompt)
        assert opened.cache.hits == 1 + 1, "the same prompt again, and the features of the image for the other"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_empty_prompt(name: str, family, images: list[Path]) -> None:
    """Without a begin token the prefix alone is read; beside longer prompts it is one more unequal row."""
    made = family(name)
    requests = [Request(images[0], prompt=""), Request(images[1]), Request(images[2], prompt="")]
    eager = EagerPipeline(made.model)
    expected = [answer.token_ids for answer in eager.answer(requests)]
    assert answered(made.bundle, requests) == expected
    only_empty = [request for request in requests if request.prompt == ""]
    assert answered(made.bundle, only_empty) == [expected[0], expected[2]]
    assert [answer.token_ids for answer in eager.answer(only_empty)] == [expected[0], expected[2]]


def test_limits_of_an_encoder_decoder(family, images: list[Path]) -> None:
    made = family("t5")
    with Pipeline(made.bundle, device=Device(threads=1), cache_bytes=0) as opened:
        with pytest.raises(InputError, match=r"image and prompt take \d{4,} positions, this bundle has 512"):
            opened.caption(images[0], prompt="red " * 2000)
        with pytest.raises(InputError, match="max_new_tokens: expected 1 to 512"):
            opened.answer([Request(images[0])], max_new_tokens=513)
        prefix = np.zeros((1, 4, 32), np.float32)
        endless = opened._decoder.generate(prefix, [[]], 30, Stopwatch())
        assert len(endless) == 1


@pytest.mark.parametrize("name", ["llama", "flan"])
def test_int8_weights_of_the_language_model(
    name: str, family, manifests: list[Path], images: list[Path], tmp_path: Path
) -> None:
    """Weight-only INT8 in every graph of the language model; close to fp32, and far smaller."""
    made = family(name)
    config = CONFIG.model_copy(update={"language_precision": "int8"})
    loose = config.model_copy(update={"int8": config.int8.model_copy(update={"differing_answers": 1.0})})
    bundle = made.again(tmp_path / "int8", loose, manifests)
    names = ("encoder", "decoder") if name in ENCODER_DECODERS else ("language",)
    assert_plain(made.bundle, names)
    assert_plain(bundle, names)
    for graph in names:
        worst = max(entry["max_error"] for entry in parity(bundle) if entry["graph"] == graph)
        assert 1e-4 < worst < 0.3
        assert bundle.manifest.graphs[graph].bytes < 0.6 * made.bundle.manifest.graphs[graph].bytes
    assert all(len(ids) <= 8 for ids in answered(bundle, [Request(image) for image in images[:3]]))


@pytest.mark.parametrize(
    ("name", "precision", "target"),
    [
        ("llama", "fp16", "onnxruntime"),
        ("flan", "fp16", "onnxruntime"),
        ("flan", "bf16", "onnxruntime"),
        ("flan", "int4", "tensorrt"),
    ],
)
def test_other_types_of_the_language_model(
    name: str, precision: str, target: str, family, manifests: list[Path], images: list[Path], tmp_path: Path
) -> None:
    """Written, verified on rounding as a GPU rounds, smaller, and answered with where a CPU can."""
    made = family(name)
    steep = {"max_error": 2.0, "min_cosine": 0.8} if precision == "int4" else {}  # random weights feel every rounding
    loose = getattr(CONFIG, precision).model_copy(update={"differing_answers": 1.0, **steep})
    config = CONFIG.model_copy(update={"language_precision": precision, "target": target, precision: loose})
    bundle = made.again(tmp_path / "out", config, manifests)
    names = ("encoder", "decoder") if name in ENCODER_DECODERS else ("language",)
    report = json.loads((bundle.path / "precision.json").read_text())
    for graph in names:
        assert report[graph]["verified"] == "emulated"
        assert bundle.manifest.graphs[graph].bytes < 0.65 * made.bundle.manifest.graphs[graph].bytes
        kept = {node["op"]: node["why"] for node in report[graph]["kept"]}
        assert "Softmax" in kept
        assert ("Cos" in kept) == (name == "llama"), "rotary angles are computed from positions"
        assert ("Log" in kept) == (name == "flan"), "buckets are computed from positions"
    if precision == "bf16":
        with pytest.raises(BackendUnavailable, match="computes in BF16"):
            replay(bundle)
    else:
        assert all(check.ok for check in replay(bundle))
        assert all(answered(bundle, [Request(image) for image in images[:3]]))


def test_a_t5_whose_wo_overflows_stays_finite_in_fp16(family, manifests: list[Path], tmp_path: Path) -> None:
    """66,246 came out of a published T5's `wo`; FP16 ends at 65,504. Another norm behind it makes up for the factor."""
    made = family("t5")
    file, plain = tmp_path / "encoder.onnx", tmp_path / "plain.onnx"
    model = onnx.load(made.bundle.graph("encoder"))
    (case,) = [case for case in read_reference(made.bundle.file(REFERENCE)).cases if case.graph == "encoder"]
    activated = {node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[0] in activated]
    assert len(products) == 2
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    last = weights[products[-1].input[1]]
    last.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(last) * np.float32(1e5), last.name))
    onnx.save(model, file)
    shutil.copyfile(file, plain)
    expected = run_graph(file, case.inputs)
    kept = {node.node: node.why for node in write_half(file, [case.inputs], (), low="fp16", bridge=False)}
    assert re.fullmatch(r"reaches [\d,]+ in calibration; FP16 ends at 65,504", kept[products[-1].name])
    assert products[0].name not in kept
    cast_graph(read_structure(plain), plain, "fp16", (), ())
    for path in (file, plain):
        emulate(path)
    found = run_graph(file, case.inputs)
    for name, array in expected.items():
        assert relative_error(found[name].astype(np.float32), array) < 0.02, name
    without = run_graph(plain, case.inputs)["encoder_hidden"]
    assert not np.isfinite(without).all(), "the trap is one"


def test_a_wrong_decoder_is_caught(family, manifests: list[Path], tmp_path: Path, monkeypatch) -> None:
    """The decoder graph traced from other weights than eager's: the judge names it."""
    made, real = family("t5"), pipeline.trace

    def wrong(graph: Graph, folder: Path) -> Path:
        if graph.name != "decoder":
            file = folder / made.bundle.manifest.graphs[graph.name].file
            shutil.copyfile(made.bundle.graph(graph.name), file)
            return file
        head = graph.module.language_model.decoder.final_layer_norm.weight
        head.data *= 1.01
        try:
            return real(graph, folder)
        finally:
            head.data /= 1.01

    monkeypatch.setattr(pipeline, "trace", wrong)
    with pytest.raises(CheckFailed, match=r"graph 'decoder' \(fp32, (prefill|step)\): 'logits' is the worst"):
        export_bundle(
            made.checkpoint,
            tmp_path / "out",
            CONFIG,
            precision="fp32",
            calibration=manifests,
            recipe_yaml="{}\n",
            reuse=None,
            progress=QUIET,
        )
