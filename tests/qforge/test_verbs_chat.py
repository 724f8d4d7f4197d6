"""`qforge chat`: questions from a pipe or a terminal, answers as they are said, on the tiny bundle."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import qforge
from qforge.cli import app
from tests.runtime.conftest import write_tiny_bundle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("chat") / "bundle")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (30, 20), (250, 90, 10)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


class Typed(io.BytesIO):
    """Lines of a terminal; Ctrl-C after the last one."""

    def readline(self, *_: Any) -> bytes:
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(bundle: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """(exit code, stdout, stderr) of one conversation."""

    def run(said: bytes, *options: str, stdin: Any = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", stdin or io.TextIOWrapper(io.BytesIO(said)))
        capsys.readouterr()
        arguments = ["chat", str(bundle), str(picture), *options]
        code = app(arguments, prog_name="qforge", standalone_mode=False)
        return code, *capsys.readouterr()

    return run


def test_a_line_per_answer(chat) -> None:
    said = b"colour\n\n  \nOpposite?\ncolour"
    assert chat(said, "--max-new-tokens", "2") == (0, "a red\na blue\na red\n", "")


def test_json_is_an_object_per_answer_and_one_at_the_end(chat, bundle: Path, picture: Path) -> None:
    code, out, err = chat(b"colour\nopposite\n", "--json", "--max-new-tokens", "2")
    *lines, last = map(json.loads, out.splitlines())
    assert (code, err) == (0, "")
    assert last["results"] == lines and last["refused"] == []
    assert last["cache"]["memory"]["misses"] == 3, "the vision features and two prefixes"
    with qforge.load(bundle) as model:
        talk = model.chat(picture, max_new_tokens=2)
        expected = [talk.ask(question).as_json() for question in ("colour", "opposite")]
    for one in (*lines, *expected):
        assert one.pop("timings_ms")
    assert lines == expected


def test_what_cannot_be_answered_costs_one_question(chat) -> None:
    code, out, err = chat(b"colour\n\xff\n.\nwhat\x00\n" + b"photo " * 20 + b"\nopposite\n")
    assert (code, out) == (2, "a red\na blue\n")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["question", "question", "question", "prompt"]
    code, out, _ = chat(b"\xff\ncolour\n", "--json")
    first, second, last = map(json.loads, out.splitlines())
    assert first == {"question": "\\xff", "error": "question: expected UTF-8, found other bytes at byte 1"}
    assert (second["text"], last["refused"], code) == ("a red", [first], 2)


def test_turns_that_no_longer_fit_are_said(chat) -> None:
    code, out, err = chat(b"colour\n" * 4)
    assert (code, out) == (0, "a red\n" * 4)
    assert err.splitlines() == [f"(oldest turns left out, as they no longer fit: {count})" for count in (1, 2)]


def test_decoding_options_and_beams(chat) -> None:
    code, out, _ = chat(b"colour\n", "--num-beams", "3", "--num-return-sequences", "2")
    assert code == 0
    assert out.splitlines()[0] == "a red" and len(out.splitlines()) == 2
    code, out, err = chat(b"colour\n", "--top-p", "0.5")
    assert (code, out) == (2, "") and "without do_sample" in err


@pytest.mark.parametrize("lines", [b"colour\nopposite\n", b""])
def test_ctrl_c_ends_it_and_keeps_what_was_said(chat, lines: bytes) -> None:
    code, out, err = chat(b"", "--json", stdin=Terminal(Typed(lines)))
    texts = [answer["text"] for answer in json.loads(out.splitlines()[-1])["results"]]
    assert (code, texts) == (0, ["a red", "a blue"] if lines else [])
    assert err == "> " * (1 + lines.count(b"\n"))


def test_at_a_terminal_a_refusal_is_no_failure(chat) -> None:
    code, out, err = chat(b"", stdin=Terminal(io.BytesIO(b"colour\n.\nopposite\n")))
    assert (code, out) == (0, "a red\na blue\n\n")
    assert err.splitlines()[0].startswith("> > question: expected words")


def test_nothing_asked(chat) -> None:
    code, out, _ = chat(b"", "--json")
    assert code == 0 and json.loads(out)["results"] == []


def test_bytes_that_are_no_utf8_on_the_command_line(bundle: Path, picture: Path) -> None:
    """Python hands them over as half surrogate pairs; a file may have such a name, a question may not."""
    odd = picture.with_name("r\udcffd.png")
    picture.rename(odd)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        command = [sys.executable, "-c", "from qforge.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = run("caption", bundle, odd, odd)
    assert (code, err) == (0, "")
    assert out.count("a red") == 2 and "r\\udcffd.png" in out
    code, out, err = run("vqa", bundle, odd, "what \udcff?")
    assert (code, out) == (2, "")
    assert err.strip() == "question: expected UTF-8, found other bytes at character 6; write it in UTF-8"
    code, out, err = run("caption", bundle, odd, "--prompt", "\udcff", "--json")
    assert code == 2 and json.loads(out)["error"].startswith("prompt: expected UTF-8")
