"""The command that prepares a data set, as a user runs it."""

import os

import jax
import numpy as np
import pytest

from music_synth import prepare_data
from music_synth.data.audio_feed import open_audio_feed
from music_synth.data.feed import open_feed
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer


def test_folder_holds_the_data_set(made_tasks, made, made_data_dir, tmp_path, capsys):
    out = tmp_path / "new" / "made"
    prepare_data.main(["made", "--out", str(out), "--data_dir", str(made_data_dir)])
    assert str(out) in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["made"]
    feed = open_feed(str(out), Tokenizer(), 2)
    for split in made:
        for piece, expected in zip(feed.pieces(split), made[split], strict=True):
            assert (piece.id, piece.notes) == (expected.id, expected.notes)
            np.testing.assert_array_equal(piece.mel, expected.mel.astype(np.float16))
    files = sum(path.stat().st_size for path in out.rglob("*.mel.npy"))
    frames = sum(len(piece.mel) for split in made.values() for piece in split)
    assert files == pytest.approx(frames * 256, rel=0.01)  # 12.8 kB a second


def test_embedded_data_set_is_built_and_prepared(tmp_path):
    """Composer, FluidSynth, tfds, prepared folder: the data set of half a minute."""
    out = tmp_path / "out"
    prepare_data.main(["synthetic:0.5min", "--audio", "--out", str(out), "--data_dir", str(tmp_path / "data")])
    feed = open_feed(str(out), Tokenizer(), 2)
    for split in ("train", "validation", "test"):
        (piece,) = feed.pieces(split)
        assert piece.notes and len(piece.mel) > 20 * 50
    batch = next(feed.train_batches())
    assert (batch["note_tokens"] > 0).sum() > 20 and batch["mel"].max() > -3
    by_name = open_audio_feed("synthetic:0.5min", 2, data_dir=str(tmp_path / "data"))
    from_folder, from_data_set = (next(f.train_batches(3)) for f in (open_audio_feed(str(out), 2), by_name))
    assert np.abs(from_folder["audio"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, from_folder, from_data_set)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["synthetic"], "nothing to do"),
        (["synthetic", "--dry_run"], "needs no download"),
        (["maestro", "--source", "FULL/nothing"], "no file or folder"),
        (["maestro", "--workers", "0"], "--workers 0"),
        (["synthetic", "--audio"], "name it with --out"),
        (["maestro", "--data_dir", "gs://bucket/data"], "gs://bucket/data is no local path"),
        ([], "required: task"),
        (["nonsense", "--out", "OUT"], "unknown data set 'nonsense': choose from synthetic"),
        (["synthetic:huge", "--out", "OUT"], "synthetic:5min"),
        (["synthetic:0min", "--out", "OUT"], "0.0 minutes"),
        (["synthetic", "--out", "FULL"], "not empty"),
        (["synthetic", "--out", "FULL/file"], "is a file"),
        (["synthetic", "--out", "FULL/file/below"], "cannot write"),
        (["synthetic", "--cache", "FULL/file/below"], "cannot write"),
        (["synthetic", "--nonsense"], "--nonsense"),
    ],
)
def test_user_errors(argv, message, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    named = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    for name, path in named.items():
        argv = [argument.replace(name, path) for argument in argv]
    with pytest.raises(UserError, match=message):
        prepare_data.main(argv)
    assert sorted(os.listdir(tmp_path)) == ["full"]
