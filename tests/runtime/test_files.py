"""Nothing appears under its final name before it is complete: not after an error, Ctrl-C, kill -9 or a full disk."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import InputError, MissingFile, OutOfSpace
from runtime.files import atomic_folder, sha256_of, write_json_atomic, write_text_atomic
from tests.signals import hears_ctrl_c

ROOT = Path(__file__).parents[2]


def python(code, *arguments):
    """Start Python with this repository importable."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_sha256(tmp_path):
    path = tmp_path / "big"
    data = bytes(range(256)) * 9000
    path.write_bytes(data)
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    with pytest.raises(MissingFile, match="none"):
        sha256_of(tmp_path / "none")


def test_a_folder_appears_when_complete(tmp_path):
    final = tmp_path / "new" / "bundle"
    with atomic_folder(final) as work:
        (work / "part").mkdir()
        (work / "part" / "a").write_text("1")
        assert not final.exists()
    assert (final / "part" / "a").read_text() == "1"
    assert names(final.parent) == ["bundle"]


def test_an_old_folder_is_replaced_only_at_the_end(tmp_path):
    final = tmp_path / "bundle"
    final.mkdir()
    (final / "old").write_text("old")
    with atomic_folder(final) as work:
        (work / "new").write_text("new")
        assert names(final) == ["old"]
    assert names(final) == ["new"]
    assert names(tmp_path) == ["bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_and_keeps_the_old(tmp_path, error):
    final = tmp_path / "bundle"
    final.mkdir()
    (final / "old").write_text("old")
    with pytest.raises(error), atomic_folder(final) as work:
        (work / "half").write_text("half")
        raise error
    assert names(final) == ["old"]
    assert names(tmp_path) == ["bundle"]


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.jpg").write_text("")
    with (
        pytest.raises(InputError, match=r"one with manifest\.json"),
        atomic_folder(tmp_path / "pictures", replaces="manifest.json"),
    ):
        pytest.fail("the block must not run")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="found a file"), atomic_folder(tmp_path / "file"):
        pytest.fail("the block must not run")
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder, then our own
        with atomic_folder(tmp_path / "empty", replaces="manifest.json") as work:
            (work / "manifest.json").write_text("{}")
    assert names(tmp_path) == ["empty", "file", "pictures"]


HOLD_A_FOLDER = """
import sys, time
from runtime.files import atomic_folder
with atomic_folder(sys.argv[1]) as work:
    (work / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_under_the_final_name_and_is_cleaned_up(tmp_path):
    final = tmp_path / "b[u]ndle*"
    writer = python(HOLD_A_FOLDER, final)
    assert writer.stdout.readline() == "ready\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert not final.exists()
    assert len(names(tmp_path)) == 2, "a hidden folder and its lock are left"
    with atomic_folder(final) as work:
        (work / "whole").write_text("whole")
    assert names(tmp_path) == ["b[u]ndle*"]
    assert names(final) == ["whole"]


def test_a_live_writer_is_left_alone(tmp_path):
    final = tmp_path / "bundle"
    writer = python(HOLD_A_FOLDER, final)
    try:
        assert writer.stdout.readline() == "ready\n"
        with atomic_folder(final) as work:
            (work / "mine").write_text("")
        theirs = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
        assert len(theirs) == 1 and (theirs[0] / "half").exists()
    finally:
        writer.send_signal(signal.SIGINT)
        writer.communicate()
    assert names(tmp_path) == ["bundle"], "Ctrl-C removes the hidden folder"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    final = tmp_path / "bundle"
    (tmp_path / ".bundle.0123abcd.lock").touch()
    (tmp_path / ".bundle.0123abcd.old").mkdir()
    (tmp_path / ".bundle.0123abcd.old" / "old").write_text("old")
    (tmp_path / ".bundle.0123abcd.tmp").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(final):
        raise RuntimeError
    assert names(tmp_path) == ["bundle"]
    assert names(final) == ["old"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
def test_a_full_disk_inside_a_folder(tmp_path):
    sentence = f"{tmp_path}: no space left .* bytes are free"
    with pytest.raises(OutOfSpace, match=sentence) as caught, atomic_folder(tmp_path / "bundle") as work:
        (work / "part").write_text("")
        Path("/dev/full").write_text("x" * 100_000)
    assert caught.value.folder == tmp_path and caught.value.exit_code == 2
    assert names(tmp_path) == []


def test_a_full_disk_told_only_in_words(tmp_path):
    """As safetensors tells it: an exception of its own class with the system's sentence."""
    with pytest.raises(OutOfSpace), atomic_folder(tmp_path / "bundle"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="unrelated"), atomic_folder(tmp_path / "bundle"):
        raise RuntimeError("unrelated")


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
from runtime.errors import OutOfSpace
from runtime.files import atomic_folder, write_json_atomic

def write_folder(final):
    with atomic_folder(final) as work:
        (work / "big").write_bytes(bytes(5000))

def write_file(final):
    write_json_atomic(final, ["x" * 5000])

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write, name in ((write_file, "a.json"), (write_folder, "folder")):
    try:
        write(Path(sys.argv[1]) / name)
    except OutOfSpace as error:
        print("refused", error.folder)
"""


def test_the_system_refusing_bytes_really(tmp_path):
    (tmp_path / "a.json").write_text("old")
    out, errors = python(WRITE_TOO_MUCH, tmp_path).communicate(timeout=30)
    assert out == f"refused {tmp_path}\n" * 2, errors
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_text_and_json_files(tmp_path):
    path = tmp_path / "sub" / "a.json"
    write_json_atomic(path, {"b": [1, 2.5], "a": "ü"})
    assert json.loads(path.read_text()) == {"b": [1, 2.5], "a": "ü"}
    assert path.read_text().startswith('{\n  "b"') and path.read_text().endswith("}\n")
    write_text_atomic(path, "line\n")
    assert path.read_bytes() == b"line\n"
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomic(path, float("nan"))
    assert path.read_bytes() == b"line\n"
    assert names(path.parent) == ["a.json"]
    with pytest.raises(InputError, match="found a folder"):
        write_text_atomic(tmp_path / "sub", "")


def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_folder("bundle") as work:
        (work / "a").write_text("")
    write_text_atomic("a.txt", "1")
    assert names(tmp_path) == ["a.txt", "bundle"]
