"""Every number moves with what it should see, and says so where it cannot be taken."""

import dataclasses
import json

import numpy as np
import pytest

from music_synth.audio.mel import MIN_LOG_MEL, log_mel
from music_synth.evaluation import measures
from music_synth.evaluation.clips import Folder, Sound, Target
from music_synth.evaluation.embeddings import LogMelStatistics, load_embeddings
from music_synth.evaluation.measures import Tools
from music_synth.evaluation.transcription import BasicPitch
from music_synth.midi.notes import Note
from music_synth.vocoder.objective import stft_distance

pytestmark = pytest.mark.usefixtures("quick_compilation")

DB = 20 / np.log(10)  # a log-mel difference of 1
NOTES = [
    Note(pitch, 90, 0, 0.4 * k, 0.4 * k + 0.35) for k, pitch in enumerate((60, 64, 67, 72, 71, 67, 65, 62, 60, 55))
]
SECONDS = 4


def play(notes):
    """Harmonic tones that fade, float32 [S]."""
    audio = np.zeros(SECONDS * 16000)
    for note in notes:
        start, stop = (round(time * 16000) for time in (note.onset, note.offset))
        t = np.arange(min(stop, len(audio)) - start) / 16000
        hertz = 440 * 2 ** ((note.pitch - 69) / 12)
        tone = sum(level * np.sin(2 * np.pi * (k + 1) * hertz * t) for k, level in enumerate((1.0, 0.5, 0.25)))
        audio[start : start + len(t)] += 0.2 * tone * np.exp(-3 * t) * np.minimum(1, t / 0.005)
    return audio.astype(np.float32)


def cells(folder, audios, target=None, notes=NOTES, tools=None):
    """The cells of a row whose clips are these audios, or None for a clip that is never played."""
    target = play(NOTES) if target is None else target
    tools = tools or Tools(None, load_embeddings({}), BasicPitch())
    targets, row = Folder(folder / "target"), Folder(folder / "row")
    names = [str(k) for k in range(len(audios))]
    for name, audio in zip(names, audios, strict=True):
        targets.write_target(name, Target(name, notes, log_mel(target, np), target))
        row.write_sound(name, Sound(log_mel(audio, np), audio))
        measures.measure_clip(row, targets, name, tools)
    return measures.summarize(row, targets, names, tools)


def test_log_mel_error_is_in_decibels():
    target = np.random.default_rng(0).normal(size=(300, 128)).astype(np.float32)
    error = measures.log_mel_error(target + 1, target)
    assert error["value"] == pytest.approx(DB, rel=1e-6)
    assert error["segments"] == pytest.approx([DB, DB], rel=1e-6)
    below = measures.log_mel_error(np.full((1, 128), -50.0), np.full((1, 128), MIN_LOG_MEL))
    assert below["value"] == 0  # below the floor is the floor


def test_stft_error_is_the_distance_that_inverters_are_trained_by():
    rng = np.random.default_rng(0)
    made, target = (rng.normal(size=256 * 320).astype(np.float32) for _ in range(2))
    expected = float(stft_distance(made[None], target[None])[0])
    assert measures.stft_error(made, target)["value"] == pytest.approx(expected, rel=1e-4)
    twice = measures.stft_error(np.tile(made, 2), np.tile(target, 2))
    assert twice["value"] == pytest.approx(expected, rel=1e-4) and len(twice["segments"]) == 2


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The cells of a perfect row, and of one with noise; test_metric_reactions has all that can go wrong."""
    truth = play(NOTES)
    noise = np.random.default_rng(0).normal(0, 0.01, len(truth)).astype(np.float32)
    folder = tmp_path_factory.mktemp("played")
    return cells(folder / "perfect", [truth]), cells(folder / "noisy", [truth + noise])


def test_a_perfect_row_is_at_zero_and_a_noisy_one_is_not(played):
    perfect, noisy = played
    assert perfect["log_mel"].value < 0.2 and perfect["stft"].value < 0.02  # of 16 bits
    assert perfect["onset_f1"].value > 0.9
    for name in ("log_mel", "basic_pitch"):
        for kind in ("distance", "frechet", "kernel"):
            assert perfect[f"{name}_{kind}"].value == pytest.approx(0, abs=1e-6)
            assert noisy[f"{name}_{kind}"].value > 1e-3
    assert noisy["log_mel"].value > 10 * perfect["log_mel"].value
    assert noisy["stft"].value > 10 * perfect["stft"].value


def test_what_cannot_be_told_says_what_it_needs(played):
    assert "--transcriber" in played[0]["full_f1"].missing
    assert "--vggish PATH" in played[0]["vggish_frechet"].missing


@dataclasses.dataclass(frozen=True)
class Loudness:
    """An embedding of one dimension, of windows of 0.1 s."""

    name: str = "loudness"

    def embed(self, audio):
        windows = audio[: len(audio) // 1600 * 1600].reshape(-1, 1600)
        return np.sqrt(np.mean(windows**2, axis=1, keepdims=True))


def test_order_of_clips_and_groups_change_nothing(tmp_path):
    rng = np.random.default_rng(1)
    audios = [play(NOTES) + rng.normal(0, level, SECONDS * 16000).astype(np.float32) for level in (0.01, 0.02, 0.04)]
    tools = Tools(None, {"loudness": Loudness()}, lambda audio: NOTES[:5], hears_programs=True)
    forward, backward = (
        cells(tmp_path / name, order, tools=tools) for name, order in (("f", audios), ("b", audios[::-1]))
    )
    for key, cell in forward.items():
        if cell.value is not None and "infinity" not in key:
            assert cell.value == pytest.approx(backward[key].value, rel=1e-5), key
    assert forward["loudness_frechet"].value > 0
    assert forward["log_mel"].low < forward["log_mel"].value < forward["log_mel"].high
    assert forward["full_f1"].value == pytest.approx(2 * 1 * 0.5 / 1.5)  # half of the notes, all of them right
    assert "500" in forward["loudness_frechet_infinity"].missing


def test_silence_and_short_clips_fail_by_themselves(tmp_path):
    tools = Tools(None, {"log_mel": LogMelStatistics()}, lambda audio: [])
    truth, silent = play(NOTES), np.zeros(SECONDS * 16000, np.float32)
    quiet = cells(tmp_path / "silent model", [silent], tools=tools)
    assert quiet["stft"].value > 1 and quiet["onset_f1"].value == 0 and quiet["log_mel_frechet"].value > 0
    nothing = cells(tmp_path / "silent target", [truth], target=silent, tools=tools)
    assert "silent" in nothing["stft"].missing and "failed" in nothing["log_mel_kernel"].missing
    assert nothing["log_mel"].value > 1
    short = cells(tmp_path / "short", [truth[:4800]], target=truth[:4800], tools=tools)
    assert short["log_mel_frechet"].missing.startswith("failed: 0.30 s of audio are too short")
    assert short["log_mel"].value < 0.2


def test_a_clip_that_cannot_be_measured_is_left_out_and_counted(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Picky(Loudness):
        def embed(self, audio):
            if np.abs(audio).max() < 0.01:
                raise measures.UserError("too soft")
            return super().embed(audio)

    truth = play(NOTES)
    row = cells(tmp_path, [truth, 0.01 * truth], tools=Tools(None, {"loudness": Picky()}))
    assert row["loudness_distance"].clips == 1 and row["loudness_distance"].left_out == {"too soft": 1}
    assert row["loudness_frechet"].clips == 1 and row["log_mel"].clips == 2
    kept = json.loads(json.dumps(measures.as_json(row)))
    assert all(kept[f"loudness_{kind}"]["left_out"] == {"too soft": 1} for kind in ("distance", "frechet", "kernel"))


def test_every_transcriber_has_scores_of_its_own_and_fails_alone(tmp_path):
    def broken(audio):
        raise KeyError("no model")

    def made(name, transcriber):
        return cells(tmp_path, [play(NOTES)], tools=Tools(None, {}, transcriber, transcriber_name=name))

    assert made("half", lambda audio: NOTES[:5])["onset_f1"].value == pytest.approx(2 / 3)
    assert made("all", lambda audio: NOTES)["onset_f1"].value == 1  # beside the scores of the other
    assert made("half", broken)["onset_f1"].value == pytest.approx(2 / 3)  # which are kept
    failed = made("broken", broken)
    assert failed["onset_f1"].missing == "failed: the transcriber fails: KeyError: 'no model'"
    assert failed["log_mel"].value < 0.2
    assert made("wrong", lambda audio: [1])["onset_f1"].missing.startswith("failed: the transcriber fails: TypeError")
