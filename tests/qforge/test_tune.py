"""`qforge tune` as a user meets it, on the tiny bundle; its choice is what verbs without flags take."""

import json
from pathlib import Path

import pytest
from PIL import Image

import qforge
import runtime
from qforge.cli import app
from qforge.devices import device_for
from runtime.backends import Device
from runtime.tuned import TUNED
from tests.runtime.both_heads import write_bundle_with_both_heads
from tests.runtime.conftest import write_tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = app([str(argument) for argument in arguments], prog_name="qforge", standalone_mode=False)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_table_and_what_follows(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "tune", bundle, "--max-drop", "0")
    assert code == 0
    for words in ("threads", "held?", "yes", "tokens equal to PyTorch's", f"written to {bundle / TUNED}"):
        assert words in out
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    code, out, err = call(capsys, "caption", bundle, tmp_path / "red.png")
    assert (code, out) == (0, "a red\n")
    assert f"{bundle}: as tuned, backend ort, provider cpu, " in err
    assert "as tuned" not in call(capsys, "caption", bundle, tmp_path / "red.png", "--threads", "1")[2]


def test_programs_take_the_choice_as_verbs_do(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it was measured; elsewhere it is left aside, with a warning that says so."""
    call(capsys, "tune", bundle, "--max-drop", "0")
    record = json.loads((bundle / TUNED).read_text())
    record["choice"]["threads"] = 3
    (bundle / TUNED).write_text(json.dumps(record))
    with pytest.MonkeyPatch.context() as patch:
        seen = list[Device]()
        opened = Device.open
        patch.setattr(Device, "open", lambda device, *its: seen.append(device) or opened(device, *its))
        for load in (qforge.load, runtime.load):
            load(bundle).close()
            load(bundle, threads=1).close()
            assert set(seen) == {Device("ort", "cpu", 3), Device("ort", "cpu", 1)}
            seen.clear()
        record["machine"]["cpu"] = "another"
        (bundle / TUNED).write_text(json.dumps(record))
        with pytest.warns(UserWarning, match="left aside, it was measured on another machine") as warned:
            qforge.load(bundle).close()
        assert set(seen) == {Device()} and warned[0].filename == __file__


def test_a_search_runs_as_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle is known once its index is read, or where --bundle says it is now."""
    bundle = write_bundle_with_both_heads(tmp_path / "bundle")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "red.png", "question": "colour", "answers": ["a red"]}\n' * 3)
    call(capsys, "tune", bundle, "--max-drop", "0", "--data", tmp_path / "rows.jsonl")
    _, _, err = call(capsys, "index", bundle, tmp_path / "red.png", "--out", tmp_path / "index")
    assert "as tuned" in err
    assert f"{bundle}: as tuned, backend ort" in call(capsys, "search", tmp_path / "index", "red")[2]
    assert "as tuned" not in call(capsys, "search", tmp_path / "index", "red", "--backend", "ort")[2]
    bundle.rename(tmp_path / "moved")
    code, out, err = call(capsys, "search", tmp_path / "index", "red", "--bundle", tmp_path / "moved")
    assert code == 0 and "red.png" in out and f"{tmp_path / 'moved'}: as tuned" in err


def test_rows_and_json(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    rows = [{"image": "red.png", "question": "colour", "answers": ["a red"]}] * 5
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = call(
        capsys, "tune", bundle, "--max-drop", "1", "--data", tmp_path / "rows.jsonl", "--limit", "4", "--json"
    )
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and (found["items"], found["metric"], found["fastest"]) == (4, "accuracy", str(bundle))
    assert found["choices"][str(bundle)] in found["measured"]
    assert {row["held"] for row in found["measured"]} == {True}


def test_bad_usage(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (("--max-drop", "-1"), "--max-drop: expected at least 0 points, found -1"),
        (("--max-drop", "1", "--limit", "0"), "--limit: expected at least 1, found 0"),
        (("--max-drop", "1", "--limit", "5"), "--limit: expected --data beside it, found none; leave it out"),
        (("--max-drop", "1", "--task", "vqa"), "--task: expected --data beside it, found none; leave it out"),
    ):
        code, _, err = call(capsys, "tune", bundle, *words)
        assert code == 2 and sentence in err
    code, _, err = call(capsys, "tune", tmp_path / "none", "--max-drop", "1")
    assert code == 2 and "expected a bundle" in err
    assert not (bundle / TUNED).exists()


def test_flags_decide_alone(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "tune", bundle, "--max-drop", "0")
    record = json.loads((bundle / TUNED).read_text())
    record["choice"]["threads"] = 3
    (bundle / TUNED).write_text(json.dumps(record))
    assert device_for(bundle, None, None, None) == Device("ort", "cpu", 3)
    assert device_for(bundle, None, None, 1) == Device("ort", "cpu", 1)
    assert device_for(bundle, "ort", None, None) == device_for(bundle / "none", None, None, None) == Device()
    assert device_for(bundle, None, "cuda", None) == Device("ort", "cuda")
