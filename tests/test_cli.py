"""The command as its user meets it: help at once, one sentence per mistake, exit codes, JSON as the last line."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from qforge.cli import app
from qforge.console import INTERRUPTED, Outcome, guarded
from runtime.errors import CheckFailed, InputError

ROOT = Path(__file__).parent.parent
HELP_S = 0.3
VERBS = [
    *(["run"], ["train"], ["data", "check"], ["data", "demo"], ["export"], ["verify"], ["inspect"], ["doctor"]),
    *(["build"], ["caption"], ["vqa"], ["index"], ["search"], ["evaluate"], ["bench"], ["import"], ["to-hf"]),
    *(["export-triton"], ["calibrate"], ["chat"], ["cache", "warm"], ["cache", "info"], ["cache", "clear"]),
    *(["prepare"], ["tune"], ["data", "features"], ["data", "filter"]),
]


def qforge(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from qforge.cli import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def refused(*arguments: str | Path, cwd: Path = ROOT) -> str:
    """The sentence of a refusal: one line on stderr, nothing on stdout, exit 2."""
    done = qforge(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


def test_help_answers_at_once() -> None:
    """In processor time, which other tests beside this one do not change."""

    def seconds() -> float:
        before = os.times()
        assert qforge("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < HELP_S


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself_with_an_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    app([*verb, "--help"], standalone_mode=False)
    text = capsys.readouterr().out
    assert f"Example:\n\n      qforge {' '.join(verb)}" in text
    assert "--json" in text
    assert "--debug" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rnu"], "No such command 'rnu'. Did you mean 'run'? See: qforge --help"),
        (["run"], "Missing argument 'RECIPE'. See: qforge run --help"),
        (["run", "recipes/demo.yaml"], "Missing option '--out'. See: qforge run --help"),
        (
            ["export", "ckpt", "--out", "z"],
            "Missing option '--precision'. Choose from: fp32, fp16, bf16, int8, fp8 See: ",
        ),
        (["doctor", "--jsn"], "No such option: --jsn"),
        (["evaluate", "x", "--data", "y", "--task", "guess"], "Invalid value for '--task'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], sentence: str) -> None:
    assert sentence in refused(*arguments)


def test_unknown_recipe_key_names_the_nearest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refused("run", "recipes/demo.yaml", "--out", out, "--set", "stage1.stepz=3")
    assert said == "--set stage1.stepz=3: stage1.stepz is not a recipe key; did you mean stage1.steps?"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "recipes/none.yaml", "--out", "out"], "recipes/none.yaml: expected a recipe"),
        (["data", "check", "none.jsonl"], "none.jsonl: expected a manifest"),
        (["caption", "none", "none.png"], "none: expected a bundle"),
        (["verify", "none"], "none: expected a bundle"),
        (["inspect", "none"], "none: expected a bundle or a checkpoint folder, found nothing there."),
        (["inspect", "recipes"], "recipes: expected a bundle (with manifest.json) or a checkpoint"),
        (["evaluate", "none", "--data", "none.jsonl", "--task", "vqa"], "none.jsonl: expected a manifest"),
        (
            ["export", "none", "--out", "out", "--precision", "fp32", "--calibration", "rows.jsonl"],
            "none: expected a bundle or a checkpoint",
        ),
        (
            ["export", "none", "--out=out", "--precision=fp16", "--range-method=entropy", "--calibration=rows.jsonl"],
            "--range-method: expected --precision int8 or fp8 beside it, found fp16",
        ),
        (["bench", "none", "--against", "none", "--out", "out"], "none: expected a bundle or a checkpoint"),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], sentence: str) -> None:
    assert sentence in refused(*arguments)
    assert not (ROOT / "out").exists()


def test_data_check_counts_and_finds(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    manifest = tmp_path / "set.jsonl"
    manifest.write_text('{"image": "a.png", "captions": ["a black square"]}\n')
    good = qforge("data", "check", manifest, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout.splitlines()[-1])["images"] == 1
    with manifest.open("a") as file:
        file.write('{"image": "b.png", "captions": ["nothing"]}\n')
    bad = qforge("data", "check", manifest)
    assert bad.returncode == 1
    assert "set.jsonl:2" in bad.stdout
    assert "b.png" in bad.stdout


def test_empty_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text("\n")
    assert "empty data set" in refused("data", "check", tmp_path / "set.jsonl")


def test_data_demo_writes_manifests_that_pass_the_check(tmp_path: Path) -> None:
    small = [f"--set=data.demo.{split}_scenes=3" for split in ("train", "val", "test")]
    drawn = qforge("data", "demo", "--out", tmp_path / "world", *small, "--json")
    assert drawn.returncode == 0, drawn.stderr
    assert json.loads(drawn.stdout.splitlines()[-1])["settings"]["test_scenes"] == 3
    for name in ("captions_train", "vqa_test"):
        assert qforge("data", "check", tmp_path / "world" / f"{name}.jsonl").returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["data", "demo", "--out", "mine"],
        ["run", "recipes/smoke.yaml", "--out", "mine"],
        ["train", "recipes/smoke.yaml", "--out", "mine"],
        ["export", "ckpt", "--out", "mine", "--precision", "fp32", "--calibration", "rows.jsonl"],
        ["bench", "ckpt", "--against", "ckpt", "--out", "mine", "--data", "."],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_of_the_users_own_is_never_replaced(arguments: list[str], tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "model.safetensors").touch()
    (tmp_path / "ckpt" / "recipe.yaml").write_text("")
    assert refused(*arguments, cwd=tmp_path).startswith("mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_doctor_says_what_runs_here() -> None:
    done = qforge("doctor", "--json")
    found = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0
    assert "ort" in found["backends"]
    assert found["can"]["answer with a bundle on the CPU"] is True


def doing(error: BaseException) -> Callable[[], Outcome]:
    def work() -> Outcome:
        print("a library's chatter")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("x.yaml: expected this, found that."), 2, "x.yaml: expected this, found that."),
        (CheckFailed("too far off"), 1, "too far off"),
        (KeyboardInterrupt(), 2, INTERRUPTED),
        (OSError(errno.ENOSPC, "No space left on device", "big"), 2, "No space left on the disk at big"),
        (PermissionError(errno.EACCES, "Permission denied", "secret"), 2, "secret: permission denied."),
        (ZeroDivisionError("division by zero"), 2, "ZeroDivisionError: division by zero (a fault in qforge"),
    ],
)
def test_an_error_is_one_sentence_with_its_exit_code(
    error: BaseException, code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(doing(error), as_json=False, debug=False) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(doing(InputError("wrong")), as_json=False, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_json_ends_stdout_also_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    guarded(doing(CheckFailed("too far off")), as_json=True, debug=False)
    assert json.loads(capsys.readouterr().out) == {"error": "too far off", "exit_code": 1}


def test_stdout_holds_the_result_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> Outcome:
        print("a library's chatter")
        return Outcome({"value": 1}, "one", exit_code=1)

    assert guarded(work, as_json=True, debug=False) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ('{"value": 1}\n', "a library's chatter\n")


def _below(command: Any) -> list[list[str]]:
    """The verbs of a group; for a verb itself, nothing more to name."""
    return [[name] for name in command.commands] if hasattr(command, "commands") else [[]]


def test_every_verb_is_listed_here() -> None:
    group = typer.main.get_group(app)
    listed = [[name, *below] for name, one in group.commands.items() for below in _below(one)]
    assert sorted(listed) == sorted(VERBS)
