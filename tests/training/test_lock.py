"""One training at a time in a MODEL_DIR, whatever became of the one before."""

import os
import socket

import pytest

from music_synth.errors import UserError
from music_synth.training.lock import FILE, lock_model_dir
from tests.training.test_loop import start, wait_for_step
from tests.training.toy import train_toy

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_second_training_is_refused_by_one_line_that_names_the_first(tmp_path):
    first = start(tmp_path, "num_steps=100000", "delay=0.02")
    wait_for_step(tmp_path, 4, first)
    second = start(tmp_path, "num_steps=8")
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 1
    (line,) = errors.strip().splitlines()
    assert line.startswith(f"error: another training is at work in MODEL_DIR {tmp_path}: process {first.pid} on ")
    assert socket.gethostname() in line and f"-m tests.training.toy {tmp_path} num_steps=100000" in line
    assert first.poll() is None
    first.kill()  # no handler runs, and yet the folder is free
    first.communicate()
    train_toy(str(tmp_path), num_steps=4)
    assert (tmp_path / FILE).read_bytes() == b""


def test_the_lock_ends_with_the_block_also_by_an_error(tmp_path):
    folder = tmp_path / "runs" / "mine"
    with lock_model_dir(folder) as made:
        assert made == folder and folder.is_dir()
        assert (folder / FILE).read_text().startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock_model_dir(folder):
            pass
    with pytest.raises(KeyError), lock_model_dir(folder):
        raise KeyError
    with lock_model_dir(folder):
        pass


def test_what_somebody_wrote_into_the_lock_is_not_all_repeated(tmp_path):
    with lock_model_dir(tmp_path):
        (tmp_path / FILE).write_bytes(b"\xff" * 10**6)
        with pytest.raises(UserError) as told, lock_model_dir(tmp_path):
            pass
    assert len(str(told.value)) < 2000
