"""One stage's log: `training.jsonl` always, TensorBoard on request, alarms on stderr and in metrics.json.

The loop calls it as one of its watchers. While the stage is trained the log lies in a folder beside the checkpoint to
be; `publish` copies it in. Only the first process writes.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from runtime.progress import Progress
from trainer.blip2 import Blip2
from trainer.logs.alarms import Alarm, Alarms
from trainer.logs.board import FOLDER, Board
from trainer.logs.flops import Peak, flop_counter, peak_of, raised
from trainer.logs.journal import FILE, Journal, Record
from trainer.logs.lines import LossLines
from trainer.stage_config import StageConfig
from trainer.watch import StepReport, Watcher

STATM = Path("/proc/self/statm")
PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1024**2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class _Window:
    """Steps timed since the last recorded one."""

    steps: int = 0
    seconds: float = 0.0
    data_s: float = 0.0


class TrainingLog(Watcher):
    """Writes what it is told of the steps of `stage` into `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        stage: str,
        config: StageConfig,
        lines: Mapping[str, LossLines],
        device: torch.device,
        processes: int,
        progress: Progress,
    ) -> None:
        self._folder, self._stage, self._config, self._lines = folder, stage, config, lines
        self._device, self._processes, self._progress = device, processes, progress
        self._alarms = Alarms(lines, steps=config.steps, warmup_steps=config.warmup_steps, log_every=config.log_every)
        self._journal: Journal | None = None
        self._board: Board | None = None
        self._counter: FlopCounterMode | None = None
        self._flops = 0
        self._peak: Peak | None = None
        self._window = _Window()

    def begin(self, done: int) -> None:
        """The loop goes on after step `done`: later records of an interrupted run are dropped.

        The operations of the first step are counted, so this step is not timed.
        """
        if not done:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._journal = Journal(self._folder / FILE, done)
        if self._config.tensorboard:
            self._board = Board(self._folder / FOLDER, done)
        for record in self._journal.kept:
            if record["kind"] == "step":
                self._watch(record)
        if not self._journal.kept:
            self._write("run", 0, self._facts())
        if done:
            self._write("event", done, {"event": "resume", "text": f"went on after step {done}"})
        self._counter = flop_counter().__enter__()

    def after_step(self, model: Blip2, report: StepReport) -> None:
        """Record the first, the last and every `log_every`-th step."""
        if self._counter is not None:
            self._stop_counting(report.step)
        else:
            self._window.steps += 1
            self._window.seconds += report.data_s + report.compute_s
            self._window.data_s += report.data_s
        if report.step not in (1, report.steps) and report.step % self._config.log_every:
            return
        self._raise_peak(report.step)
        record = self._write(
            "step",
            report.step,
            {
                "losses": {"loss": report.loss, **report.figures},
                "learning_rates": report.learning_rates,
                "gradient_norm": report.gradient_norm,
                "speed": self._speed(report.rows),
                "memory": _memory(self._device),
            },
        )
        self._window = _Window()
        for alarm in self._watch(record):
            self._write("event", alarm.step, {"event": "alarm", "alarm": alarm.kind, "text": alarm.text})
            self._progress.note(f"{self._stage}: alarm at step {alarm.step}: {alarm.text}")

    def after_measurement(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record held-out metrics."""
        self._write("held_out", step, {"metrics": dict(metrics)})

    def before_resume_point(self) -> None:
        """Have the disk hold the log up to here."""
        assert self._journal is not None, "begin() comes first"
        self._journal.sync()

    def end(self) -> None:
        """Close the files; also when the loop failed."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
        for open_file in (self._journal, self._board):
            if open_file is not None:
                open_file.close()

    def alarms(self) -> list[dict[str, Any]]:
        """Those raised in the whole stage, oldest first, for metrics.json."""
        return [asdict(alarm) for alarm in self._alarms.raised]

    def publish(self, checkpoint: Path, broken_images: Mapping[str, str]) -> None:
        """Copy the log into a checkpoint that is being written; images that could not be read are its last record."""
        if broken_images:
            with Journal(self._folder / FILE, self._config.steps) as journal:
                journal.write("event", self._config.steps, {"event": "broken_images", "images": dict(broken_images)})
        shutil.copytree(self._folder, checkpoint, dirs_exist_ok=True)

    def remove(self) -> None:
        """The checkpoint is there and holds a copy."""
        shutil.rmtree(self._folder)

    def _write(self, kind: str, step: int, facts: Mapping[str, Any]) -> Record:
        assert self._journal is not None, "begin() comes first"
        record = self._journal.write(kind, step, facts)
        if self._board is not None:
            self._board.write(record)
        return record

    def _watch(self, record: Record) -> list[Alarm]:
        return self._alarms.see(
            record["step"],
            {name: float(value) for name, value in record["losses"].items()},
            float(record["gradient_norm"]),
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "stage": self._stage,
            "steps": self._config.steps,
            "batch_size": self._config.batch_size,
            "precision": self._config.precision,
            "processes": self._processes,
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu",
            "lines": {name: lines.numbers() for name, lines in self._lines.items()},
        }

    def _stop_counting(self, step: int) -> None:
        assert self._counter is not None
        self._counter.__exit__(None, None, None)
        self._flops, self._counter = self._counter.get_total_flops(), None
        self._set_peak(peak_of(self._device, DTYPES[self._config.precision]), step)

    def _set_peak(self, peak: Peak, step: int) -> None:
        self._peak = peak
        facts = {"per_step_and_process": self._flops, "peak_per_second": peak.flops, "peak": peak.source}
        self._write("event", step, {"event": "flops", **facts})

    def _raise_peak(self, step: int) -> None:
        """Steps that were faster than the measured peak show that it was measured too low."""
        if self._peak is not None and self._window.steps:
            seen = self._flops * self._window.steps / self._window.seconds
            peak = raised(self._peak, seen, self._device, DTYPES[self._config.precision])
            if peak != self._peak:
                self._set_peak(peak, step)

    def _speed(self, rows: int) -> dict[str, float | None]:
        """Averages over the steps timed since the last record; None where there was none."""
        window = self._window
        if not window.steps or self._peak is None:
            names = ("samples_per_s", "step_ms", "data_wait_ms", "data_wait_share", "model_flop_utilisation")
            return dict.fromkeys(names)
        step_s = window.seconds / window.steps
        return {
            "samples_per_s": rows / step_s,
            "step_ms": step_s * 1e3,
            "data_wait_ms": window.data_s / window.steps * 1e3,
            "data_wait_share": window.data_s / window.seconds,
            "model_flop_utilisation": self._flops * window.steps / window.seconds / self._peak.flops,
        }


def _memory(device: torch.device) -> dict[str, float]:
    """MiB: resident memory of this process where the system tells it, and the most the device had allocated."""
    found = {}
    if STATM.is_file():
        found["resident_mib"] = int(STATM.read_text().split()[1]) * PAGE / MIB
    if device.type == "cuda":
        found["device_peak_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return found
