"""A changed recipe never throws unfinished training away: it is refused, key by key, or takes the work over."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qforge.steps import Step, folder_lock, run_steps
from runtime.errors import InputError


class Run:
    """One step that can be resumed, and stops half-way until it is told not to."""

    def __init__(self, out: Path) -> None:
        self.out, self.said, self.halts = out, list[str](), True
        self.settings: dict[str, Any] = {"stage1": {"rate": 0.1, "betas": (0.9, 0.98)}, "seed": 0}
        self.files = {"halves/vision": "10 bytes"}
        self.before = "one"

    def first(self, folder: Path) -> None:
        (folder / "value").write_text(self.before)

    def second(self, folder: Path) -> None:
        count = folder.with_name(".count")
        count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
        if self.halts:
            raise KeyboardInterrupt
        (folder / "value").write_text(count.read_text())

    def run(self) -> None:
        first = Step("first", "", "first", self.first, {"content": self.before})
        second = Step(
            "second", "", "second", self.second, self.settings, lambda: self.files, after=("first",), resumes=True
        )
        with folder_lock(self.out):
            run_steps([first, second], self.out, self.said.append)

    def value(self) -> str:
        self.halts = False
        self.run()
        return (self.out / "second" / "value").read_text()


@pytest.fixture
def begun(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run.run()
    return run


def rate(run: Run) -> None:
    run.settings = {"stage1": {"rate": 0.2, "betas": (0.9, 0.98)}, "seed": 1}


def files(run: Run) -> None:
    run.files = {"halves/vision": "11 bytes"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rate, "stage1.rate was 0.1, is now 0.2; seed was 0, is now 1"),
        (files, "halves/vision was 10 bytes, is now 11 bytes"),
    ],
)
def test_other_inputs_are_refused_with_every_key(begun: Run, change: Callable[[Run], None], says: str) -> None:
    before = begun.settings, begun.files
    change(begun)
    with pytest.raises(InputError, match=f"second was begun with other inputs: {says}. .* is kept"):
        begun.run()
    begun.settings, begun.files = before
    assert begun.value() == "2", "the work of the first call was lost"


def test_work_of_a_version_that_counted_settings_of_the_log_goes_on(
    begun: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (noted,) = begun.out.glob(".steps/working/second-*/begun.json")
    then = json.loads(noted.read_text())
    then["settings"]["stage1"] |= {"log_every": 10, "tensorboard": False, "save_every": 1_000}
    noted.write_text(json.dumps(then))
    monkeypatch.setattr("qforge.steps.library_versions", lambda: {"torch": "99"})
    assert begun.value() == "2"


def test_the_same_inputs_go_on(begun: Run) -> None:
    assert begun.value() == "2"
    assert not list((begun.out / ".steps/working").iterdir())


def test_work_on_results_that_were_made_anew_is_left(begun: Run) -> None:
    begun.before = "another"
    assert begun.value() == "1"


def test_after_an_upgrade_the_work_goes_on_and_says_so(begun: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qforge.steps.library_versions", lambda: {"torch": "99"})
    assert begun.value() == "2"
    assert any("the code or a library has changed" in line for line in begun.said)
    assert json.loads((begun.out / ".steps/second.json").read_text())["outputs"].keys() == {"value"}
