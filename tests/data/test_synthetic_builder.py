import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import music_synth
from music_synth.audio import soundfont
from music_synth.data import synthetic as pieces
from music_synth.data.data_dir import default_data_dir
from music_synth.data.datasets import embedded_tfds
from music_synth.data.preprocessors import notes_of_sequence
from music_synth.errors import UserError
from music_synth.midi.notes import read_midi

pytestmark = pytest.mark.usefixtures("short_pieces")

MINUTES = 2.3  # three training pieces, one each for validation and test


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=tmp_path_factory.mktemp("data"))


def files_of(builder):
    return {path.name: path.read_bytes() for path in Path(builder.data_path).glob("*.tfrecord*")}


def records_of(builder, split):
    return list(builder.as_dataset(split=split).as_numpy_iterator())


def test_records_are_the_planned_pieces_in_order(built):
    for split, count in {"train": 3, "validation": 1, "test": 1}.items():
        specs, records = pieces.plan_split(split, MINUTES), records_of(built, split)
        assert len(specs) == len(records) == count
        for spec, record in zip(specs, records, strict=True):
            midi = pieces.compose(spec)
            assert record["id"].decode() == spec.id
            assert record["audio"].dtype == np.int16
            np.testing.assert_allclose(record["audio"] / 32768, pieces.render(midi), atol=0.51 / 32768)
            assert np.abs(record["audio"]).max() > 1000
            notes = read_midi(midi, as_published=True)
            assert notes_of_sequence(record["sequence"]) == notes
            assert record["programs"].tolist() == sorted({n.program for n in notes if not n.is_drum})


def test_same_seed_same_bytes(built, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # nor does the number of workers matter
    again = embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=tmp_path)
    assert files_of(again) == files_of(built) and len(files_of(built)) == 3
    other = embedded_tfds.prepare(pieces.Edition(MINUTES, seed=1), data_dir=tmp_path)
    assert other.data_path != again.data_path
    assert not set(files_of(other).values()) & set(files_of(built).values())


def test_built_once(built, monkeypatch):
    monkeypatch.setattr(pieces, "make_pieces", None)
    again = embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=built.data_path.parents[2])
    assert again.info.splits["train"].num_examples == 3


def test_found_by_name(built):
    import tensorflow_datasets as tfds

    data_dir = built.data_path.parents[2]
    assert tfds.builder(f"synthetic/{MINUTES}min:1.0.0", data_dir=data_dir).data_path == built.data_path
    assert tfds.builder("synthetic", data_dir=data_dir).builder_config.name == "40min"


def test_configurations():
    for name in ("5min-seed3", "5min_seed3"):
        edition = pieces.Edition.named(name)
        assert edition == pieces.Edition(5.0, 3) and edition.name == "5min-seed3"
    assert pieces.Edition.named("0.5min_halfdry").half_dry and pieces.Edition.named("") == pieces.Edition()
    with pytest.raises(UserError, match="no data set of the size 'large': it reads as in synthetic:5min"):
        pieces.Edition.named("large")
    with pytest.raises(UserError, match="minutes"):
        pieces.Edition(minutes=0)


def test_failed_build_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    rendered = []

    def failing(midi, reverb=True):
        rendered.append(midi)
        if len(rendered) == 3:
            raise UserError("rendering needs the FluidSynth library")
        return np.zeros(16000, np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(pieces, "render", failing)
        with pytest.raises(UserError, match="FluidSynth"):
            embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=tmp_path)
    assert not list(tmp_path.rglob("*.tfrecord*")) and not list(tmp_path.rglob("dataset_info.json"))
    assert len(records_of(embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=tmp_path), "train")) == 3


def test_missing_fluidsynth_is_said_in_one_line(tmp_path, monkeypatch):
    def missing():
        raise UserError("rendering needs the FluidSynth library: apt-get install libfluidsynth3")

    monkeypatch.setattr(soundfont, "_import_fluidsynth", missing)
    with pytest.raises(UserError, match="apt-get install libfluidsynth3"):
        embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=tmp_path)


def test_data_dir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot build .*file"):
        embedded_tfds.prepare(pieces.Edition(MINUTES), data_dir=tmp_path / "file")


def test_default_data_dir(monkeypatch, tmp_path):
    repository = Path(music_synth.__file__).resolve().parents[1]
    assert default_data_dir() == repository / "data"
    installed = tmp_path / "site-packages" / "music_synth" / "__init__.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(music_synth, "__file__", str(installed))
    assert default_data_dir() == Path.home() / "music_synth_data"


@pytest.mark.slow
def test_killed_build_leaves_nothing_that_looks_whole(tmp_path):
    code = (
        f"from music_synth.data.datasets.embedded_tfds import Edition, prepare; prepare(Edition(20), {str(tmp_path)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not list(tmp_path.rglob("*incomplete*")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still building"
    assert list(tmp_path.rglob("*incomplete*"))
    builder = embedded_tfds.Synthetic(config="20min", data_dir=str(tmp_path))
    assert not builder.data_path.exists()
    embedded_tfds.prepare(pieces.Edition(0.5), tmp_path)
    assert list(tmp_path.rglob("*incomplete*"))  # of another size
    embedded_tfds.prepare(pieces.Edition(20), tmp_path)
    assert not list(tmp_path.rglob("*incomplete*")) and not list(tmp_path.rglob(".part*"))
