"""Decoders whose cache is written in place: right on ONNX Runtime, step by step, and native to TensorRT."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from export import facts
from export.config import ExportConfig
from export.engines.builder import Builder
from export.engines.plan import build_graph
from export.engines.profiles import profiles_of
from export.engines.refusals import require_buildable
from export.engines.targets import parse_capability
from export.graphs import Arrays, Graph, graphs_of
from export.static_cache import require_static, static_graph
from export.static_verify import judge_static, write_static
from runtime.bundle import Bundle
from runtime.encoder_decoder import SAID_MASK
from runtime.engine_manifest import EngineOptions
from runtime.errors import InputError
from runtime.precision import LanguagePrecision
from runtime.reference import GraphCase
from tests.export.engines.conftest import CONFIG, bundled
from tests.families import new_model
from trainer.blip2 import Blip2, new_blip2

GPUS = tuple(map(parse_capability, ("8.0", "8.6", "8.9", "12.0")))
ROWS, HIDDEN = 2, 2
"""Rows of a batch, and left pads of the second row."""


def with_wide_heads(name: str, std: float = 0.1) -> PreTrainedModel:
    """A family of tests/families.py with four heads of 16, the least that TensorRT's attention takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.families.WIDTH", 64)
        torch.manual_seed(0)
        model = new_model(name, 60)
    if name in ("t5", "flan"):  # theirs is a number of its own
        config = model.config
        config.d_kv = 16
        model = type(model)(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=std)
    return model.eval().requires_grad_(False)


def speaking(model: Blip2, language_model: PreTrainedModel) -> Blip2:
    """The tiny model with another language model."""
    other = new_blip2(model.config, question_conditioned=True).eval()
    other.language_model = language_model
    return other


def cases_of(graph: Graph) -> list[GraphCase]:
    """Prefill and three steps of the portable graph, as eager PyTorch computes them, each from the last one's cache."""
    rng, cases = np.random.default_rng(0), list[GraphCase]()
    decoder_only = graph.name == "language"
    shapes = {name: tuple(plan.example.shape) for name, plan in graph.inputs.items()}
    width = shapes["inputs_embeds"][-1]
    past = {n: np.zeros((ROWS, s[1], 0, s[3]), np.float32) for n, s in shapes.items() if n.startswith("past_")}
    fixed = {n: rng.normal(size=(ROWS, *s[1:])).astype(np.float32) for n, s in shapes.items() if n.startswith("cross_")}
    seen = 0
    for new in (5, 1, 1, 1) if decoder_only else (1, 1, 1, 1):
        seen += new
        mask = np.ones((ROWS, seen if decoder_only else shapes["attention_mask"][1]), np.int64)
        mask[1, :HIDDEN] = 0
        embeds = rng.normal(size=(ROWS, new, width)).astype(np.float32)
        feeds: Arrays = {"inputs_embeds": embeds, "attention_mask": mask, **past, **fixed}
        if SAID_MASK in shapes:
            feeds[SAID_MASK] = np.ones((ROWS, seen), np.int64)
        outputs = graph.run_eager(feeds)
        past = {name: outputs[name.replace("past_", "present_")] for name in past}
        kept = {"logits": outputs["logits"]} if decoder_only else outputs  # pads' cache entries are nobody's to compare
        cases.append(GraphCase(graph.name, f"step {seen}", feeds, kept, dict.fromkeys(kept, 0.02)))
    return cases


@dataclass(frozen=True)
class Twin:
    """A static decoder, traced, in a bundle of its own."""

    bundle: Bundle
    graph: Graph
    cases: list[GraphCase]


@pytest.fixture(scope="module")
def twin(model: Blip2, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, LanguagePrecision], Twin]:
    made = dict[tuple[str, LanguagePrecision], Twin]()

    def traced(family: str, precision: LanguagePrecision) -> Twin:
        blip2 = speaking(model, with_wide_heads(family))
        folder, portable = tmp_path_factory.mktemp(family), graphs_of(blip2)
        graph = write_static(blip2, portable, precision, facts.limits(blip2, CONFIG, "generate"), folder)
        bundle = bundled(folder, blip2, (graph.name,), language_precision=precision)
        return Twin(bundle, graph, cases_of(portable[graph.name.removesuffix("_static")]))

    def cached(family: str, precision: LanguagePrecision) -> Twin:
        if (family, precision) not in made:
            made[family, precision] = traced(family, precision)
        return made[family, precision]

    return cached


TRACED = [("llama", "fp16"), ("flan", "fp16"), ("opt", "bf16")]
"""Grouped heads and rotary positions; relative positions and cross-attention; learned positions."""


@pytest.mark.parametrize(("family", "precision"), TRACED)
def test_each_step_is_that_of_eager(
    family: str, precision: LanguagePrecision, twin: Callable[[str, LanguagePrecision], Twin]
) -> None:
    made = twin(family, precision)
    parities = judge_static(made.bundle, made.graph, made.cases, CONFIG.tolerance(precision))
    assert {parity.case for parity in parities} == {case.case for case in made.cases}
    assert all(parity.ok for parity in parities), [parity for parity in parities if not parity.ok]


@pytest.mark.parametrize(("family", "precision"), TRACED)
def test_tensorrt_updates_the_cache_in_place(
    family: str, precision: LanguagePrecision, twin: Callable[[str, LanguagePrecision], Twin], rtx: Builder
) -> None:
    made = twin(family, precision)
    name, caches = made.graph.name, sum(name.startswith("past_") for name in made.graph.inputs)
    require_buildable(made.bundle.graph(name), name, rtx.engine, GPUS)
    profiles = profiles_of(name, made.bundle.manifest, ())
    built = build_graph(made.bundle.graph(name), name, rtx, GPUS, profiles, EngineOptions())
    layers = Counter(built.layers)
    assert layers["KV_CACHE_UPDATE"] == caches
    assert layers["ATTENTION_INPUT"] == sum(n.startswith(("past_key", "cross_key")) for n in made.graph.inputs)
    held = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert {built.inputs[n].dtype for n in made.graph.inputs if n.startswith("past_")} == {held}


def test_grouped_heads_stay_few(twin: Callable[[str, LanguagePrecision], Twin]) -> None:
    made = twin("llama", "fp16")
    graph = onnx.load(str(made.bundle.graph("language_static"))).graph
    cache = next(value for value in graph.input if value.name == "past_key_0").type.tensor_type
    assert [size.dim_value for size in cache.shape.dim][1:] == [2, 96, 16]  # four heads ask, two are kept
    attends = next(node for node in graph.node if node.op_type == "Attention")
    assert attends.input[1] in {node.output[0] for node in graph.node if node.op_type == "TensorScatter"}


def test_a_missed_tolerance_is_seen(twin: Callable[[str, LanguagePrecision], Twin]) -> None:
    made = twin("llama", "fp16")
    spoilt = [replace(case, outputs={"logits": case.outputs["logits"] + 1.0}) for case in made.cases[:1]]
    parities = judge_static(made.bundle, made.graph, spoilt, CONFIG.fp16)
    assert not any(parity.ok for parity in parities)


@pytest.mark.parametrize("family", ["opt", "gpt2", "qwen2", "t5"])
def test_other_families_say_the_same_without_tracing(family: str, model: Blip2) -> None:
    """The module computes eagerly what its two operators would, so a family costs no trace here."""
    blip2 = speaking(model, with_wide_heads(family))
    portable = graphs_of(blip2)["decoder" if family == "t5" else "language"]
    graph = static_graph(blip2, portable, "fp16", facts.limits(blip2, CONFIG, "generate"))
    first = cases_of(portable)[0]
    new = first.inputs["inputs_embeds"].shape[1]
    feeds: dict[str, Tensor] = {name: torch.zeros_like(plan.example) for name, plan in graph.inputs.items()}
    feeds["inputs_embeds"] = torch.from_numpy(first.inputs["inputs_embeds"])
    feeds |= {n: torch.from_numpy(a).half() for n, a in first.inputs.items() if n.startswith("cross_")}
    feeds["attention_mask"][:, : first.inputs["attention_mask"].shape[1]] = torch.from_numpy(
        first.inputs["attention_mask"]
    )
    with torch.no_grad():
        logits, keys, *_ = graph.module(*feeds.values())
    expected = first.outputs["logits"]
    assert np.abs(logits.numpy() - expected).max() < 0.02 * np.abs(expected).max()
    assert keys[:, :, :new].abs().sum() > 0
    assert not keys[:, :, new:].any()


def test_what_a_family_keeps_in_fp32_stays(model: Blip2) -> None:
    blip2 = speaking(model, with_wide_heads("t5"))
    portable = graphs_of(blip2)["decoder"]
    limits = facts.limits(blip2, CONFIG, "generate")
    kept = static_graph(blip2, portable, "fp16", limits).module.state_dict()
    assert {tensor.dtype for name, tensor in kept.items() if ".wo." in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in kept.items() if ".wi." in name} == {torch.float16}
    assert {parameter.dtype for parameter in blip2.language_model.parameters()} == {torch.float32}


def test_a_window_is_refused(model: Blip2) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(**sizes, num_key_value_heads=1, vocab_size=60, sliding_window=8, head_dim=16)
    config.max_position_embeddings = 96
    blip2 = speaking(model, MistralForCausalLM(config).eval())
    with pytest.raises(InputError, match=r"MistralForCausalLM looks back 8 positions, fewer than the 96"):
        static_graph(blip2, graphs_of(blip2)["language"], "fp16", facts.limits(blip2, CONFIG, "generate"))


def test_narrow_heads_are_refused(model: Blip2) -> None:
    with pytest.raises(InputError, match=r"heads of width \[8\].*multiples of 8 from 16 to 256"):
        static_graph(model, graphs_of(model)["language"], "fp16", facts.limits(model, CONFIG, "generate"))


def test_a_family_that_attends_its_own_way_is_refused(twin: Callable[[str, LanguagePrecision], Twin]) -> None:
    made = twin("llama", "fp16")
    traced = onnx.load(str(made.bundle.graph("language_static")))
    next(node for node in traced.graph.node if node.op_type == "Attention").op_type = "MatMul"
    with pytest.raises(InputError, match="expected 2 Attention and 4 TensorScatter nodes, found 1 and 4"):
        require_static(traced, made.graph)


def test_the_setting_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="static_cache needs target tensorrt and language_precision fp16 or bf16"):
        ExportConfig(static_cache=True, language_precision="fp16")
    with pytest.raises(ValueError, match="found tensorrt and int4"):
        ExportConfig(static_cache=True, language_precision="int4", target="tensorrt")
