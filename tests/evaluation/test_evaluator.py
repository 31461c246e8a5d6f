"""Models whose scores are known: whole pieces, single segments, drift, what is kept on disk, what goes wrong."""

import functools
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio.mel import MIN_LOG_MEL, log_mel
from music_synth.data.examples import Piece
from music_synth.errors import UserError
from music_synth.evaluation import evaluator, sources
from music_synth.evaluation import pieces as chosen
from music_synth.evaluation.measures import Tools
from music_synth.evaluation.sources import SINGLE, WHOLE, Checkpoint
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.playing import Decoder, Segment

DB = 20 / np.log(10)  # a log-mel difference of 1
NETWORK = NetworkConfig(target_frames=4, context_frames=4, max_tokens=64, num_mels=128)
TOKENIZER = Tokenizer(segment_frames=4, max_tokens=64)


@dataclass(frozen=True)
class Staircase:
    """Writes its context, `step` higher; 0 where there is no context."""

    step: float
    network: NetworkConfig = NETWORK

    def sample(self, params, batch, rng):
        has_context = batch["context_mask"].all(axis=1)[:, None, None]
        return jnp.where(has_context, batch["context_mel"] + self.step, 0.0)


@dataclass(frozen=True)
class Level:
    """Writes ones; reads no context."""

    network: NetworkConfig

    def sample(self, params, batch, rng):
        assert batch["context_mel"].shape[1:] == (0, 128)
        return jnp.full((len(rng), 4, 128), 1.0)


@dataclass(frozen=True)
class Dice:
    """Writes random numbers, moved by the context's mean and the number of tokens."""

    network: NetworkConfig = NETWORK

    def sample(self, params, batch, rng):
        num_tokens = (batch["note_tokens"] > 0).sum(axis=1).astype(jnp.float32)
        level = 0.1 * batch["context_mel"].mean(axis=(1, 2)) + num_tokens
        shape = (self.network.target_frames, self.network.num_mels)
        return level[:, None, None] + jax.vmap(lambda key: jax.random.normal(key, shape))(rng)


def staircase_piece(name, num_frames):
    """Frame t is at level t // 4: each segment one above the one before."""
    mel = np.broadcast_to((np.arange(num_frames) // 4)[:, None], (num_frames, 128)).astype(np.float32)
    return Piece(name, [Note(60, 90, 0, 0.0, 0.05)], mel)


def checkpoint(model):
    return Checkpoint("it", Decoder(model, {}, TOKENIZER))


def silence(mel, notes=None):
    return np.zeros(320 * len(mel), np.float32)


INVERTER, SUMS = {"silence": silence}, {"silence": "0"}


def score(model, pieces, folder, batch_size=8, seed=0, **settings):
    """Rows: mean spectrum, whole pieces, single segments, recording, ground truth through silence, each one's mean."""
    tools = Tools(INVERTER)
    targets = chosen.store_targets(pieces, folder, tools, SUMS)
    mean, own_mean, *ceilings = evaluator.reference_rows(np.zeros(128, np.float32), folder, SUMS)
    models = evaluator.model_rows(functools.partial(checkpoint, model), folder, SUMS, seed, batch_size)
    return list(evaluator.score([mean, *models, *ceilings, own_mean], targets, lambda: tools, batch_size, **settings))


def errors(rows):
    return [row["cells"]["log_mel"].get("value") if row["cells"] else None for row in rows]


def test_a_perfect_model_scores_zero_and_the_mean_spectrum_does_not(tmp_path):
    pieces = [staircase_piece("a", 10), staircase_piece("b", 16)]
    mean, whole, single, _, through, own_mean = errors(score(Staircase(1.0), pieces, tmp_path))
    assert whole == single == 0
    levels = np.concatenate([np.arange(10) // 4, np.arange(16) // 4])
    assert mean == pytest.approx(DB * levels.mean())  # over all frames, not over pieces
    spread = [np.abs(own - own.mean()).sum() for own in (levels[:10], levels[10:])]
    assert own_mean == pytest.approx(DB * sum(spread) / 26, rel=1e-6)
    assert through == pytest.approx(DB * (levels - MIN_LOG_MEL).mean(), rel=1e-6)


def test_errors_add_up_over_whole_pieces_but_not_over_single_segments(tmp_path):
    rows = score(Staircase(2.0), [staircase_piece("a", 14)], tmp_path)  # 4 segments, the last of 2 frames
    # Chained, segment j is j too high; with its true context every one but the first is 1 too high.
    assert [row["mode"] for row in rows] == ["", WHOLE, SINGLE, "", "", ""]
    assert errors(rows)[1] == pytest.approx(DB * (0 * 4 + 1 * 4 + 2 * 4 + 3 * 2) / 14)
    assert errors(rows)[2] == pytest.approx(DB * 10 / 14)


def test_scores_depend_on_neither_batch_size_nor_order(tmp_path):
    rng = np.random.default_rng(3)
    pieces = [
        Piece(f"p{n}", [Note(60 + n, 80, n, 0.0, 0.02 * n)], rng.normal(size=(n, 128)).astype(np.float32))
        for n in (3, 9, 4, 17, 12)
    ]
    reference = errors(score(Dice(), pieces, tmp_path / "reference", batch_size=5))[1:3]
    for number, (batch_size, order) in enumerate(((1, 1), (2, -1), (8, 1), (3, -1))):
        others = errors(score(Dice(), pieces[::order], tmp_path / str(number), batch_size=batch_size))[1:3]
        assert others == pytest.approx(reference, rel=1e-5)
    other = errors(score(Dice(), pieces, tmp_path / "reference", seed=1))  # beside the others' clips
    assert other[1] != pytest.approx(reference[0], rel=1e-5)


def test_drift_is_told_by_the_kth_stretch_of_a_piece(tmp_path):
    level = Level(NetworkConfig(target_frames=4, context_frames=0, max_tokens=64))
    mel = np.zeros((600, 128), np.float32)
    mel[256:512], mel[512:] = 3.0, 5.0
    pieces = [Piece("long", [], mel), Piece("short", [], mel[:300])]
    whole = score(level, pieces, tmp_path)[1]
    assert [point["clips"] for point in whole["drift"]["log_mel"]] == [2, 2, 1]
    assert [point["value"] for point in whole["drift"]["log_mel"]] == pytest.approx([DB, 2 * DB, 4 * DB])


def test_the_recording_is_compared_with_the_mel(tmp_path):
    audio = np.random.default_rng(0).uniform(-0.9, 0.9, 3210).astype(np.float32)
    mel = log_mel(audio, np)
    for frames in (None, 3):  # whole, and cut in the middle of a piece
        piece = Piece("a", [Note(60, 90, 0, 0.0, 1.0)], mel, audio)
        piece = piece if frames is None else chosen.cut(piece, frames)
        assert errors(score(Staircase(0.0), [piece], tmp_path))[3] < 1e-2  # a FLAC file has 16 bits
    wrong = Piece("a", [Note(60, 90, 0, 0.0, 1.0)], mel + 1, audio)
    assert errors(score(Staircase(0.0), [wrong], tmp_path))[3] == pytest.approx(DB, rel=1e-3)


def test_without_recordings_their_row_says_so(tmp_path):
    recording = score(Staircase(0.0), [staircase_piece("a", 10)], tmp_path)[3]
    assert "needs recordings" in recording["cells"]["log_mel"]["missing"] and len(recording["cells"]) == 1


def test_what_was_made_is_not_made_again(tmp_path):
    pieces = [staircase_piece(name, 10) for name in "abc"]
    first = score(Staircase(1.0), pieces, tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    lost = [path for path in made if path.parent.name == first[1]["folder"]][:1]
    for path in lost:
        path.unlink()
    again = score(Staircase(1.0), pieces, tmp_path)
    assert errors(again) == errors(first)
    assert {path for path in made if path.stat().st_mtime_ns != made[path]} == set(lost)
    # Another model, or another piece of that name, is never taken for one that was made.
    assert errors(score(Staircase(2.0), pieces, tmp_path))[1] > 0
    higher = [Piece("a", pieces[0].notes, pieces[0].mel + 1)]
    assert errors(score(Staircase(1.0), higher, tmp_path))[1] == pytest.approx(DB)


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", None])
def test_clips_that_are_cut_or_empty_are_made_anew(tmp_path, damage):
    """Of every kind of file in turn; None: cut in the middle."""
    pieces = [staircase_piece(name, 40) for name in "ab"]
    first = score(Staircase(2.0), pieces, tmp_path)
    files = sorted(path for path in tmp_path.rglob("*.*") if path.is_file())
    assert {"".join(path.suffixes) for path in files} == {".npz", ".flac", ".json", ".scores.json"}
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert errors(score(Staircase(2.0), pieces, tmp_path)) == errors(first)


def test_calibration_and_change_tell_a_generator_from_a_regression_and_from_noise(tmp_path):
    """Recordings of white noise around a level that the notes do not tell; models that know as much, or less."""
    rng = np.random.default_rng(0)
    pieces = [Piece(name, [], rng.normal(size=(200, 128)).astype(np.float32)) for name in "abc"]
    assert pieces[0].mel.min() > MIN_LOG_MEL  # nothing lies under the floor

    @dataclass(frozen=True)
    class Gaussian:
        spread: float
        network: NetworkConfig = NETWORK

        def sample(self, params, batch, rng):
            return self.spread * jax.vmap(lambda key: jax.random.normal(key, (4, 128)))(rng)

    for spread, calibration, change in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (3.0, 3 / 5**0.5, 3.0)):
        whole, single = score(Gaussian(spread), pieces, tmp_path / str(spread))[1:3]
        assert whole["cells"]["calibration"]["value"] == pytest.approx(calibration, abs=0.02)
        assert whole["cells"]["change"]["value"] == pytest.approx(change, abs=0.03)
        assert whole["cells"]["change"]["low"] <= whole["cells"]["change"]["value"] <= whole["cells"]["change"]["high"]
        assert "calibration" not in single["cells"] and single["cells"]["change"]["value"] == pytest.approx(
            change, abs=0.03
        )


def test_noise_laid_on_a_mean_has_the_covariance_of_its_error(tmp_path):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(128, 128)) / 40
    noise = rng.normal(size=(2, 3000, 128)) @ mix.T
    pieces = [Piece(str(k), [], noise[k].astype(np.float32)) for k in range(2)]
    tools, level = Tools(INVERTER), Level(NetworkConfig(target_frames=4, context_frames=0, max_tokens=64))
    targets = chosen.store_targets(pieces, tmp_path, tools, SUMS)
    mean = evaluator.model_rows(functools.partial(checkpoint, level), tmp_path, SUMS, 0, 8)[0]
    floor = evaluator.noisy_row(mean, targets, tmp_path, SUMS, 0)
    _, scored = evaluator.score([mean, floor], targets, lambda: tools)
    made = np.concatenate([floor.folder.read_sound(name).mel for name in targets.names]) - 1.0  # the level
    np.testing.assert_allclose(np.cov(made.T), mix @ mix.T, atol=0.12 * np.diag(mix @ mix.T).mean())
    assert scored["name"] == "it plus Gaussian noise" and scored["cells"]["change"]["value"] == pytest.approx(
        1, abs=0.02
    )
    again = evaluator.noisy_row(mean, targets, tmp_path, SUMS, 1)
    assert again.folder != floor.folder


def test_a_floor_of_a_model_that_failed_says_so(tmp_path):
    tools = Tools(INVERTER)
    targets = chosen.store_targets([staircase_piece("a", 12)], tmp_path, tools, SUMS)
    mean = evaluator.model_rows(functools.partial(checkpoint, Staircase(np.nan)), tmp_path, SUMS, 0, 8)[0]
    _, floor = evaluator.score([mean, evaluator.noisy_row(mean, targets, tmp_path, SUMS, 0)], targets, lambda: tools)
    assert "is gone or damaged" in floor["failed"]


def test_every_inverter_plays_the_truth_and_what_was_sampled_once(tmp_path):
    calls = []

    @dataclass(frozen=True)
    class Counted(Level):
        def sample(self, params, batch, rng):
            calls.append(len(rng))
            return super().sample(params, batch, rng)

    audio = np.random.default_rng(0).uniform(-0.9, 0.9, 3200).astype(np.float32)
    sums = {"first": "0", "second": "1"}
    tools = Tools({name: lambda mel, notes=None, k=k: silence(mel) + 0.1 * k for k, name in enumerate(sums)})
    piece = Piece("a", [Note(60, 90, 0, 0.0, 0.1)], log_mel(audio, np)[:10], audio)
    targets = chosen.store_targets([piece], tmp_path, tools, sums)
    model = Counted(NetworkConfig(target_frames=4, context_frames=0, max_tokens=64))
    models = evaluator.model_rows(functools.partial(checkpoint, model), tmp_path, sums, 0, 8)
    assert [row.name for row in models] == ["it", "it", "it, through second"]
    ceilings = evaluator.reference_rows(np.zeros(128, np.float32), tmp_path, sums)[3:]
    assert [row.name for row in ceilings] == ["ground truth through first", "ground truth through second"]
    rows = list(evaluator.score([*models, *ceilings], targets, lambda: tools))
    assert (
        rows[2]["against"] == rows[0]["folder"] and rows[4]["against"] == rows[3]["folder"] and not rows[1]["against"]
    )
    heard = [row.folder.read_sound(targets.names[0]).audio[0] for row in (*models, *ceilings)]
    assert heard == pytest.approx([0, 0, 0.1, 0, 0.1], abs=1e-4)
    assert rows[2]["cells"]["log_mel"]["value"] == rows[0]["cells"]["log_mel"]["value"]
    assert (
        rows[2]["cells"]["stft"]["value"] != rows[0]["cells"]["stft"]["value"] and rows[4]["cells"]["cost"]["value"] > 0
    )
    assert len(calls) <= 4  # traced for whole pieces and for single segments, and no more for the second inverter


def test_a_recording_takes_the_place_of_what_an_inverter_made(tmp_path):
    piece = staircase_piece("a", 10)
    recorded = Piece("a", piece.notes, piece.mel, np.full(3520, 0.5, np.float32))
    loud = Tools({"loud": lambda mel, notes=None: silence(mel) + 0.25})
    heard = []
    for one, tools, sums in (
        (piece, Tools(INVERTER), SUMS),
        (piece, loud, {"loud": "1"}),
        (recorded, loud, {"loud": "1"}),
    ):
        targets = chosen.store_targets([one], tmp_path, tools, sums)
        heard.append(targets.folder.read_target(*targets.names).audio[0])
    assert heard == [0, 0.25, 0.5]


def test_the_cost_is_of_rows_that_are_computed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(sources.time, "perf_counter", lambda: next(clock))
    segment, seconds = Segment(0, 0, np.zeros((50, 1))), []
    assert len(list(sources.timed([[segment] * 4, [segment]], seconds))) == 2
    assert seconds == [0.25, 1]  # a second of the clock each


def test_taking_a_part_of_a_split():
    notes = [Note(60, 90, 0, 0.0, 0.5), Note(61, 90, 0, 0.1, 0.15), Note(62, 90, 0, 0.3, 0.4)]
    mel = np.zeros((25, 128), np.float32)
    pieces = [Piece("a", notes, mel), Piece("b", notes, mel)]
    assert list(chosen.take(pieces)) == pieces
    first, second = chosen.take(iter(pieces), 0.7)  # 35 frames
    assert first is pieces[0]
    assert second.mel.shape == (10, 128)
    assert second.notes == [notes[0]._replace(offset=0.2), notes[1]]
    assert [len(piece.mel) for piece in chosen.take(pieces, 0.5)] == [25]
    assert [len(piece.mel) for piece in chosen.take(pieces, clip_seconds=0.3)] == [15, 15]
    assert [len(piece.mel) for piece in chosen.take(pieces, 0.4, 0.3)] == [15, 5]
    with pytest.raises(UserError, match="max_seconds = -1"):
        next(chosen.take(pieces, -1))


def test_mean_spectrum_is_the_mean_over_all_frames():
    pieces = [Piece("a", [], np.zeros((1, 128))), Piece("b", [], np.full((3, 128), 4.0))]
    np.testing.assert_allclose(chosen.mean_log_mel(pieces), np.full(128, 3.0))
    with pytest.raises(UserError, match="training split is empty"):
        chosen.mean_log_mel([])


def test_a_model_without_context_is_scored_too(tmp_path):
    model = Level(NetworkConfig(target_frames=4, context_frames=0, max_tokens=64))
    assert errors(score(model, [staircase_piece("a", 12)], tmp_path))[1:3] == pytest.approx([DB * 2 / 3] * 2)


def test_a_model_that_writes_no_numbers_fails_alone(tmp_path):
    mean, whole, single, *_ = score(Staircase(np.nan), [staircase_piece("a", 12)], tmp_path)
    assert "segment 1" in whole["failed"] and "not finite" in whole["failed"] and "not finite" in single["failed"]
    assert not whole["cells"] and mean["cells"]
    assert errors(score(Staircase(1.0), [staircase_piece("a", 12)], tmp_path))[1] == 0


LONG = NetworkConfig(target_frames=500, context_frames=500, max_tokens=64, num_mels=128)


def peak_of(num_clips, folder):
    """The most memory in kB that this process has had, after it scored clips of a minute (5 MB each) in fours."""
    rng = np.random.default_rng(0)
    pieces = (Piece(str(k), [], rng.normal(size=(3000, 128)).astype(np.float32)) for k in range(num_clips))
    noise = rng.normal(0, 0.1, 320).astype(np.float32)  # hardly any sound, as it is memory that is measured
    tools = Tools({"noise": lambda mel, notes=None: noise})
    targets = chosen.store_targets(pieces, folder, tools, {"noise": "0"})
    decoder = Decoder(Dice(LONG), {}, Tokenizer(segment_frames=500, max_tokens=64))
    rows = evaluator.model_rows(lambda: Checkpoint("it", decoder), folder, {"noise": "0"}, 0, 4)
    assert all(
        row["cells"]["log_mel"]["clips"] == num_clips for row in evaluator.score(rows, targets, lambda: tools, 4)
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow  # imports JAX once more, and scores 20 minutes: 10 s of a core
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path):
    """In a process of its own, whose peak is not that of other tests."""
    code = "import pathlib, sys; from tests.evaluation.test_evaluator import peak_of; "
    code += "print(*(peak_of(n, pathlib.Path(sys.argv[1]) / str(n)) for n in (4, 16)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 30 * 1024, (few, many)  # the 12 more clips are 64 MB
