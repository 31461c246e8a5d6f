"""Where a run's numbers, pictures and sounds go: TensorBoard event files and metrics.jsonl in MODEL_DIR."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from music_synth.errors import telling
from music_synth.files import write_whole
from music_synth.gin_files import CONFIG_FILE

METRICS_FILE = "metrics.jsonl"


class Writer:
    """Writes to `model_dir`, at once and in this thread. Lines and events after `start_step` are dropped.

    tensorboardX makes the events, but its own writer has a thread that ends where the disk is full, and a training
    would wait for it for ever.

    Raises:
        UserError: from all methods but `close`, where the folder cannot be written.
    """

    def __init__(self, model_dir: str | Path, start_step: int = 0):
        from tensorboardX.proto.event_pb2 import SessionLog  # 0.2 s that playing need not pay

        self._folder = Path(model_dir)
        with self._telling():
            _drop_lines_after(self._folder / METRICS_FILE, start_step)
            self._metrics = FileIO(self._folder / METRICS_FILE, "a")
            (self._folder / "events").mkdir(exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
            self._events = FileIO(self._folder / "events" / name, "a")
            self._add(0, file_version="brain.Event:2")
            self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))  # hides older ones from here on

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl, and one point of each curve."""
        from tensorboardX import summary

        values = {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | values)
        with self._telling():
            _append(self._metrics, line.encode() + b"\n")
            for name, value in values.items():
                self._add(step, summary=summary.scalar(name, value))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes image [height, width, 3] uint8."""
        from tensorboardX import summary

        with self._telling():
            self._add(step, summary=summary.image(name, image, dataformats="HWC"))

    def audio(self, step: int, name: str, audio: np.ndarray, sample_rate: int) -> None:
        """Writes audio [S]; what lies outside [-1, 1] is clipped."""
        from tensorboardX import summary

        with self._telling():
            self._add(step, summary=summary.audio(name, np.clip(audio, -1.0, 1.0), sample_rate))

    def config(self, step: int, text: str) -> None:
        """Writes config.gin, if there is any text, and shows it beside the curves."""
        from tensorboardX import summary

        if text:
            with self._telling():
                write_whole(self._folder / CONFIG_FILE, text)
                shown = "    " + text.replace("\n", "\n    ")
                self._add(step, summary=summary.text("config", shown))

    def flush(self) -> None:
        """Returns when everything is on the disk."""
        with self._telling():
            for file in (self._metrics, self._events):
                os.fsync(file.fileno())

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        data = Event(step=step, wall_time=time.time(), **content).SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        _append(self._events, length + sums[0] + data + sums[1])

    def _telling(self) -> AbstractContextManager:
        remedy = "; when that is mended, the same command goes on from the newest checkpoint"
        return telling(f"cannot write into MODEL_DIR {self._folder}", remedy)


class NoWriter(Writer):
    """What the other processes of a run hold: only the first one writes."""

    def nothing(self, *args: Any, **kwargs: Any) -> None: ...

    __init__ = scalars = image = audio = config = flush = close = nothing


def read_metrics(model_dir: str | Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl, in order, without one that was cut in two; [] if there is no file."""
    path = Path(model_dir) / METRICS_FILE
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def last_value(model_dir: str | Path, name: str) -> float:
    """Returns the newest value of a scalar of a run; 0 if it was never written."""
    return next((line[name] for line in reversed(read_metrics(model_dir)) if name in line), 0.0)


def _drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a metrics file without the lines after `step` and without a last line cut in two."""
    if not path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step]
    write_whole(path, "".join(kept))


def _append(file: FileIO, data: bytes) -> None:
    while data:  # a write takes as much as there is room for, and the next one raises
        data = data[file.write(data) :]
