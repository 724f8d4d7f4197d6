"""The recording survives the file, and replay tells right from wrong on a real engine."""

import dataclasses

import numpy as np
import pytest

from runtime.bundle import Bundle, read_bundle
from runtime.checks import relative_error
from runtime.errors import BundleError
from runtime.reference import REFERENCE, ChainCase, GraphCase, read_reference, write_reference
from runtime.replay import replay


@pytest.fixture
def recording(tiny_bundle):
    reference = read_reference(tiny_bundle / REFERENCE)
    return reference.cases, reference.chain


def replay_changed(make_tiny_bundle, tmp_path, cases, chain):
    path = make_tiny_bundle(tmp_path / "changed")
    write_reference(path / REFERENCE, cases, chain)
    return replay(read_bundle(path, check_hashes=False))


def test_a_good_bundle_passes(tiny_bundle):
    checks = replay(read_bundle(tiny_bundle))
    assert [(check.graph, check.output, check.ok) for check in checks] == [
        ("vision/colours", "image_embeds", True),
        ("chain", "token_ids", True),
    ]
    assert checks[0].max_error <= 1e-6 == checks[0].tolerance
    assert checks[1].max_error == checks[1].tolerance == 0.0


def test_a_wrong_output_fails(make_tiny_bundle, tmp_path, recording):
    (case,), chain = recording
    case.outputs["image_embeds"] = case.outputs["image_embeds"] + 0.5
    vision, tokens = replay_changed(make_tiny_bundle, tmp_path, [case], chain)
    assert not vision.ok and vision.max_error == pytest.approx(0.5 / 1.5)
    assert tokens.ok


def test_wrong_tokens_fail_by_their_share(make_tiny_bundle, tmp_path, recording):
    cases, chain = recording
    wrong = ((3, 6), *chain.token_ids[1:])
    for tolerance, ok in ((0.0, False), (0.3, True)):
        changed = dataclasses.replace(chain, token_ids=wrong, tolerance=tolerance)
        check = replay_changed(make_tiny_bundle, tmp_path, cases, changed)[-1]
        assert (check.max_error, check.ok) == (0.25, ok)


def test_the_file_keeps_everything(tmp_path):
    case = GraphCase("language", "step", {"a": np.ones((1, 2))}, {"b/c": np.zeros(3, np.int64)}, {"b/c": 0.1})
    other = dataclasses.replace(case, case="prefill", inputs={"a": np.zeros((1, 0))})
    chain = ChainCase(
        np.ones((3, 3, 2, 2), np.float32), ((1, 2), (1,), ()), ((5,), None, (6, 7)), ((), (9,), (8, 8)), 4, 0.5
    )
    write_reference(tmp_path / REFERENCE, [case, other], chain)
    reference = read_reference(tmp_path / REFERENCE)
    cases, read = reference.cases, reference.chain
    assert reference.retrieval is None
    assert [(c.graph, c.case, c.tolerances) for c in cases] == [
        ("language", "step", {"b/c": 0.1}),
        ("language", "prefill", {"b/c": 0.1}),
    ]
    np.testing.assert_array_equal(cases[0].inputs["a"], case.inputs["a"])
    assert cases[1].inputs["a"].shape == (1, 0) and cases[0].outputs["b/c"].dtype == np.int64
    for field in dataclasses.fields(chain):
        np.testing.assert_equal(getattr(read, field.name), getattr(chain, field.name))


def test_a_file_that_is_no_recording(tmp_path, tiny_bundle):
    path = tmp_path / REFERENCE
    for data in (b"", b"text", (tiny_bundle / REFERENCE).read_bytes()[:300]):
        path.write_bytes(data)
        with pytest.raises(BundleError, match="expected recorded eager results"):
            read_reference(path)
    np.savez(path, a=np.ones(1))
    with pytest.raises(BundleError, match="expected recorded eager results"):
        read_reference(path)
    with pytest.raises(BundleError, match="found none"):
        replay(Bundle(tmp_path / "nowhere", read_bundle(tiny_bundle).manifest))


def test_relative_error():
    expected = np.array([[-4.0, 2.0]])
    assert relative_error(np.array([[-4.0, 3.0]]), expected) == 0.25
    assert relative_error(np.zeros(2) + 0.5, np.zeros(2)) == 0.5
    assert relative_error(np.zeros(0), np.zeros(0)) == 0.0
    assert relative_error(np.zeros(3), np.zeros(2)) == float("inf")
    assert relative_error(np.array([[np.nan, 2.0]]), expected) == float("inf")
