"""Where a run's numbers, pictures and sounds go: TensorBoard event files and metrics.jsonl in MODEL_DIR."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import numpy as np

from music_synth.files import write_whole

METRICS_FILE = "metrics.jsonl"


class Writer:
    """Writes to `model_dir`. Lines and events after `start_step`, left by a run that got further, are dropped."""

    def __init__(self, model_dir: str | Path, start_step: int = 0):
        from tensorboardX import SummaryWriter  # 0.2 s that playing need not pay

        self._metrics = Path(model_dir) / METRICS_FILE
        _drop_lines_after(self._metrics, start_step)
        self._summary = SummaryWriter(str(Path(model_dir) / "events"), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and one point of each curve."""
        values = {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | values)
        with self._metrics.open("a") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._summary.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """image [height, width, 3] uint8."""
        self._summary.add_image(name, image, step, dataformats="HWC")

    def audio(self, step: int, name: str, audio: np.ndarray, sample_rate: int) -> None:
        """audio [S] in [-1, 1]."""
        self._summary.add_audio(name, np.clip(audio, -1.0, 1.0), step, sample_rate=sample_rate)

    def text(self, step: int, name: str, text: str) -> None:
        self._summary.add_text(name, text, step)

    def flush(self) -> None:
        self._summary.flush()

    def close(self) -> None:
        self._summary.close()


class NoWriter:
    """What the other processes of a run hold: only the first one writes."""

    def scalars(self, step, values): ...

    def image(self, step, name, image): ...

    def audio(self, step, name, audio, sample_rate): ...

    def text(self, step, name, text): ...

    def flush(self): ...

    def close(self): ...


def read_metrics(model_dir: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order, without a last one that was cut in two; [] if there is no file."""
    path = Path(model_dir) / METRICS_FILE
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def last_value(model_dir: str | Path, name: str) -> float:
    """The newest value of a scalar of a run; 0 if it was never written."""
    return next((line[name] for line in reversed(read_metrics(model_dir)) if name in line), 0.0)


def _drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a metrics file without the lines after `step` and without a last line cut in two."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step]
    write_whole(path, "".join(kept))
