"""Every graph builds for every GPU, without one: TensorRT-RTX, ahead of time."""

from collections.abc import Callable

import pytest

from export.engines.builder import Builder
from export.engines.plan import Built, build_graph
from export.engines.profiles import profiles_of
from export.engines.refusals import require_buildable
from export.engines.targets import ComputeCapability, parse_capability
from runtime.bundle import Bundle
from runtime.engine_manifest import EngineOptions
from runtime.errors import InputError

ALL = tuple(map(parse_capability, ("8.0", "8.6", "8.9", "12.0")))
"""One plan for all of them: the builder compiles for each, and fails when it cannot for one."""


def plan_of(
    bundle: Bundle, name: str, rtx: Builder, capabilities: tuple[ComputeCapability, ...], batches: tuple[int, ...] = ()
) -> Built:
    require_buildable(bundle.graph(name), name, rtx.engine, capabilities)
    profiles = profiles_of(name, bundle.manifest, batches)
    return build_graph(bundle.graph(name), name, rtx, capabilities, profiles, EngineOptions())


@pytest.mark.parametrize(
    ("form", "graph"),
    [
        *(("fp16", graph) for graph in ("vision", "qformer", "embed", "language")),
        *(("int8-tensorrt", graph) for graph in ("vision", "qformer", "language")),
        ("fp8-tensorrt", "language"),  # in INT4
    ],
)
def test_a_graph_builds_for_sm80_sm86_sm89_and_sm120(
    form: str, graph: str, rtx: Builder, form_of: Callable[[str], Bundle]
) -> None:
    assert len(memoryview(plan_of(form_of(form), graph, rtx, ALL).plan)) > 1000


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_an_encoder_decoder_builds_for_all_of_them(graph: str, rtx: Builder, flan_fp16: Bundle) -> None:
    assert len(memoryview(plan_of(flan_fp16, graph, rtx, ALL).plan)) > 1000


@pytest.mark.parametrize("graph", ["vision", "qformer"])
def test_fp8_builds_where_a_gpu_has_it(graph: str, rtx: Builder, form_of: Callable[[str], Bundle]) -> None:
    assert len(memoryview(plan_of(form_of("fp8-tensorrt"), graph, rtx, ALL[2:]).plan)) > 1000
    with pytest.raises(InputError, match="FP8"):
        plan_of(form_of("fp8-tensorrt"), graph, rtx, ALL)


@pytest.mark.parametrize("capability", ["7.5", "8.0", "12.1"])
def test_a_plan_for_one_gpu(capability: str, form_of: Callable[[str], Bundle], rtx: Builder) -> None:
    built = plan_of(form_of("fp16"), "vision", rtx, (parse_capability(capability),))
    assert len(memoryview(built.plan)) > 1000
    assert {"CONVOLUTION", "MATRIX_MULTIPLY", "NORMALIZATION"} <= set(built.layers)


def test_weights_can_be_streamed(form_of: Callable[[str], Bundle], rtx: Builder) -> None:
    bundle, options = form_of("fp16"), EngineOptions(weight_streaming=True, optimization_level=1, workspace_mib=64)
    profiles = profiles_of("vision", bundle.manifest, ())
    built = build_graph(bundle.graph("vision"), "vision", rtx, ALL[1:2], profiles, options)
    plain = build_graph(bundle.graph("vision"), "vision", rtx, ALL[1:2], profiles, EngineOptions())
    assert bytes(built.plan) != bytes(plain.plan)
