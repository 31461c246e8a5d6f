"""Who gets a turn when."""

import threading

from music_synth.studio import worker as module
from music_synth.studio.worker import Task, Worker


def test_patient_work_waits_until_nobody_else_wants_a_turn(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    worker, turns, ended = Worker(), [], threading.Event()

    def steps(name, count):
        for _ in range(count):
            turns.append(name)
            yield

    worker.wants_turn(Task(steps("others", 2), lambda _: ended.set(), worker, patient=True))
    worker.wants_turn(Task(steps("first", 3), lambda _: None, worker))
    worker.wants_turn(Task(steps("second", 2), lambda _: None, worker))
    worker.start()
    assert ended.wait(20)
    worker.stop()
    assert turns == ["first", "second", "first", "second", "first", "others", "others"]
