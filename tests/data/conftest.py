"""A small data set of our own: pieces of sines with known notes, as records of the form that every builder stores.

It is made without FluidSynth and takes a second, so that these tests say something about the pipeline alone.
"""

import numpy as np
import pytest

from music_synth.audio.mel import SAMPLE_RATE, log_mel
from music_synth.data import synthetic
from music_synth.data.examples import Piece
from music_synth.midi.notes import Note

FLOAT16 = 0.004  # rounding of a log-mel between -11.6 and 6
SECONDS = {"train": (50.0, 12.34, 95.0, 6.0, 31.7), "validation": (11.0, 7.03), "test": (5.0,)}


def make_notes(seconds: float, rng: np.random.Generator) -> list[Note]:
    """Chords and drums, some notes across segment borders, one note on a border."""
    onsets = np.sort(rng.uniform(0, seconds - 0.5, int(seconds * 6)))
    notes = [
        Note(
            pitch=int(rng.integers(40, 80)),
            velocity=int(rng.integers(30, 127)),
            program=int(rng.choice([0, 33, 48])),
            onset=float(onset),
            offset=float(min(seconds, onset + rng.uniform(0.1, 3.0))),
            is_drum=bool(rng.random() < 0.1),
        )
        for onset in onsets
    ]
    if seconds > 6:
        notes.append(Note(60, 90, 0, 5.12, 5.9))
    return notes


def make_audio(notes: list[Note], seconds: float) -> np.ndarray:
    """A decaying sine a note, int16 at 16 kHz."""
    audio = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    for note in notes:
        first, last = int(note.onset * SAMPLE_RATE), int(note.offset * SAMPLE_RATE)
        t = np.arange(last - first, dtype=np.float32) / SAMPLE_RATE
        frequency = 440.0 * 2.0 ** ((note.pitch - 69) / 12)
        audio[first:last] += note.velocity / 127 * np.exp(-3 * t) * np.sin(2 * np.pi * frequency * t)
    return (audio * (20000 / np.abs(audio).max())).astype(np.int16)


@pytest.fixture(scope="module")
def short_pieces():
    """Lets the composer write pieces of five to seven seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "PIECE_SECONDS", (5, 7))
        yield


@pytest.fixture(scope="session")
def made() -> dict[str, list[Piece]]:
    """The pieces of each split, straight from notes and audio."""
    splits = {}
    for split, lengths in SECONDS.items():
        splits[split] = []
        for index, seconds in enumerate(lengths):
            rng = np.random.default_rng([len(split), index])
            notes = make_notes(seconds, rng)
            audio = make_audio(notes, seconds).astype(np.float32) / 32768
            splits[split].append(Piece(f"{split}-{index}", notes, log_mel(audio, xp=np), audio))
    return splits


@pytest.fixture(scope="session")
def made_data_dir(made, tmp_path_factory):
    """The same pieces as a tfds data set "made", built in the folder that is returned."""
    from music_synth.data.note_sequences import write_note_sequence
    from music_synth.data.quiet_tensorflow import tfds

    class Made(tfds.core.GeneratorBasedBuilder):
        """Pieces of sines."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding=tfds.features.Encoding.BYTES),
                    "sequence": tfds.features.Tensor(shape=(), dtype=np.bytes_),
                }
            )
            # In order, as the embedded data set is; tfds would rather have it shuffled.
            return tfds.core.DatasetInfo(builder=self, features=features, description="sines", disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in made}

        def _generate_examples(self, split):
            for index, piece in enumerate(made[split]):
                audio = (piece.audio * 32768).astype(np.int16)
                yield index, {"id": piece.id, "audio": audio, "sequence": write_note_sequence(piece.id, piece.notes)}

    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    Made(data_dir=data_dir).download_and_prepare()
    return data_dir


@pytest.fixture
def made_tasks(made_data_dir, monkeypatch):
    """The data set "made" takes the place of those of the package."""
    from music_synth.data import tasks
    from music_synth.data.quiet_tensorflow import tfds

    def build(config, data_dir):
        return tfds.builder("made:1.0.0", data_dir=str(data_dir))

    monkeypatch.setattr(tasks, "SHUFFLE_WINDOWS", 24)  # filling the buffer is what takes time
    monkeypatch.setattr(tasks, "DATA_SETS", {"made": tasks.DataSet("1.0.0", build)})
    return tasks


@pytest.fixture(scope="session")
def find_window():
    return window_in


def window_in(mel: np.ndarray, pieces: list[np.ndarray]) -> tuple[int, int]:
    """(piece, start) at which a window [T, M] of one of the pieces [.., M] begins."""
    distances = [np.abs(piece - mel[0]).max(axis=1) for piece in pieces]
    candidates = []
    for index, piece in enumerate(pieces):
        for start in np.flatnonzero(distances[index] <= FLOAT16):
            part = piece[start : start + len(mel)]
            candidates.append((float(np.abs(part - mel[: len(part)]).max()), -len(part), index, int(start)))
    error, _, index, start = min(candidates)
    assert error <= FLOAT16
    return index, start
