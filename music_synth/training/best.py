"""The state of a training with the lowest held-out loss, kept as a run of its own; and when to stop."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import jax

from music_synth.files import write_whole
from music_synth.gin_files import CONFIG_FILE
from music_synth.training.checkpoint import FOLDER, Checkpointer, saved_steps
from music_synth.training.step import TrainState
from music_synth.training.writer import METRICS_FILE, read_metrics

BEST = "best"  # folder in MODEL_DIR
LOSS = "eval/loss"


class Best:
    """Keeps MODEL_DIR/best. What was measured before is read from the run's metrics, so that it resumes with the run.

    Args:
        patience: evaluations in a row without a lower loss after which the run is over; None: nothing is kept.
        start_step: at which the run begins or goes on.
    """

    def __init__(self, model_dir: str | Path, patience: int | None, start_step: int):
        self._model_dir, self._patience, self.folder = Path(model_dir), patience, Path(model_dir) / BEST
        self._losses: dict[int, float] = {}
        if patience is None:
            return
        if start_step:
            self._losses = {int(line["step"]): line[LOSS] for line in read_metrics(model_dir) if LOSS in line}
        elif jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was here before

    @property
    def step(self) -> int:
        """The step of the lowest loss so far, the first of them."""
        return min(self._losses, key=lambda step: (self._losses[step], step))

    @property
    def is_over(self) -> bool:
        """Tells whether the losses after the lowest are as many as the patience."""
        if self._patience is None or not self._losses:
            return False
        return sum(step > self.step for step in self._losses) >= self._patience

    def wants(self, step: int) -> bool:
        """Tells whether the loss of a step is to be measured still, when a run begins there or goes on."""
        return self._patience is not None and step not in self._losses

    def take(self, state: TrainState, step: int, loss: float) -> None:
        """Notes the loss of a step, and keeps its state if the loss is the lowest so far."""
        if self._patience is None:
            return
        self._losses[step] = loss if math.isfinite(loss) else math.inf
        if self.step == step and step not in saved_steps((self.folder / FOLDER).absolute()):
            Checkpointer(self.folder, keep=1).save(state, data_position=step)

    def close(self) -> None:
        """Gives the kept state the run's configuration and metrics: a run like another."""
        config = self._model_dir / CONFIG_FILE
        if self._patience is None or not self._losses or jax.process_index() != 0:
            return
        if config.exists():
            shutil.copyfile(config, self.folder / CONFIG_FILE)
        lines = [json.dumps(line) + "\n" for line in read_metrics(self._model_dir) if line["step"] <= self.step]
        write_whole(self.folder / METRICS_FILE, "".join(lines))
