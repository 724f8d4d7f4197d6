"""Fewer nodes, the same numbers: a narrow decoder before and after, on empty and filled caches, with padded rows."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from export.graphs import BATCH, NEW, PAST, Graph, InputPlan
from export.language_modules import LanguageGraph
from export.precision.fuse import fuse
from export.precision.weights import write_nbits
from export.trace import trace
from runtime.backends.ort import OrtEngine

WIDTH, HEADS, LAYERS = 64, 4, 2


def opt():
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 128, "num_hidden_layers": LAYERS}
    config = OPTConfig(**sizes, num_attention_heads=HEADS, vocab_size=320, init_std=0.2)
    return OPTForCausalLM(config), HEADS


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, vocab_size=320)), HEADS


def llama():  # half as many heads for keys and values, and rotary positions
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 320}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=HEADS, num_key_value_heads=2)), 2


@pytest.fixture(scope="module", params=[opt, gpt2, llama], ids=lambda make: make.__name__)
def before_and_after(request, tmp_path_factory):
    torch.manual_seed(0)
    model, heads = request.param()
    shape = (BATCH, heads, PAST, WIDTH // HEADS)
    past = {
        f"past_{kind}_{layer}": InputPlan(torch.zeros(shape), {0: "batch", 2: "past"})
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }
    inputs = {
        "inputs_embeds": InputPlan(torch.zeros(BATCH, NEW, WIDTH), {0: "batch", 1: "new"}),
        "attention_mask": InputPlan(torch.ones(BATCH, PAST + NEW, dtype=torch.long), {0: "batch", 1: "past + new"}),
        **past,
    }
    present = {name.replace("past", "present"): {0: "batch", 2: "past + new"} for name in past}
    graph = Graph("language", LanguageGraph(model.eval()).eval(), inputs, {"logits": {0: "batch"}, **present})
    plain = trace(graph, tmp_path_factory.mktemp("plain"))
    write_nbits(plain, [], bits=8)
    fused = tmp_path_factory.mktemp("fused") / "language.onnx"
    fused.write_bytes(plain.read_bytes())
    return plain, fused, fuse(fused)


def test_every_attention_and_every_product_is_one_node(before_and_after):
    plain, fused, attentions = before_and_after
    before, after = (Counter(node.op_type for node in onnx.load(str(file)).graph.node) for file in (plain, fused))
    assert attentions == after["MultiHeadAttention"] == LAYERS - after["Softmax"]
    if after["Softmax"]:  # grouped heads are repeated in a way that onnxscript's patterns do not know: those nodes stay
        assert before["Expand"] > 2 * LAYERS
        return
    assert after["MatMulNBits"] == 4 * LAYERS + 1, (
        "query, key and value are one product; attention's own, two, the head"
    )
    assert sum(after.values()) < 0.7 * sum(before.values())


@pytest.mark.parametrize(("rows", "new", "past"), [(1, 5, 0), (1, 1, 7), (3, 5, 0), (3, 1, 7), (1, 4, 7)])
def test_the_numbers_stay(before_and_after, rows, new, past):
    plain, fused, _ = before_and_after
    rng = np.random.default_rng(rows + new)
    mask = np.ones((rows, past + new), np.int64)
    padded = 2 if rows > 1 else 0
    mask[0, :padded] = 0
    with OrtEngine(plain, threads=1) as slow, OrtEngine(fused, threads=1) as fast:
        assert (fast.inputs(), fast.outputs()) == (slow.inputs(), slow.outputs()), "names of varying sizes stay too"
        sizes = {"batch": rows, "past": past, "new": new}
        feeds = {
            name: rng.normal(size=[sizes.get(size, size) for size in shape]).astype(np.float32)
            for name, shape in slow.inputs().items()
            if name != "attention_mask"
        }
        expected, found = (engine.run({**feeds, "attention_mask": mask}) for engine in (slow, fast))
    for name, array in expected.items():
        seen = (slice(None), slice(None), slice(padded, None)) if name != "logits" else slice(None)
        assert not np.isnan(found[name][seen]).any()
        largest = np.abs(array[seen]).max()
        np.testing.assert_allclose(found[name][seen], array[seen], atol=2e-2 * largest)
