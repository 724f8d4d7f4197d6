"""What is recorded in a bundle, as Polygraphy reads it, with the command that compares."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from polygraphy.tools._main import main as polygraphy

from export.polygraphy_files import write_polygraphy_files
from qforge.cli import app
from runtime.bundle import Bundle
from runtime.errors import InputError
from runtime.reference import REFERENCE, read_reference


@pytest.fixture(scope="module")
def written(bundle_fp32: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("polygraphy") / "recorded"
    return out, write_polygraphy_files(bundle_fp32, out)


def test_polygraphy_reads_what_was_recorded(written: tuple[Path, list[str]], bundle_fp32: Bundle) -> None:
    out, _ = written
    cases = read_reference(bundle_fp32.path / REFERENCE).cases
    assert {path.name.partition(".")[0] for path in out.glob("*.json")} == {f"{c.graph}-{c.case}" for c in cases}
    for case in cases:
        (inputs,) = load_json(str(out / f"{case.graph}-{case.case}.inputs.json"))
        results = RunResults.load(str(out / f"{case.graph}-{case.case}.outputs.json"))
        (runner, (outputs,)) = next(iter(results.items()))
        assert runner == "eager-pytorch"
        for stated, found in ((case.inputs, inputs), (case.outputs, outputs)):
            assert list(stated) == list(found)
            for name, array in stated.items():
                np.testing.assert_array_equal(np.asarray(found[name]), array)
                assert np.asarray(found[name]).dtype == array.dtype


@pytest.mark.parametrize("pair", ["vision-run", "language-prefill", "language-step"])
def test_the_command_holds(pair: str, written: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    (command,) = (line for line in written[1] if f"{pair}.inputs.json" in line)
    assert not polygraphy(shlex.split(command)[1:])
    shown = capfd.readouterr().out
    assert "PASSED" in shown and "FAILED" not in shown


def test_the_command_finds_another_graph(
    written: tuple[Path, list[str]], bundle_int8: Bundle, bundle_fp32: Bundle
) -> None:
    """INT8's error is far beyond fp32's tolerance."""
    (command,) = (line for line in written[1] if "vision-run.inputs.json" in line)
    assert polygraphy(shlex.split(command.replace(str(bundle_fp32.path), str(bundle_int8.path)))[1:])


def test_the_command_line_writes_and_prints(
    bundle_fp32: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["verify", str(bundle_fp32.path), "--polygraphy", str(tmp_path / "recorded")], prog_name="qforge")
    assert not ended.value.code
    shown = capsys.readouterr().out
    commands = [line for line in shown.splitlines() if line.startswith("polygraphy run ")]
    assert (tmp_path / "recorded/commands.sh").read_text().splitlines()[2:] == commands
    assert "--atol" in commands[0] and len(commands) == 5


def test_a_folder_of_others_is_not_replaced(bundle_fp32: Bundle, tmp_path: Path) -> None:
    (tmp_path / "dear.json").write_text("{}")
    with pytest.raises(InputError, match="found other files"):
        write_polygraphy_files(bundle_fp32, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dear.json"]
    shutil.rmtree(tmp_path)
