"""The command that prepares a data set, as a user runs it."""

import os

import jax
import numpy as np
import pytest

from music_synth import config, prepare_data
from music_synth.data.audio_feed import AudioFeed
from music_synth.data.feed import open_feed
from music_synth.data.prepared import write_folder
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer
from music_synth.training.checkpoint import Checkpointer
from music_synth.training.optimizer import adamw
from music_synth.training.step import create_state


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
    by_name = AudioFeed(task="synthetic:0.5min", batch_size=2, data_dir=str(tmp_path / "data"))
    from_folder, from_data_set = (next(f.train_batches(3)) for f in (AudioFeed(task=str(out), batch_size=2), by_name))
    assert np.abs(from_folder["audio"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, from_folder, from_data_set)


def test_mels_that_a_decoder_sampled(made, tmp_path, quick_compilation):
    """Each segment is what the run makes of its notes and its true context; notes and audio are the recording's."""
    piece = made["validation"][1]  # 7 s: 11 segments of 0.64 s, more than are sampled together
    plain, run = tmp_path / "plain", tmp_path / "run"
    write_folder(plain, {"train": [piece], "validation": [piece]}, "made", "1")
    run.mkdir()
    sizes = ("NetworkConfig.target_frames", "NetworkConfig.context_frames", "Tokenizer.segment_frames")
    (tmp_path / "recipe.gin").write_text(
        f"include 'autoregressive.gin'\ninclude 'deterministic.gin'\ninclude 'smoke.gin'\nTASK = '{plain}'\n"
        + "".join(f"{size} = 32\n" for size in sizes)
        + "NetworkConfig.max_tokens = 64\nTokenizer.max_tokens = 64\n"
    )
    config.parse([tmp_path / "recipe.gin"])
    keywords = config.build("train").keywords
    (run / "config.gin").write_text(config.operative_text())
    model, feed = keywords["model"], keywords["feed"]
    state = jax.jit(lambda: create_state(model, adamw(1e-3), jax.random.key(0), 0.9))()
    Checkpointer(run).save(state, data_position=0)
    sampled = prepare_data.sampler_of(str(run))(piece)
    assert sampled.notes == piece.notes and sampled.audio is piece.audio and sampled.mel.shape == piece.mel.shape
    assert np.abs(sampled.mel - piece.mel).mean() > 0.5  # no training, no likeness
    sample, start = jax.jit(model.sample), 0
    for batch in feed.eval_batches("validation"):
        expected = np.asarray(sample(state.ema_params, batch, jax.random.key(0)))[batch["mel_mask"]]
        np.testing.assert_allclose(sampled.mel[start : start + len(expected)], expected, atol=0.02)  # float16 contexts
        start += len(expected)
    assert start == len(piece.mel)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["synthetic"], "nothing to do"),
        (["synthetic", "--dry_run"], "needs no download"),
        (["maestro", "--source", "FULL/nothing"], "no file or folder"),
        (["maestro", "--workers", "0"], "--workers 0"),
        (["synthetic", "--audio"], "name it with --out"),
        (["synthetic", "--out", "OUT", "--sampled_by", "run"], "give --audio and --out too"),
        (["synthetic", "--out", "OUT", "--audio", "--sampled_by", "FULL/run"], "no folder .*run"),
        (["maestro", "--data_dir", "gs://bucket/data"], "gs://bucket/data is no local path"),
        ([], "required: task"),
        (["nonsense", "--out", "OUT"], "unknown data set 'nonsense': choose from synthetic"),
        (["synthetic:huge", "--out", "OUT"], "synthetic:5min"),
        (["synthetic:0min", "--out", "OUT"], "0.0 minutes"),
        (["synthetic", "--out", "FULL"], "not empty"),
        (["synthetic", "--out", "FULL/file"], "is a file"),
        (["synthetic", "--out", "FULL/file/below"], "cannot write"),
        (["synthetic", "--cache", "FULL/file/below"], "cannot write"),
        (["synthetic", "--out", "n" * 300], "cannot write nnn.*: File name too long; choose another folder"),
        (["synthetic", "--out", "/proc/no/folder"], "cannot write /proc/no/folder: "),
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
