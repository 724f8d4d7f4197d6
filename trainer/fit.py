"""The loop: the steps of one stage that are left, with held-out measurements and resume points between them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from runtime.progress import Bar, Progress
from trainer.blip2 import Blip2
from trainer.config import StageName
from trainer.draws import StepDraws
from trainer.ema import Ema
from trainer.guard import stop
from trainer.plans import STAGE_KINDS, Plan
from trainer.ranks import Ranks
from trainer.resume import OptimiserState, Progressed, ResumePoints, Stateful
from trainer.stage_config import StageConfig
from trainer.stepper import Stepped, Stepper
from trainer.watch import StepReport, Watcher, watched


class Fit:
    """One stage being trained; `run` does it."""

    def __init__(
        self,
        stage: StageName,
        model: Blip2,
        plan: Plan,
        config: StageConfig,
        *,
        seed: int,
        partial: Path,
        settings: Mapping[str, Any],
        recipe_yaml: str,
        ranks: Ranks,
        progress: Progress,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """`partial` is the folder of the resume point, `settings` is what decides the result (JSON-able)."""
        self._stage, self._model, self._plan, self._config, self._seed = stage, model, plan, config, seed
        self._partial, self._settings, self._recipe_yaml = partial, settings, recipe_yaml
        self._ranks, self._progress, self._watchers = ranks, progress, watchers
        self._stepper = Stepper(stage, model, plan.objective, config, ranks)
        self._ema = Ema(model, config.ema_decay) if config.ema_decay else None
        self._cut = 0
        """Rows of this process with a text that was cut, since they were last added up over all processes."""

    def run(self) -> Progressed:
        """Run the steps that are left; returns what was measured and counted in all of them.

        The model ends with the weights to keep: the averages, where the stage has some.
        """
        config, model = self._config, self._model
        with ResumePoints(self._partial, self._parts(), self._settings, writes=self._ranks.is_main) as points:
            done = points.restore()
            bar_of_stage = self._progress.bar(
                self._stage, config.steps, done=done.step, items_per_step=config.batch_size
            )
            model.train()
            with watched(self._watchers, done.step), bar_of_stage as bar:
                while done.step < config.steps:
                    stepped = self._step(done, points, bar)
                    last = done.step == config.steps
                    if last or done.step % config.eval_every == 0:
                        self._measure(done, stepped)
                    if not last and done.step % config.save_every == 0:
                        for watcher in self._watchers:
                            watcher.before_resume_point()
                        self._save(points, done)
            self._add_up(done)
        if self._ema is not None:
            self._ema.swap()
        return done

    def _parts(self) -> dict[str, Stateful]:
        """What a resume point holds."""
        averages: dict[str, Stateful] = {} if self._ema is None else {"averages": self._ema}
        return {
            "weights": self._model.trained(),
            "optimiser": OptimiserState(self._stepper.optimiser),
            "loss_scale": self._stepper.scaler,
            **averages,
            **self._plan.state,
        }

    def _step(self, done: Progressed, points: ResumePoints, bar: Bar) -> Stepped:
        config, ranks = self._config, self._ranks
        began = time.monotonic()
        indices, draws = self._drawn(done.step)
        self._plan.rows[0].ahead(*self._drawn(done.step + 1))
        stepped = self._stepper.step(done.step, indices, draws)
        taken = [rows.take() for rows in self._plan.rows]
        if not stepped.finite:
            self._save(points, done)
            images = [image for part in taken for image in part.image_ids]
            folder = self._partial.with_name(f"{self._stage}-failed-at-step-{done.step + 1}")
            raise stop(
                self._stage, done.step + 1, self._model, config, stepped, images, folder=folder,
                recipe_yaml=self._recipe_yaml, ranks=ranks,
            )  # fmt: skip
        if self._ema is not None:
            self._ema.update()
        done.step += 1
        self._cut += sum(part.cut for part in taken)
        bar.advance(loss=stepped.loss, **stepped.figures)
        data_s = sum(part.seconds for part in taken)
        report = StepReport(
            stage=self._stage,
            step=done.step,
            steps=config.steps,
            loss=stepped.loss,
            figures=stepped.figures,
            rows=config.batch_size,
            learning_rates=tuple(group["lr"] for group in self._stepper.optimiser.param_groups),
            gradient_norm=stepped.gradient_norm,
            data_s=data_s,
            compute_s=time.monotonic() - began - data_s,
        )
        for watcher in self._watchers:
            watcher.after_step(self._model, report)
        return stepped

    def _save(self, points: ResumePoints, done: Progressed) -> None:
        self._add_up(done)
        points.save(done)

    def _add_up(self, done: Progressed) -> None:
        done.cut_texts += sum(self._ranks.collect(self._cut))
        self._cut = 0

    def _drawn(self, step: int) -> tuple[list[int], StepDraws]:
        """Rows of this process in a step, and its draws."""
        rows, config = self._stepper.rows, self._config
        key = (self._seed, STAGE_KINDS[self._stage].number, step)
        draws = StepDraws(key, self._ranks.index * rows, config.batch_size)
        return self._plan.rows[0].at_step(step, config.batch_size, self._seed)[draws.first :][:rows], draws

    def _measure(self, done: Progressed, stepped: Stepped) -> None:
        """Held-out metrics, of the averages where there are some. Every process measures; the first one's count."""
        self._model.eval()
        with self._ema.in_place() if self._ema is not None else nullcontext(), torch.compiler.set_stance("force_eager"):
            metrics = self._ranks.tell(self._plan.evaluate(self._model))
        self._model.train()
        done.history.append({"step": done.step, "train_loss": stepped.loss, **metrics})
        self._progress.note(f"{self._stage} {done.step}/{self._config.steps} held out: {_line(done.history[-1])}")
        for watcher in self._watchers:
            watcher.after_measurement(self._stage, done.step, metrics)


def _line(entry: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in entry.items() if name != "step")
