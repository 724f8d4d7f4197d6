"""The log survives a kill at any moment, and a resume leaves every step there once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import CheckpointError
from trainer.logs.journal import Journal, read_journal


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path) if record["kind"] == "step"]


def test_a_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    with Journal(path, 0) as journal:
        for step in range(1, 8):
            journal.write("step", step, {"losses": {"loss": 1.0 / step}})
    with Journal(path, 5) as journal:
        assert [record["step"] for record in journal.kept] == [1, 2, 3, 4, 5]
        for step in range(6, 9):
            journal.write("step", step, {"losses": {"loss": 1.0 / step}})
    assert steps_of(path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert read_journal(path)[2]["losses"]["loss"] == 1 / 3, "numbers come back as they were"


def test_a_stage_trained_anew_begins_an_empty_log(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    with Journal(path, 0) as journal:
        journal.write("step", 1, {})
    with Journal(path, 0) as journal:
        assert journal.kept == []
    assert path.read_text() == ""


WRITER = """
import sys
from pathlib import Path
from trainer.logs.journal import Journal
journal = Journal(Path(sys.argv[1]), 0)
step = 0
while True:
    step += 1
    journal.write("step", step, {"losses": {"loss": 1.0}, "text": "x" * 5000})
    print(step, flush=True)
"""


def test_kill_9_loses_no_finished_line(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 200:
            break
    os.kill(writer.pid, signal.SIGKILL)
    told = [int(line) for line in writer.stdout.read().split()]
    writer.wait()
    written = steps_of(path)
    assert written == list(range(1, len(written) + 1))
    assert len(written) >= max([200, *told])


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    with Journal(path, 0) as journal:
        journal.write("step", 1, {})
        journal.write("step", 2, {})
    whole = path.read_bytes()
    for cut in range(2, 20):
        path.write_bytes(whole[:-cut])
        assert steps_of(path) == [1]
    path.write_bytes(whole[:-1])
    assert steps_of(path) == [1, 2], "only the line's end is missing"
    path.write_bytes(whole[:-7])
    with Journal(path, 2) as journal:
        journal.write("step", 3, {})
    assert steps_of(path) == [1, 3]


def test_damage_in_the_middle_is_an_error_that_says_where(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n\x00\x00\x00\n{"kind": "step", "step": 3}\n')
    with pytest.raises(CheckpointError, match=r"training\.jsonl:2: expected a JSON object"):
        Journal(path, 3)
    assert path.read_text().endswith('"step": 3}\n'), "nothing was lost"


def test_text_may_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    with Journal(path, 0) as journal:
        journal.write("event", 1, {"text": "two\u2028lines\x85 \n three"})
        journal.write("step", 2, {})
    assert [record["step"] for record in read_journal(path)] == [1, 2]


def test_numbers_that_json_lacks_are_words(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    with Journal(path, 0) as journal:
        journal.write("step", 1, {"gradient_norm": float("inf"), "losses": {"loss": float("nan")}})
    record = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert float(record["gradient_norm"]) == float("inf")
    assert record["losses"] == {"loss": "nan"}
