"""The log-mel error on cases whose answers are known, and that batching and order do not change it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.audio.mel import MIN_LOG_MEL, log_mel
from music_synth.errors import UserError
from music_synth.evaluation import evaluator
from music_synth.evaluation.evaluator import Checkpoint, LogMelError
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig

DB = 20 / np.log(10)  # a log-mel difference of 1
NETWORK = NetworkConfig(target_frames=4, context_frames=4, max_tokens=64, num_mels=128)
TOKENIZER = Tokenizer(segment_frames=4, max_tokens=64)


@dataclass(frozen=True)
class Piece:
    id: str
    notes: list[Note]
    mel: np.ndarray
    audio: np.ndarray | None = None


@dataclass(frozen=True)
class Staircase:
    """Writes its context, `step` higher; 0 where there is no context."""

    step: float
    network: NetworkConfig = NETWORK

    def sample(self, params, batch, rng):
        return jnp.where(batch["context_mask"].all(), batch["context_mel"] + self.step, 0.0)


@dataclass(frozen=True)
class Dice:
    """Writes random numbers, moved by the context's mean and the number of tokens."""

    network: NetworkConfig = NETWORK

    def sample(self, params, batch, rng):
        level = 0.1 * batch["context_mel"].mean() + (batch["note_tokens"] > 0).sum().astype(jnp.float32)
        return level + jax.random.normal(rng, (1, self.network.target_frames, self.network.num_mels))


def staircase_piece(name, num_frames):
    """Frame t is at level t // 4: each segment one above the one before."""
    mel = np.broadcast_to((np.arange(num_frames) // 4)[:, None], (num_frames, 128)).astype(np.float32)
    return Piece(name, [Note(60, 90, 0, 0.0, 0.05)], mel)


def checkpoint(model):
    return Checkpoint("it", model, TOKENIZER, {})


def score(model, pieces, **settings):
    spectrum = np.zeros(128, np.float32)
    silence = lambda mel: np.zeros(320 * len(mel), np.float32)
    return evaluator.score(pieces, spectrum, [checkpoint(model)], silence, "silence", **settings)


def test_error_is_in_decibels():
    error = LogMelError()
    target = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    error.add(target + 1, target)
    assert error.result() == pytest.approx(DB, rel=1e-6)
    error.add(target, target)
    assert error.result() == pytest.approx(DB / 2, rel=1e-6)
    error = LogMelError()
    error.add(np.full((1, 128), -50.0), np.full((1, 128), MIN_LOG_MEL))  # below the floor is the floor
    assert error.result() == 0


def test_a_perfect_model_scores_zero_and_the_mean_spectrum_does_not():
    pieces = [staircase_piece("a", 10), staircase_piece("b", 16)]
    mean, model, through, itself = score(Staircase(1.0), pieces)
    assert (model.whole_pieces, model.single_segments) == (0, 0)
    levels = np.concatenate([np.arange(10) // 4, np.arange(16) // 4])
    assert mean.whole_pieces == mean.single_segments == pytest.approx(DB * levels.mean())
    assert through.whole_pieces == pytest.approx(DB * (levels - MIN_LOG_MEL).mean(), rel=1e-6)
    assert itself.whole_pieces == 0
    assert through.single_segments is itself.single_segments is None


def test_errors_add_up_over_whole_pieces_but_not_over_single_segments():
    _, model, _, _ = score(Staircase(2.0), [staircase_piece("a", 14)])  # 4 segments, the last of 2 frames
    # Chained, segment j is j too high; with its true context every one but the first is 1 too high.
    assert model.whole_pieces == pytest.approx(DB * (0 * 4 + 1 * 4 + 2 * 4 + 3 * 2) / 14)
    assert model.single_segments == pytest.approx(DB * 10 / 14)


def test_scores_depend_on_neither_batch_size_nor_order():
    rng = np.random.default_rng(3)
    pieces = [
        Piece(f"p{n}", [Note(60 + n, 80, n, 0.0, 0.02 * n)], rng.normal(size=(n, 128)).astype(np.float32))
        for n in (3, 9, 4, 17, 12)
    ]
    reference = score(Dice(), pieces, batch_size=5)[1]
    for batch_size, order in ((1, 1), (2, -1), (8, 1), (3, -1)):
        row = score(Dice(), pieces[::order], batch_size=batch_size)[1]
        assert row.whole_pieces == pytest.approx(reference.whole_pieces, rel=1e-5)
        assert row.single_segments == pytest.approx(reference.single_segments, rel=1e-5)
    other = score(Dice(), pieces, seed=1)[1]
    assert other.whole_pieces != pytest.approx(reference.whole_pieces, rel=1e-5)


def test_every_whole_piece_is_handed_out_once():
    pieces = [staircase_piece(str(n), n) for n in (3, 9, 4, 17, 12)]
    seen = []
    note = lambda name, piece, mel: seen.append((piece.id, len(mel)))
    score(Staircase(1.0), pieces, batch_size=2, on_piece=note)
    assert sorted(seen) == sorted((piece.id, len(piece.mel)) for piece in pieces)


def test_target_itself_compares_the_audio_with_the_mel():
    audio = np.random.default_rng(0).uniform(-1, 1, 3210).astype(np.float32)
    mel = log_mel(audio, np)
    for frames in (None, 3):  # whole, and cut in the middle of a piece
        piece = Piece("a", [Note(60, 90, 0, 0.0, 1.0)], mel, audio)
        piece = piece if frames is None else evaluator.cut(piece, frames)
        assert score(Staircase(0.0), [piece])[-1].whole_pieces < 1e-4
    wrong = Piece("a", [Note(60, 90, 0, 0.0, 1.0)], mel + 1, audio)
    assert score(Staircase(0.0), [wrong])[-1].whole_pieces == pytest.approx(DB, rel=1e-3)


def test_taking_a_part_of_a_split():
    notes = [Note(60, 90, 0, 0.0, 0.5), Note(61, 90, 0, 0.1, 0.15), Note(62, 90, 0, 0.3, 0.4)]
    mel = np.zeros((25, 128), np.float32)
    pieces = [Piece("a", notes, mel), Piece("b", notes, mel)]
    assert evaluator.take(pieces) == pieces
    first, second = evaluator.take(iter(pieces), 0.7)  # 35 frames
    assert first is pieces[0]
    assert second.mel.shape == (10, 128)
    assert second.notes == [notes[0]._replace(offset=0.2), notes[1]]
    assert [len(piece.mel) for piece in evaluator.take(pieces, 0.5)] == [25]
    with pytest.raises(UserError, match="max_seconds = -1"):
        evaluator.take(pieces, -1)


def test_mean_spectrum_is_the_mean_over_all_frames():
    pieces = [Piece("a", [], np.zeros((1, 128))), Piece("b", [], np.full((3, 128), 4.0))]
    np.testing.assert_allclose(evaluator.mean_log_mel(pieces), np.full(128, 3.0))
    with pytest.raises(UserError, match="training split is empty"):
        evaluator.mean_log_mel([])


def test_a_model_without_context_is_scored_too():
    @dataclass(frozen=True)
    class Level:
        network: NetworkConfig

        def sample(self, params, batch, rng):
            assert batch["context_mel"].shape == (1, 0, 128)
            return jnp.full((1, 4, 128), 1.0)

    model = Level(NetworkConfig(target_frames=4, context_frames=0, max_tokens=64))
    row = score(model, [staircase_piece("a", 12)])[1]
    assert row.whole_pieces == row.single_segments == pytest.approx(DB * 2 / 3)


def test_a_model_that_writes_no_numbers_is_named():
    with pytest.raises(UserError, match=r"it: segment 1: .*not finite"):
        score(Staircase(np.nan), [staircase_piece("a", 12)])


def test_table():
    rows = score(Staircase(2.0), [staircase_piece("a", 14)])
    table = evaluator.to_markdown(rows, "Heading.").splitlines()
    assert table[0] == "Heading."
    assert len(table) == 4 + len(rows)
    assert {line.count("|") for line in table[2:]} == {5}
    mean, model = rows[0].whole_pieces, rows[1].whole_pieces
    assert f"| {model:.2f} | {100 * (model / mean - 1):+.0f} % |" in table[5]
