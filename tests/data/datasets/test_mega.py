"""All six downloaded data sets, from a small download in its real format to a training run, and their mixture."""

import json
import shutil

import numpy as np
import pytest

from music_synth import prepare_data, train
from music_synth.data import tasks
from music_synth.data.datasets.reading import corpus
from music_synth.data.feed import open_feed
from music_synth.midi.notes import Note, midi_bytes
from music_synth.midi.tokenizer import Tokenizer
from tests.data.datasets.raw_guitarset import write_guitarset
from tests.data.datasets.raw_maestro import write_maestro
from tests.data.datasets.raw_musicnet import write_musicnet
from tests.data.datasets.raw_slakh import write_slakh
from tests.data.datasets.raw_urmp import write_urmp

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

SECONDS = 8
PROGRAMS = {"maestro": 0, "guitarset": 24, "musicnet": 40, "urmp": 73}  # each alone there; Slakh's play together
CERBERUS_BASS, SLAKH_ALONE = 32, {29, 33, 48}  # of what Slakh's stems become, at least one is in every sub-mix


def a_piece(program, seed):
    """(notes, audio): a note every quarter of a second, and noise."""
    rng = np.random.default_rng(seed)
    notes = [Note(int(rng.integers(60, 70)), 100, program, 0.25 * i, 0.25 * i + 0.2) for i in range(4 * SECONDS)]
    return notes, rng.uniform(-0.2, 0.2, 16000 * SECONDS).astype(np.float32)


def as_midi(piece):
    return midi_bytes(piece[0]), piece[1]


def archived(name, raw):
    """A folder with the archives of a data set, of what was written below `raw`."""
    downloads = raw / f"{name}_archives"
    for archive in corpus(name).archives:
        folder = next((path for path in raw.rglob(archive.split(".zip")[0].split(".tar")[0]) if path.is_dir()), None)
        if folder is not None:  # GuitarSet's pickup has five archives more
            kind = "zip" if archive.endswith(".zip") else "gztar"
            shutil.make_archive(str(downloads / folder.name), kind, folder.parent, folder.name)
    return downloads


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The six data sets, each built by its one command."""
    raw, data = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("data")
    write_maestro(raw, [as_midi(a_piece(PROGRAMS["maestro"], seed)) for seed in range(4)])
    write_slakh(raw, [as_midi(a_piece(0, seed)) for seed in range(5)])  # and Cerberus4
    of_musicnet = {id_: a_piece(PROGRAMS["musicnet"], int(id_)) for id_ in ("1727", "2118", "1733", "1819")}
    write_musicnet(raw, of_musicnet)
    write_guitarset(raw, [a_piece(PROGRAMS["guitarset"], seed) for seed in range(2)])
    write_urmp(raw, [a_piece(PROGRAMS["urmp"], seed) for seed in range(2)])
    for name in tasks.MEGA:
        command = [name, "--source", str(archived(name, raw)), "--data_dir", str(data), "--workers", "1"]
        prepare_data.main([*command, "--skip_bad"])
    return data


@pytest.mark.parametrize("name", [*tasks.MEGA, "mega"])
def test_trains_with_its_overlay(name, data_dir, tmp_path):
    argv = ["--gin_file=diffusion.gin", f"--gin_file=tasks/{name}.gin", "--gin_file=smoke.gin"]
    train.main([*argv, f"--gin.MODEL_DIR={tmp_path / 'run'}", f"--gin.Feed.data_dir={data_dir}"])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and any("eval/loss" in line for line in lines)


def test_mega_draws_each_data_set_by_its_share(data_dir):
    """Of 2,000 batches of 4 windows, as many as n^0.3 says; the programs tell whose a window is."""
    tasks.register_tasks(data_dir=data_dir)
    weights = {name: tasks.registered(name).num_input_examples("train") ** tasks.MIXING_EXPONENT for name in tasks.MEGA}
    ids = Tokenizer().vocabulary
    batches = open_feed("mega", Tokenizer(), 4, data_dir=str(data_dir)).train_batches()
    tokens = np.concatenate([next(batches)["note_tokens"][:, :256] for _ in range(2000)])  # [8000, 256]
    is_program = (tokens >= ids.program_id) & (tokens < ids.program_id + 128)
    heard = [set(row[there] - ids.program_id) for row, there in zip(tokens, is_program, strict=True)]
    counts = {name: sum(programs == {program} for programs in heard) for name, program in PROGRAMS.items()}
    counts["cerberus4"] = sum(CERBERUS_BASS in programs for programs in heard)
    counts["slakh"] = sum(not SLAKH_ALONE.isdisjoint(programs) for programs in heard)
    assert 0.99 * len(heard) < sum(counts.values()) <= len(heard)  # some begin where a piece is all but over
    for name, weight in weights.items():
        expected = weight / sum(weights.values())
        assert abs(counts[name] / len(heard) - expected) < 4 * np.sqrt(expected * (1 - expected) / len(heard)), name
