import itertools

import numpy as np
import pytest

from music_synth.audio.io import audio_to_int16
from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL, log_mel
from music_synth.data.audio_feed import AudioFeed, spoiled
from music_synth.data.examples import Piece
from music_synth.data.feed import open_feed
from music_synth.data.prepared import read_manifest, write_folder
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Tokenizer
from music_synth.vocoder.source import render

LENGTHS = {"train": (48_000, 16_100), "validation": (20 * HOP_LENGTH + 7,), "test": (9_000,)}


def make_piece(name, samples):
    """Noise whose loudness says where in the piece it is."""
    rng = np.random.default_rng(len(name) + samples)
    audio = (rng.uniform(-1, 1, samples) * np.linspace(0.05, 0.5, samples)).astype(np.float32)
    return Piece(name, [Note(60, 80, 0, 0.1, 0.5)], log_mel(audio, np), audio)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "prepared"
    splits = {split: [make_piece(f"{split}{n}", n) for n in lengths] for split, lengths in LENGTHS.items()}
    write_folder(path, splits, "noise", "1", audio=True)
    return path


def open_audio(folder, split):
    return [piece.open_audio() for piece in read_manifest(folder)[split]]


def feed(folder, **settings):
    return AudioFeed(task=str(folder), **({"batch_size": 4, "num_frames": 8, "eval_frames": 8} | settings))


def test_the_folder_keeps_the_audio(folder):
    for audio, length in zip(open_audio(folder, "train"), LENGTHS["train"], strict=True):
        assert audio.dtype == np.int16
        np.testing.assert_allclose(audio / 32768, make_piece(f"train{length}", length).audio, atol=0.6 / 32768)
    pieces = open_feed(str(folder), Tokenizer(), 1).pieces("train")
    np.testing.assert_array_equal(audio_to_int16(next(pieces).audio), open_audio(folder, "train")[0])


def test_batches_are_excerpts_and_their_mel(folder):
    batch = next(feed(folder, mix=0.0, gain_db=(0.0, 0.0)).train_batches())
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "audio": ((4, 8 * HOP_LENGTH), np.float32),
        "mel": ((4, 8, 128), np.float32),
        "mel_mask": ((4, 8), bool),
    }
    whole = [audio / 32768 for audio in open_audio(folder, "train")]
    for audio, mel in zip(batch["audio"], batch["mel"], strict=True):
        places = [(p, np.flatnonzero(np.abs(p[: 1 - len(audio)] - audio[0]) < 1e-6)) for p in whole]
        start, piece = next(
            (s, p) for p, found in places for s in found if np.allclose(p[s : s + len(audio)], audio, atol=1e-6)
        )
        following = piece[start : start + len(audio) + HOP_LENGTH].astype(np.float32)
        np.testing.assert_allclose(mel, log_mel(following, np)[:8], atol=1e-4)  # the last frame sees what follows


def test_a_batch_is_a_function_of_seed_and_number(folder):
    def draw(start, **settings):
        return next(feed(folder, **settings).train_batches(start))["audio"]

    third = next(itertools.islice(feed(folder).train_batches(), 3, None))["audio"]
    np.testing.assert_array_equal(third, draw(3))
    assert np.abs(draw(3) - draw(4)).max() > 0 and np.abs(draw(3) - draw(3, seed=1)).max() > 0


def test_long_pieces_come_more_often_and_all_of_them(folder):
    """Noise is louder the later it comes: its level tells piece and place."""
    levels = [
        np.abs(audio).mean()
        for batch in itertools.islice(feed(folder, mix=0.0, gain_db=(0.0, 0.0)).train_batches(), 60)
        for audio in batch["audio"]
    ]
    assert min(levels) < 0.05 and max(levels) > 0.2


def test_gain_and_mix(folder):
    def level(**settings):
        return np.abs(next(feed(folder, batch_size=64, **settings).train_batches())["audio"]).mean()

    plain = level(mix=0.0, gain_db=(0.0, 0.0))
    assert level(mix=0.0, gain_db=(-20.0, -20.0)) == pytest.approx(0.1 * plain, rel=1e-3)
    assert level(mix=1.0, gain_db=(0.0, 0.0)) > 1.2 * plain


def test_evaluation_covers_each_piece_once(folder):
    batches = list(feed(folder, batch_size=2).eval_batches())
    audio = np.concatenate([batch["audio"] for batch in batches])
    mask = np.concatenate([batch["mel_mask"] for batch in batches])
    mel = np.concatenate([batch["mel"] for batch in batches])
    piece = open_audio(folder, "validation")[0] / np.float32(32768)
    assert mask.sum() == 21  # 20 hops and 7 samples
    np.testing.assert_array_equal(audio.ravel()[: len(piece)], piece)
    assert not audio.ravel()[len(piece) :].any()
    np.testing.assert_allclose(mel[mask], log_mel(piece, np), atol=1e-5)
    assert (mel[~mask] == np.float32(MIN_LOG_MEL)).all()


def test_a_folders_own_mel_in_place_of_the_audios(tmp_path):
    """Frame k of the stored mel says k: whatever the excerpt, its mel belongs to its audio and has its gain."""
    samples = 40 * HOP_LENGTH
    audio = (np.arange(samples) // HOP_LENGTH / 100).astype(np.float32)  # sample i says in which frame it lies
    piece = Piece("steps", [], np.repeat(np.arange(40, dtype=np.float32)[:, None] - 8, 128, axis=1), audio)
    write_folder(tmp_path / "sampled", {"train": [piece], "validation": [piece]}, "steps", "1", audio=True)
    settings = {"stored_mel": True, "mix": 0.0, "num_frames": 8, "gain_db": (-6.0, -6.0)}
    gain = 10 ** (-6 / 20)
    for batch in itertools.islice(feed(tmp_path / "sampled", **settings).train_batches(), 3):
        frames = np.rint(batch["audio"].reshape(4, 8, HOP_LENGTH) / gain * 100)  # [B, T, 320]
        np.testing.assert_array_equal(frames, frames[..., :1].repeat(HOP_LENGTH, axis=-1))
        np.testing.assert_allclose(batch["mel"], frames[..., :128] - 8 + np.log(gain), atol=1e-3)
    held_out = list(feed(tmp_path / "sampled", **settings, eval_frames=30).eval_batches())
    mel, mask = held_out[0]["mel"], held_out[0]["mel_mask"]
    np.testing.assert_array_equal(mel[mask][:, 5], np.arange(40) - 8)
    assert (mel[~mask] == np.float32(MIN_LOG_MEL)).all() and mask.shape == (4, 30)


def test_the_source_of_the_notes(tmp_path):
    """Where the audio is the source itself, so is what comes with each excerpt of it, up to its gain."""
    notes = [Note(50 + i, 80, 0, 0.1 * i, 0.1 * i + 0.2) for i in range(30)]
    audio = 0.2 * render(notes, 0, 50_000)
    pieces = {split: [Piece("sources", notes, log_mel(audio, np), audio)] for split in ("train", "validation")}
    write_folder(tmp_path / "sources", pieces, "sources", "1", audio=True)
    settings = {"notes": True, "mix": 0.0, "gain_db": (0.0, 0.0), "batch_size": 8, "wrong_notes": 0.0}
    right = feed(tmp_path / "sources", **settings, empty_notes=0.0)
    for batch in (next(right.train_batches()), next(right.eval_batches())):
        assert batch["source"].shape == (8, 11 * HOP_LENGTH) and batch["source"].dtype == np.float32
        inner = 0.2 * batch["source"][:, HOP_LENGTH : -2 * HOP_LENGTH]
        np.testing.assert_allclose(batch["audio"], inner, atol=1e-3)
    assert not np.any(next(feed(tmp_path / "sources", **settings, empty_notes=1.0).train_batches())["source"])


def test_spoiled_notes_are_wrong_in_each_way():
    notes = [Note(60 + i, 80, 0, 0.1 * i, 0.1 * i + 1) for i in range(10)]
    ways = set()
    for seed in range(40):
        wrong = spoiled(notes, np.random.default_rng(seed))
        assert wrong != notes and all(0 <= note.pitch <= 127 for note in wrong)
        ways.add("fewer" if len(wrong) < 10 else "more" if len(wrong) > 10 else wrong[0].onset != 0.0)
    assert ways == {"fewer", "more", True, False}


def test_bad_settings(folder, tmp_path):
    for settings, said in (
        ({"mix": 1.5}, "mix = 1.5"),
        ({"gain_db": (3.0, -3.0)}, "gain_db"),
        ({"num_frames": 0}, "num_frames = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"stored_mel": True}, "cannot be mixed; set AudioFeed.mix = 0, not 0.2"),
    ):
        with pytest.raises(UserError, match=said):
            feed(folder, **settings)
    with pytest.raises(UserError, match="'synthetic' is no folder"):
        AudioFeed(task="synthetic", batch_size=4, stored_mel=True)
    with pytest.raises(UserError, match=r"empty_notes = 0\.7, wrong_notes = 0\.4: must be shares"):
        feed(folder, notes=True, empty_notes=0.7, wrong_notes=0.4)
    silent = tmp_path / "silent"
    write_folder(silent, {"train": [make_piece("a", 4000)]}, "noise", "1")
    with pytest.raises(UserError, match=r"holds no audio: prepare the folder again .* --audio"):
        next(feed(silent).train_batches())
    with pytest.raises(UserError, match="no split 'validation'"):
        next(feed(silent).eval_batches())
    (folder / "train/00000.audio.npy").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"00000\.audio\.npy is missing"):
        next(feed(folder).train_batches())
    (tmp_path / "gone").rename(folder / "train/00000.audio.npy")
