"""The verbs that answer with a bundle and look into it, on the tiny bundle of the runtime's tests."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import runtime
from qforge.cli import app
from qforge.options import DECODING
from runtime.decoding import Decoding
from tests.runtime.conftest import write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs") / "bundle"
    write_tiny_bundle(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "red.png", tmp_path / "grey.jpg"]
    Image.new("RGBA", (30, 20), (255, 0, 0, 128)).save(paths[0])
    Image.new("L", (7, 9), 40).save(paths[1])
    return paths


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one command."""
    capsys.readouterr()
    code = app([str(argument) for argument in arguments], prog_name="qforge", standalone_mode=False)
    out, err = capsys.readouterr()
    return code, out, err


def results(out: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(out.splitlines()[-1])["results"]
    return found


def test_caption_says_what_the_pipeline_says(
    bundle: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with runtime.load(bundle) as pipeline:
        expected = [answer.text for answer in pipeline.caption(pictures)]
    code, out, _ = call(capsys, "caption", bundle, *pictures, "--json")
    found = results(out)
    assert code == 0
    assert [set(one) for one in found] == 2 * [{"image", "question", "text", "token_ids", "timings_ms"}]
    assert [(one["image"], one["question"], one["text"]) for one in found] == [
        (str(path), None, text) for path, text in zip(pictures, expected, strict=True)
    ]
    _, out, _ = call(capsys, "caption", bundle, *pictures)
    assert out.splitlines() == [f"{path}: {text}" for path, text in zip(pictures, expected, strict=True)]
    _, out, _ = call(capsys, "caption", bundle, pictures[0])
    assert out.rstrip("\n") == expected[0]


def test_vqa_answers_every_question(bundle: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    questions = ["what colour?", "how many?"]
    with runtime.load(bundle) as pipeline:
        expected = [pipeline.vqa(pictures[0], question).text for question in questions]
    code, out, _ = call(capsys, "vqa", bundle, pictures[0], *questions, "--json")
    assert code == 0
    assert [(one["question"], one["text"]) for one in results(out)] == list(zip(questions, expected, strict=True))


def test_fewer_tokens_are_fewer_tokens(bundle: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "caption", bundle, pictures[0], "--json", "--max-new-tokens", "1")
    assert len(results(out)[0]["token_ids"]) <= 1


def test_a_broken_image_is_one_sentence(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    code, out, err = call(capsys, "caption", bundle, tmp_path / "broken.png")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "broken.png" in err


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["whole", "streamed"])
def test_what_is_wrong_with_one_request_costs_that_alone(
    bundle: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], stream: tuple[str, ...]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"?")
    expected = [call(capsys, "caption", bundle, picture)[1] for picture in pictures]
    mixed = [broken, pictures[0], broken, pictures[1]]
    code, out, err = call(capsys, "caption", bundle, *mixed, *stream)
    assert code == 2
    lines = [f"{path}: {text}" for path, text in zip(pictures, expected, strict=True)]
    assert [line for line in out.splitlines() if line] == [line.rstrip("\n") for line in lines]
    sentence = f"{broken}: expected an image (JPEG, PNG, WebP, GIF, TIFF, BMP …), found other data"
    assert err.splitlines() == 2 * [sentence]
    code, out, _ = call(capsys, "caption", bundle, *mixed, *stream, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 2 and [one["image"] for one in found["results"]] == [str(picture) for picture in pictures]
    assert found["refused"] == 2 * [{"image": str(broken), "question": None, "error": sentence}]
    code, out, err = call(capsys, "vqa", bundle, pictures[0], "colour", "", "opposite colour", *stream)
    assert (code, len(out.split("\n"))) == (2, 3 + bool(stream)) and err == "question: expected words, found ''\n"
    code, out, err = call(capsys, "caption", bundle, *pictures, "--max-new-tokens", "99", *stream)
    assert (code, out, len(err.splitlines())) == (2, "", 1), "what is wrong with all of them is said once"


def test_a_changed_byte_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_bundle(tmp_path / "bundle")
    graph = sorted((tmp_path / "bundle").rglob("*.onnx"))[0]
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    for verb in ("verify", "inspect"):
        code, out, err = call(capsys, verb, tmp_path / "bundle")
        assert (code, out) == (2, "")
        assert graph.name in err
        assert len(err.splitlines()) == 1


def test_verify_counts_what_holds(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, "verify", bundle, "--json")
    checks = json.loads(out.splitlines()[-1])
    assert code == 0
    assert checks["ok"]
    assert {check["graph"].split("/")[0] for check in checks["checks"]} >= {"vision", "chain"}
    monkeypatch.setattr("runtime.first_use.relative_error", lambda found, expected: float("inf"))
    code, out, _ = call(capsys, "verify", bundle)
    assert code == 1
    assert "FAILED vision" in out
    code, out, _ = call(capsys, "verify", bundle, "--json")
    assert code == 1
    assert "Infinity" not in out
    assert not json.loads(out)["ok"]


def test_inspect_tells_what_a_bundle_is(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "inspect", bundle)
    assert code == 0
    assert "graph qformer: image_embeds, question_ids, question_mask -> prefix" in out
    _, out, _ = call(capsys, "inspect", bundle, "--json")
    assert json.loads(out)["manifest"]["format"] == 2


def test_evaluate_scores_a_bundle(
    bundle: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with runtime.load(bundle) as pipeline:
        text = pipeline.vqa(pictures[0], "what colour?").text
    rows = [
        {"image": path.name, "question": "what colour?", "answers": [answer]}
        for path, answer in ((pictures[0], text), (pictures[1], "nothing the bundle would say"))
    ]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = call(capsys, "evaluate", bundle, "--data", tmp_path / "set.jsonl", "--task", "vqa", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (found["metrics"], found["n"]) == ({"accuracy": 0.5}, 2)
    assert "decoding" not in found["settings"]


def test_evaluate_decodes_as_it_is_told(
    bundle: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"image": "red.png", "question": "what?", "answers": ["a"]}))
    asked = ("evaluate", bundle, "--data", tmp_path / "set.jsonl", "--json", "--task")
    assert json.loads(call(capsys, *asked, "vqa")[1])["metrics"] == {"accuracy": 0.0}
    found = json.loads(call(capsys, *asked, "vqa", "--stop-strings", "a")[1])
    assert found["metrics"] == {"accuracy": 1.0}, "the answer ends behind its first word"
    assert found["settings"]["decoding"]["stop_strings"] == ["a"]
    code, _, err = call(capsys, *asked, "retrieval", "--num-beams", "3")
    assert code == 2 and "retrieval says no texts" in err


def test_streamed_text_is_the_text(bundle: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """For people the same lines; with --json a line per piece, and the same last line."""
    _, plain, _ = call(capsys, "caption", bundle, *pictures)
    assert call(capsys, "caption", bundle, *pictures, "--stream")[:2] == (0, plain)
    _, plain, _ = call(capsys, "vqa", bundle, pictures[0], "what colour?")
    assert call(capsys, "vqa", bundle, pictures[0], "what colour?", "--stream")[:2] == (0, plain)
    _, out, _ = call(capsys, "vqa", bundle, pictures[0], "what colour?", "opposite?", "--stream", "--json")
    *pieces, last = [json.loads(line) for line in out.splitlines()]
    assert set(last) == {"results", "refused", "cache"} and last["refused"] == []
    for result in last["results"]:
        own = [piece for piece in pieces if piece["question"] == result["question"]]
        assert [set(piece) for piece in own] == [{"image", "question", "piece", "token_ids"}] * 3, "two words, an end"
        assert "".join(piece["piece"] for piece in own) == result["text"]
        assert [token for piece in own for token in piece["token_ids"]] == result["token_ids"]


def test_decoding_options_reach_the_pipeline(
    bundle: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "--num-beams=3 --num-return-sequences=2 --length-penalty=2 --early-stopping=never": {
            "num_beams": 3,
            "num_return_sequences": 2,
            "length_penalty": 2.0,
            "early_stopping": "never",
        },
        "--num-beams=2 --early-stopping=true": {"num_beams": 2, "early_stopping": True},
        "--num-beams=2 --early-stopping=false": {"num_beams": 2, "early_stopping": False},
        "--do-sample --temperature=30 --top-k=0 --top-p=0.9 --seed=7": {
            "do_sample": True,
            "temperature": 30.0,
            "top_k": 0,
            "top_p": 0.9,
            "seed": 7,
        },
        "--repetition-penalty=5 --no-repeat-ngram-size=1 --min-new-tokens=4": {
            "repetition_penalty": 5.0,
            "no_repeat_ngram_size": 1,
            "min_new_tokens": 4,
        },
        "--stop-strings=a --stop-strings=zzz": {"stop_strings": ("a", "zzz")},
    }
    assert {name for fields in options.values() for name in fields} == set(DECODING)
    with runtime.load(bundle) as pipeline:
        for flags, fields in options.items():
            expected = pipeline.caption(pictures, decoding=Decoding(**fields))
            _, out, _ = call(capsys, "caption", bundle, *pictures, "--json", *flags.split())
            assert [one["token_ids"] for one in results(out)] == [list(answer.token_ids) for answer in expected]
            _, out, _ = call(capsys, "caption", bundle, pictures[0], *flags.split())
            assert out.splitlines() == list(expected[0].texts)


def test_decoding_that_cannot_be_is_one_sentence(
    bundle: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, sentence in {
        "--top-p 0.5": "top_p: has no effect without do_sample; add do_sample, or leave top_p out",
        "--num-beams 2 --stream": "num_beams: expected 1 in a stream, found 2: beams may change until the end",
    }.items():
        code, out, err = call(capsys, "caption", bundle, pictures[0], *flags.split())
        assert (code, out) == (2, "")
        assert sentence in err and len(err.splitlines()) == 1
