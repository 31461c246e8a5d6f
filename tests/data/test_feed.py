"""The feed of the embedded data set: prepared arrays, made once, and trained on without TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest

from music_synth.data import synthetic
from music_synth.data.feed import Feed, folder_of, path_of
from music_synth.data.prepared import read_manifest
from music_synth.errors import UserError
from music_synth.midi.notes import read_midi
from music_synth.midi.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("short_pieces")

EDITION = "synthetic:1min_halfdry"  # one piece a split


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    folder_of(EDITION, folder)
    return folder


def test_the_arrays_are_those_of_the_composer(data_dir):
    feed = Feed(task=EDITION, tokenizer=Tokenizer(), batch_size=2, data_dir=str(data_dir))
    for split in ("train", "validation", "test"):
        (piece,) = feed.pieces(split)
        (spec,) = synthetic.plan_split(split, 1, half_dry=True)
        midi = synthetic.compose(spec)
        assert piece.id == spec.id and piece.notes == read_midi(midi, as_published=True)
        np.testing.assert_allclose(piece.audio, synthetic.render(midi, spec.reverb), atol=0.51 / 32768)
    assert next(feed.train_batches())["mel"].shape == (2, 256, 128)


def test_they_are_made_once_for_each_version_and_size(data_dir, monkeypatch):
    monkeypatch.setattr(synthetic, "make_pieces", None)  # would fail
    folder = folder_of(EDITION + "_nocontext", data_dir)
    assert (
        folder == folder_of(EDITION.replace("_", "-"), data_dir) == data_dir / "synthetic/1min-halfdry/arrays-1.0.0-1"
    )
    monkeypatch.setattr(synthetic, "VERSION", "1.0.1")
    for task in (EDITION, "synthetic:2min", "synthetic"):
        with pytest.raises(TypeError):
            folder_of(task, data_dir)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    def failing(midi, reverb=True):
        raise UserError("rendering needs the FluidSynth library")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "render", failing)
        with pytest.raises(UserError, match="FluidSynth"):
            folder_of(EDITION, tmp_path)
    assert not list((tmp_path / "synthetic/1min-halfdry").iterdir())
    assert set(read_manifest(folder_of(EDITION, tmp_path))) == {"train", "validation", "test"}


def test_what_cannot_be_opened(data_dir, tmp_path):
    settings = {"tokenizer": Tokenizer(), "batch_size": 2, "data_dir": str(data_dir)}
    with pytest.raises(
        UserError, match=r"'synthetic:1min_halfdry_nocontext' has no context: set Feed\.context = False"
    ):
        Feed(task=EDITION + "_nocontext", **settings)
    assert "context_mel" not in next(Feed(task=EDITION + "_nocontext", context=False, **settings).train_batches())
    with pytest.raises(UserError, match="no data set of the size 'huge'"):
        Feed(task="synthetic:huge", **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot build the synthetic data set in {tmp_path}/file"):
        Feed(task=EDITION, **settings | {"data_dir": str(tmp_path / "file")})
    assert path_of("synthetic") is None
    with pytest.raises(UserError, match=r"no folder \./synthetic"):
        path_of("./synthetic")


def test_training_on_it_imports_no_tensorflow(data_dir, tmp_path, quick_compilation):
    """The command of the README, in a process of its own."""
    values = {
        "MODEL_DIR": tmp_path,
        "TASK": EDITION,
        "Feed.data_dir": data_dir,
        "TRAIN_STEPS": 1,
        "train.num_samples": 0,
    }
    code = f"""
import sys
from music_synth import train
files = ["--gin_file=diffusion.gin", "--gin_file=smoke.gin"]
train.main(files + {[f"--gin.{name}={value}" for name, value in values.items()]})
heavy = {{"tensorflow", "tensorflow_datasets", "seqio", "note_seq", "apache_beam", "torch", "librosa"}}
print("imported:", sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "1/1" in ran.stderr and ran.stdout.splitlines()[-1] == "imported: []"
