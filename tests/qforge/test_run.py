"""The step machinery: finished steps are never redone, changed ones always, and a kill loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qforge.recipe import Recipe, load_recipe
from qforge.run import Start, stage_folder, stages_to, steps_of
from qforge.run import run as run_recipe
from qforge.steps import Done, Step, folder_lock, read_records, run_steps
from runtime.errors import InputError

ROOT = Path(__file__).parent.parent.parent

# Three tiny steps; the middle one counts to 3, remembers its count, and can be told to hang at one place.
SCRIPT = """
import os, sys, time
from pathlib import Path
from qforge.steps import Step, folder_lock, run_steps

out, hang = Path(sys.argv[1]), sys.argv[2]

def wait_at(place):
    if hang == place:
        (out.parent / "hanging").touch()
        time.sleep(60)

def note(line):
    with (out.parent / "log").open("a") as log:
        log.write(line + "\\n")

def first(folder):
    note("first")
    (folder / "half").write_text("half")
    wait_at("in first")
    (folder / "half").unlink()
    (folder / "value").write_text("1")

def second(folder):
    state = folder.with_name(".state")
    start = int(state.read_text()) if state.exists() else 0
    for i in range(start, 3):
        note(f"second {i}")
        state.write_text(str(i + 1))
        if i == 1:
            wait_at("in second")
    (folder / "value").write_text((out / "first/value").read_text() + "2")

def third(folder):
    note("third")
    wait_at("in third")
    (folder / "value").write_text((out / "second/value").read_text() + "3")

def say(line):
    if line.endswith("s") and "done in" in line and line.startswith("[1/3]"):
        wait_at("between")

with folder_lock(out):
    run_steps([
        Step("first", "", "first", first),
        Step("second", "", "second", second, after=("first",), resumes=True),
        Step("third", "", "steps/third", third, after=("second",)),
    ], out, say)
"""


def start(out: Path, hang: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(out), hang], env=environment)


def kill_at(out: Path, hang: str) -> None:
    """Run until the step machinery hangs at the named place, then end the process as `kill -9` does."""
    process = start(out, hang)
    deadline = time.monotonic() + 30
    while not (out.parent / "hanging").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run never came to the place"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out.parent / "hanging").unlink()


FOLLOWED_BY = {
    # place of the kill → what the second call still has to do
    "in first": ["first", "second 0", "second 1", "second 2", "third"],
    "between": ["second 0", "second 1", "second 2", "third"],
    "in second": ["second 2", "third"],
    "in third": ["third"],
}


@pytest.mark.parametrize("place", FOLLOWED_BY)
def test_killed_run_goes_on_where_it_stopped(place: str, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    kill_at(out, place)
    published = [name for name in ("first", "second", "steps/third") if (out / name).exists()]
    assert all((out / name / "value").is_file() for name in published), "a half-made result under its final name"
    log.unlink()
    assert start(out, "nowhere").wait(30) == 0
    assert log.read_text().splitlines() == FOLLOWED_BY[place]
    assert (out / "steps/third/value").read_text() == "123"
    assert not list((out / ".steps/working").iterdir())


class Line:
    """Two steps, the second built on the first, with everything about them open to change."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.made: list[str] = []
        self.said: list[str] = []
        self.settings: dict[str, dict[str, int]] = {"one": {"a": 1}, "two": {"b": 1}}
        self.files: dict[str, str] = {}
        self.content = "one"
        self.took = "1.5 s"

    def run(self) -> list[Done]:
        self.made.clear()
        self.said.clear()
        one = Step("one", "making one", "one", self._writes("one"), self.settings["one"], lambda: self.files)
        two = Step("two", "making two", "deep/two", self._writes("two"), self.settings["two"], after=("one",))
        with folder_lock(self.out):
            return run_steps([one, two], self.out, self.said.append)

    def _writes(self, name: str) -> Callable[[Path], None]:
        def action(folder: Path) -> None:
            self.made.append(name)
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(self.content if name == "one" else "two")
            (folder / "training.jsonl").write_text(self.took)

        return action


@pytest.fixture
def line(tmp_path: Path) -> Line:
    line = Line(tmp_path / "run")
    line.run()
    assert line.made == ["one", "two"]
    return line


def test_nothing_is_done_twice(line: Line) -> None:
    assert [done.status for done in line.run()] == ["unchanged", "unchanged"]
    assert line.made == []
    assert line.said == ["[1/2] one: unchanged, skipped", "[2/2] two: unchanged, skipped"]


def test_a_changed_setting_redoes_what_reads_it(line: Line) -> None:
    line.settings["two"] = {"b": 2}
    line.run()
    assert line.made == ["two"]
    assert line.said[1] == "[2/2] two: making two (again: settings changed)"


def test_a_changed_input_file_redoes_the_step_but_equal_results_stop_there(line: Line) -> None:
    line.files = {"image.png": "newer"}
    line.run()
    assert line.made == ["one"], "the second step's input came out as it was"


def test_a_changed_result_redoes_what_depends_on_it(line: Line) -> None:
    line.settings["one"], line.content = {"a": 2}, "another"
    line.run()
    assert line.made == ["one", "two"]
    assert "again: earlier steps changed" in line.said[2]


@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_damaged_output_is_made_again(line: Line, damage: str) -> None:
    file = line.out / "deep/two/sub/file"
    if damage == "change":
        file.write_text("two!")
    else:
        file.unlink()
    line.run()
    assert line.made == ["two"]
    assert file.read_text() == "two"


def test_a_file_added_to_an_output_stays(line: Line) -> None:
    added = line.out / "deep/two/engine"
    added.write_text("built here")
    line.run()
    assert line.made == []
    assert added.exists()


def test_how_a_step_was_made_is_no_result(line: Line) -> None:
    """Logs hold times, which no two trainings share: what reads the weights need not be done again for them."""
    line.files = {"image.png": "changed"}
    line.took = "2.5 s"
    line.run()
    assert line.made == ["one"]
    assert (line.out / "one/training.jsonl").read_text() == "2.5 s"
    (line.out / "one/training.png").write_bytes(b"drawn anew")
    line.run()
    assert line.made == []


def test_another_library_version_redoes_everything(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qforge.steps.library_versions", lambda: {"torch": "99"})
    line.run()
    assert line.made == ["one", "two"]


def test_a_failing_step_keeps_the_finished_ones_and_the_old_result(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    step = Step("two", "", "deep/two", fail, {"b": 3}, after=("one",))
    with pytest.raises(KeyboardInterrupt), folder_lock(line.out):
        run_steps([step], line.out, line.said.append)
    assert (line.out / "deep/two/sub/file").read_text() == "two"
    assert not (line.out / "deep/two/half").exists()
    line.run()
    assert line.made == []


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(out, "in first")
    try:
        while not (tmp_path / "hanging").exists():
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(InputError, match=f"in use by another qforge run .process {process.pid}"), folder_lock(out):
            pass
    finally:
        process.kill()
        process.wait()
    with folder_lock(out):  # the killed process holds nothing
        assert (out / ".steps/lock").read_text() == str(os.getpid())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="no qforge run made"), folder_lock(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="found a file"), folder_lock(tmp_path / "out"):
        pass


def test_records_say_what_was_made_in_which_time(line: Line) -> None:
    records = read_records(line.out)
    assert list(records) == ["one", "two"]
    assert list(records["two"]["outputs"]) == ["sub/file"]
    assert records["two"]["seconds"] >= 0
    json.dumps(records)


@pytest.fixture
def demo() -> Recipe:
    return load_recipe(ROOT / "recipes" / "demo.yaml")


def names_reading(recipe: Recipe, other: Recipe) -> set[str]:
    """Steps whose settings differ between two recipes."""
    pairs = zip(steps_of(recipe, Path("out")), steps_of(other, Path("out")), strict=True)
    return {one.name for one, two in pairs if one.settings != two.settings}


def test_a_run_has_every_step_in_order(demo: Recipe) -> None:
    names = [step.name for step in steps_of(demo, Path("out"))]
    assert names == [
        *("data", "stage1", "stage2", "vqa"),
        *("export-fp32", "export-int8", "verify", "bench", "report"),
    ]
    done: set[str] = set()
    for step in steps_of(demo, Path("out")):
        assert set(step.after) <= done, f"{step.name} reads a later step"
        done.add(step.name)


def test_a_run_leaves_the_promised_folders(demo: Recipe) -> None:
    assert {"checkpoint", "bundle-fp32", "bundle-int8", "report"} <= {s.output for s in steps_of(demo, Path("out"))}


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("bench.warmup=7", {"bench"}),
        ("export.calibration_images=99", {"export-fp32", "export-int8"}),
        ("vqa.steps=7", {"vqa"}),
        ("stage1.steps=7", {"stage1"}),
        ("seed=7", {"stage1", "stage2", "vqa"}),
        ("stage1.log_every=7", set()),
        ("stage1.tensorboard=true", set()),
        ("stage1.save_every=7", set()),
        ("stage1.eval_every=7", {"stage1"}),
    ],
)
def test_a_changed_key_touches_only_the_steps_that_read_it(demo: Recipe, override: str, redone: set[str]) -> None:
    changed = load_recipe(ROOT / "recipes" / "demo.yaml", [override])
    assert names_reading(demo, changed) == redone


def test_a_precision_more_leaves_the_other_bundle(demo: Recipe) -> None:
    one = load_recipe(ROOT / "recipes" / "demo.yaml", ["export.precisions=[fp32]"])
    settings = {step.name: step.settings for step in steps_of(one, Path("out"))}
    assert settings["export-fp32"] == {s.name: s.settings for s in steps_of(demo, Path("out"))}["export-fp32"]


def test_rebuilt_halves_take_the_place_of_the_shipped_ones(demo: Recipe) -> None:
    rebuilt = load_recipe(ROOT / "recipes" / "demo.yaml", ["model.demo_halves.rebuild=true"])
    steps = {step.name: step for step in steps_of(rebuilt, Path("out"))}
    assert "halves" in steps["stage1"].after
    assert "halves" not in {step.name for step in steps_of(demo, Path("out"))}


def test_the_halves_that_are_rebuilt_are_those_the_recipe_names() -> None:
    recipe = load_recipe(ROOT / "recipes" / "demo-t5.yaml", ["model.demo_halves.rebuild=true"])
    model = next(step for step in steps_of(recipe, Path("out")) if step.name == "stage1").action.args[2]
    assert Path(model.language).parts[-3:] == ("steps", "halves", "language_t5")
    assert Path(model.vision).name == "vision"


def test_a_bundle_for_a_gpu_is_made_and_not_measured(demo: Recipe) -> None:
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", ["export.precisions=[bf16, fp16]"])
    steps = {step.name: step for step in steps_of(recipe, Path("out"))}
    assert {"export-bf16", "export-fp16"} <= set(steps["bench"].after)
    assert steps["verify"].action.args[0] == [Path("out/bundle-fp16")]
    assert steps["bench"].action.args[1] == [Path("out/bundle-fp16")]


@pytest.mark.parametrize("override", ["export.precisions=[bf16]", "export.language_precision=bf16"])
def test_a_run_of_bf16_alone_does_not_start(override: str, tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/smoke.yaml", [override])
    with pytest.raises(InputError, match=r"expected a bundle that this CPU can run, found BF16 alone"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_could_not_be_measured_does_not_start(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "recipes/smoke.yaml", ["export.heads=retrieval"])
    with pytest.raises(InputError, match=r"a run measures answers\. .*qforge export .*stage1 --heads retrieval"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ALL = ("stage1", "stage2", "caption", "vqa", "retrieval")


@pytest.mark.parametrize(
    ("stages", "last", "expected"),
    [
        (ALL, "vqa", ("stage1", "stage2", "vqa")),
        (ALL, "caption", ("stage1", "stage2", "caption")),
        (ALL, "retrieval", ("stage1", "retrieval")),
        (("stage1", "vqa"), "vqa", ("stage1", "vqa")),
        (("retrieval",), "retrieval", ("retrieval",)),
    ],
)
def test_a_stage_goes_on_from_where_the_paper_starts_it(stages, last, expected) -> None:
    assert stages_to(stages, last) == expected


@pytest.mark.parametrize(
    ("after", "wanted", "left"),
    [
        ("stage1", ("stage1", "stage2", "vqa"), ("stage2", "vqa")),
        ("stage2", ("stage1", "stage2", "caption", "vqa"), ("caption", "vqa")),
        ("stage1", ("retrieval",), ("retrieval",)),
        ("vqa", ("stage1", "stage2", "vqa"), ("vqa",)),
        ("caption", ("stage1", "stage2"), ("stage2",)),
    ],
)
def test_a_checkpoint_leaves_the_stages_behind_it(after, wanted, left) -> None:
    assert Start(Path("ckpt"), after).left(wanted) == left


def test_every_fine_tune_starts_from_its_own_stage(demo: Recipe) -> None:
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", ["stages=[stage1,stage2,caption,vqa,retrieval]"])
    steps = {step.name: step for step in steps_of(recipe, Path("out"), only=recipe.stages)}
    assert list(steps) == ["data", *ALL]
    assert {name: steps[name].after for name in ALL[2:]} == {
        "caption": ("data", "stage2"),
        "vqa": ("data", "stage2"),
        "retrieval": ("data", "stage1"),
    }
    assert steps["retrieval"].action.args[-1] == Path("out/steps/stage1"), "the checkpoint it starts from"
    assert [stage_folder(recipe, stage) for stage in ALL[-2:]] == ["steps/vqa", "checkpoint"]
    first = Start(Path("ckpt"), "stage2")
    begun = {step.name: step for step in steps_of(recipe, Path("out"), first, ("caption", "vqa"))}
    assert [begun[name].action.args[-1] for name in ("caption", "vqa")] == [Path("ckpt")] * 2


def test_the_last_stage_is_what_is_exported() -> None:
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml", ["stages=[stage1,stage2,caption]"])
    steps = {step.name: step for step in steps_of(recipe, Path("out"))}
    assert steps["caption"].output == "checkpoint"
    assert "caption" in steps["export-fp32"].after
    assert "caption" in steps["bench"].after


def test_stages_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stages: expected each once and in order: stage1, vqa"):
        load_recipe(ROOT / "recipes/smoke.yaml", ["stages=[vqa,stage1]"])
    with pytest.raises(
        InputError, match=r"stage caption: expected one of .*--set stages=\[stage1,stage2,caption,vqa\]"
    ):
        stages_to(("stage1", "stage2", "vqa"), "caption")
    searching = load_recipe(ROOT / "recipes/smoke.yaml", ["stages=[stage1,retrieval]"])
    with pytest.raises(InputError, match=r"expected a last stage that answers .* found retrieval.*--heads retrieval"):
        run_recipe(searching, tmp_path / "out")
    assert not (tmp_path / "out").exists()
