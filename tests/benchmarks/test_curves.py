"""The picture of a stage shows what its log says: curves, chance and floor, held-out metrics, alarms."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import curves
from benchmarks.curves import ALARM, draw_training
from benchmarks.figure import DPI
from tests.benchmarks.stand_ins import write_log
from trainer.logs.lines import contrast_lines, language_lines, matching_lines

PAIRS = {"itc": contrast_lines(64, 0.1), "itm": matching_lines()}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures as they are saved."""
    figures: list[Any] = []
    save = curves.save

    def keeping(figure: Any, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(curves, "save", keeping)
    return figures


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def heights(axis: Any) -> list[float]:
    """Where horizontal lines are drawn across."""
    return [line.get_ydata()[0] for line in axis.lines if list(line.get_xdata()) == [0, 1]]


def words(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def stage1_losses(step: int) -> dict[str, float]:
    return {"loss": 5 - step / 20, "itc": 4.2 - step / 20, "itm": 0.64}


def test_losses_stand_between_chance_and_floor(tmp_path: Path, drawn: list[Any]) -> None:
    log = write_log(tmp_path / "a", "stage1", PAIRS, stage1_losses, alarm="itm_stuck")
    draw_training([log], tmp_path / "training.png")
    shown = panels(drawn[0])
    assert list(shown) == ["itc", "itm", "held out", "learning rate", "gradient norm"]
    itc, itm = PAIRS["itc"], PAIRS["itm"]
    assert heights(shown["itc"]) == pytest.approx([itc.chance, itc.floor])
    assert heights(shown["itm"]) == pytest.approx([itm.chance, itm.prior, itm.floor])
    assert list(shown["itc"].lines[0].get_ydata()) == pytest.approx([stage1_losses(s)["itc"] for s in range(1, 41)])
    assert {"chance 4.159", "floor 0.7295", "held out"} <= set(words(shown["itc"]))
    assert words(shown["itc"])[-2:] == ["stage1", "40 of 40 steps x 64 · 40 samples/s · data wait 12.50% · MFU 50.00%"]
    assert shown["gradient norm"].get_yscale() == "log"
    assert shown["itm"].get_yscale() == "linear"


def test_utilisation_of_a_measured_peak_says_so_and_takes_the_highest(tmp_path: Path, drawn: list[Any]) -> None:
    """Steps at half of 1 TFLOP/s, until the device is found to do 2."""
    peaks = [(1, 1e12, "measured"), (38, 2e12, "measured")]
    draw_training([write_log(tmp_path / "a", "stage1", PAIRS, stage1_losses, peaks=peaks)], tmp_path / "training.png")
    assert words(panels(drawn[0])["itc"])[-1].endswith("· MFU 25.00% of a measured peak")


def test_held_out_losses_stand_in_the_panel_of_their_loss(tmp_path: Path, drawn: list[Any]) -> None:
    draw_training([write_log(tmp_path / "a", "stage1", PAIRS, stage1_losses)], tmp_path / "training.png")
    shown = panels(drawn[0])
    assert [3.5, 3.0] in [list(line.get_ydata()) for line in shown["itc"].lines]
    legend = [text.get_text() for text in shown["held out"].get_legend().get_texts()]
    assert legend == ["itm accuracy 0.5"]


def test_an_alarm_is_marked_where_it_was_raised(tmp_path: Path, drawn: list[Any]) -> None:
    log = write_log(tmp_path / "a", "stage1", PAIRS, stage1_losses, alarm="itm_stuck")
    draw_training([log], tmp_path / "training.png")
    marked = {
        title: [list(line.get_xdata()) for line in axis.lines if line.get_color() == ALARM]
        for title, axis in panels(drawn[0]).items()
    }
    assert marked.pop("itm") == [[30, 30]]
    assert not any(marked.values())
    assert any("itm stuck" in word for word in words(panels(drawn[0])["itm"]))


@pytest.mark.parametrize(("alarm", "panel"), [("loss_rising", "itc"), ("gradient_exploding", "gradient norm")])
def test_alarms_without_a_loss_of_their_own_have_a_place(
    tmp_path: Path, drawn: list[Any], alarm: str, panel: str
) -> None:
    draw_training([write_log(tmp_path / "a", "stage1", PAIRS, stage1_losses, alarm=alarm)], tmp_path / "training.png")
    assert any(line.get_color() == ALARM for line in panels(drawn[0])[panel].lines)


def test_stages_stand_side_by_side_and_equal_rates_are_one_line(tmp_path: Path, drawn: list[Any]) -> None:
    first = write_log(tmp_path / "a", "stage1", PAIRS, stage1_losses)
    second = write_log(tmp_path / "b", "stage2", {"loss": language_lines(300)}, lambda step: {"loss": 4.0 / step})
    draw_training([first, second], tmp_path / "training.png")
    axes = drawn[0].axes
    assert [axis.get_title(loc="left") for axis in axes[5:]] == ["loss", "held out", "learning rate", "gradient norm"]
    assert len(axes[3].lines) == 1
    assert axes[5].get_yscale() == "log", "the loss falls by a factor of 40"
    with Image.open(tmp_path / "training.png") as picture:
        width, height = picture.size
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    assert width == int(2 * curves.COLUMN_IN * DPI)
    assert height > width / 3
    assert {(0, 114, 178), (255, 255, 255)} <= colours
    edges = [axis.get_position() for axis in axes]
    assert all(0 <= edge.x0 < edge.x1 <= 1 and 0 <= edge.y0 < edge.y1 <= 1 for edge in edges)


def test_a_run_of_one_step_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    log = write_log(tmp_path / "a", "stage2", {"loss": language_lines(300)}, lambda _: {"loss": 4.0}, steps=1)
    draw_training([log], tmp_path / "training.png")
    assert words(drawn[0].axes[0])[-1] == "1 of 1 steps x 64"
