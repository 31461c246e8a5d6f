"""The one thread that plays: whoever waits gets a turn, one after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)
PATIENCE = 2.0  # seconds


class Job(Protocol):
    """What the worker gives turns to. Compared by identity."""

    urgent: bool  # before all that are not
    patient: bool  # only where nobody has wanted a turn for `PATIENCE` seconds

    def turn(self) -> bool:
        """Does a little, at most a segment; returns whether there is more to do now."""


@dataclass
class Counts:
    """What has been made since the start."""

    turns: int = 0
    errors: int = 0
    audio_seconds: float = 0.0
    busy_seconds: float = 0.0


@dataclass(eq=False)
class Worker:
    """Runs turns of jobs in a thread of its own, round robin."""

    counts: Counts = field(default_factory=Counts)
    _waiting: deque[Job] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self, seconds: float = 3.0) -> None:
        """Ends after the turn that is under way; waits so long for it."""
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    def wants_turn(self, job: Job) -> None:
        """Puts a job into the queue, unless it waits there already."""
        with self._changed:
            if job not in self._waiting and not self._ended:
                (self._waiting.appendleft if job.urgent else self._waiting.append)(job)
                self._changed.notify()

    def forget(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:  # what `remove` says of one that is not there is long in the making
                self._waiting.remove(job)

    def __len__(self) -> int:
        return len(self._waiting)

    def _hurried(self) -> bool:
        """Whether somebody wants a turn now, or the end has come."""
        return self._ended or any(not job.patient for job in self._waiting)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                self._changed.wait_for(self._hurried, PATIENCE)
                if self._ended:
                    return
                if not self._waiting:
                    continue
                job = next((job for job in self._waiting if not job.patient), self._waiting[0])
                self._waiting.remove(job)
            begin = time.perf_counter()
            try:
                more = job.turn()
            except Exception:  # a job tells its own client; this is one that could not
                log.exception("a turn failed")
                self.counts.errors += 1
                more = False
            self.counts.turns += 1
            self.counts.busy_seconds += time.perf_counter() - begin
            if more:
                self.wants_turn(job)


class Task:
    """A job of steps that are written as a generator; a step that yields a `Future` waits for it.

    done: is called at the end, with the error if there was one.
    """

    urgent = False

    def __init__(
        self, steps: Iterator[Any], done: Callable[[Exception | None], None], worker: Worker, patient: bool = False
    ):
        self._steps, self._done, self._worker, self.patient = steps, done, worker, patient
        self._cancelled = False

    def turn(self) -> bool:
        if self._cancelled:
            self._steps.close()  # type: ignore[attr-defined]
            return False
        try:
            step = next(self._steps)
        except StopIteration:
            self._done(None)
            return False
        except Exception as error:
            self._done(error)
            return False
        if isinstance(step, Future):
            step.add_done_callback(lambda _: self._worker.wants_turn(self))
            return False
        return True

    def cancel(self) -> None:
        """Ends the steps where they are, in the worker's thread."""
        self._cancelled = True
        self._worker.wants_turn(self)
