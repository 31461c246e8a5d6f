"""Builds that are killed, that meet a full disk, or that run in several processes: the records are always the same."""

import contextlib
import functools
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from music_synth import prepare_data
from music_synth.data.datasets import builder, reading
from music_synth.data.feed import open_feed
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Tokenizer
from tests.data.datasets.builds import ANY_TIME, records, started
from tests.data.datasets.raw_musicnet import write_musicnet

IDS = ("1727", "1788", "1789", "1792", "1793", "1805", "1733", "1776")  # six of training, then validation, test
SECONDS = 40  # 2.6 MB a recording while it waits, 1.3 MB as a record: see LIMITS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """MusicNet, unpacked."""
    rng = np.random.default_rng(0)
    notes = [[Note(int(rng.integers(50, 70)), 100, 40, i, i + 0.5) for i in range(SECONDS)] for _ in IDS]
    noise = [rng.uniform(-0.1, 0.1, 16000 * SECONDS).astype(np.float32) for _ in IDS]
    return write_musicnet(tmp_path_factory.mktemp("raw"), dict(zip(IDS, zip(notes, noise, strict=True), strict=True)))


def arguments(source, data_dir, *more):
    return ["musicnet", f"--source={source}", f"--data_dir={data_dir}", "--skip_bad", *more]  # most of it is missing


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The records of a build in one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("expected")
    prepare_data.main(arguments(source, folder, "--workers=1"))
    made = records("musicnet", folder)
    assert [r[0].decode() for split in made.values() for r in split] == list(IDS)
    return made


def test_two_workers_equal_one(source, expected, tmp_path):
    prepare_data.main(arguments(source, tmp_path, "--workers=2"))
    assert records("musicnet", tmp_path) == expected


@pytest.mark.slow
def test_two_processes_of_beam_equal_one(source, expected, tmp_path, capfd):
    # As DirectRunner, which would first look for a runner to download.
    runner = "--beam_runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"
    options = "--beam_options=direct_num_workers=2,--direct_running_mode=multi_processing"
    prepare_data.main(arguments(source, tmp_path, runner, options))
    assert capfd.readouterr().err.count("Python sdk harness starting") == 2
    assert records("musicnet", tmp_path) == expected


@pytest.mark.slow
def test_a_killed_build_goes_on(source, expected, tmp_path, monkeypatch):
    killed = started(arguments(source, tmp_path, "--workers=1"), start_new_session=True)
    deadline = time.monotonic() + ANY_TIME
    while len(done := sorted(tmp_path.glob(".musicnet-*/[!.]*.npz"))) < 2:
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.01)
    killed.kill()
    killed.communicate(timeout=ANY_TIME)  # to the end of its output, which its worker shares: that must end too
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".musicnet-*/[!.]*.npz")}
    assert 2 <= len(done) < len(IDS)
    assert not builder.is_built("musicnet", tmp_path)
    with pytest.raises(UserError, match="musicnet is not in"):
        open_feed("musicnet", Tokenizer(), 2, data_dir=str(tmp_path))

    later = {}

    def load_all(*args):
        reading.load_all(*args)
        later.update((path, path.stat().st_mtime_ns) for path in tmp_path.glob(".musicnet-*/[!.]*.npz"))

    monkeypatch.setattr(builder, "load_all", load_all)
    prepare_data.main(arguments(source, tmp_path, "--workers=1"))
    assert len(later) == len(IDS) and done.items() <= later.items()  # those were not read again
    assert records("musicnet", tmp_path) == expected
    assert not list(tmp_path.glob(".musicnet*")) and [path.name for path in (tmp_path / "musicnet").iterdir()] == [
        "1.0.0"
    ]


def limit_files(size):
    """A disk that is full as soon as a file of this process, or of one it starts, has `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def no_file_above(size):
    before, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit_files(size)
    try:
        yield
    finally:
        limit_files(before)


def test_a_disk_that_fills(source, expected, tmp_path):
    """At every stage: while the archive is unpacked, a recording kept, the records gathered, and the mel written."""
    archive = Path(shutil.make_archive(str(tmp_path / "musicnet"), "gztar", source.parent, source.name))
    data, out = tmp_path / "data", tmp_path / "out"
    argv = arguments(archive, data, "--workers=1", f"--out={out}")
    with no_file_above(100_000), pytest.raises(UserError, match=f"cannot unpack {archive} into {data}.*File too large"):
        prepare_data.main(argv)
    assert not [path for path in data.rglob("*") if path.is_file()]
    prepare_data.main(arguments(archive, data, "--dry_run"))  # unpacks
    with no_file_above(2_000_000), pytest.raises(UserError, match=f"cannot build musicnet in {data}: File too large"):
        prepare_data.main(argv)
    assert not builder.is_built("musicnet", data) and not list(data.glob(".musicnet-*/[!.]*.npz"))
    with (
        no_file_above(5_000_000),
        pytest.raises(
            UserError, match=rf"tfrecord.*; File too large \(building musicnet in {data}; what is done is kept"
        ),
    ):
        prepare_data.main(argv)
    assert not builder.is_built("musicnet", data) and len(list(data.glob(".musicnet-*/[!.]*.npz"))) == len(IDS)
    prepare_data.main(arguments(archive, data))
    assert records("musicnet", data) == expected
    with no_file_above(300_000), pytest.raises(UserError, match=f"cannot write {out}: .* written; make room"):
        prepare_data.main(argv)
    assert not out.exists()
    prepare_data.main(argv)
    assert len(list(open_feed(str(out), Tokenizer(), 2).pieces("train"))) == 6


@pytest.mark.slow
def test_the_command_says_in_one_line_that_the_disk_is_full(source, tmp_path):
    limited = started(arguments(source, tmp_path), preexec_fn=functools.partial(limit_files, 2_000_000))
    _, told = limited.communicate(timeout=ANY_TIME)
    assert limited.returncode == 1
    assert f"error: cannot build musicnet in {tmp_path}: File too large; " in told.splitlines()[-1]
    assert "Traceback" not in told
    assert not (tmp_path / "musicnet").exists()
