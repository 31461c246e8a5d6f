"""Makes docs/sounds: the first seconds of pieces of data/ as a recording and by each decoder that ships, as FLAC.

python scripts/sounds.py --soundfont /usr/share/sounds/sf2/FluidR3_GM.sf2
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from music_synth import errors, runs
from music_synth.audio.io import audio_writer, resample
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.audio.soundfont import RENDER_RATE, render_midi
from music_synth.compilation import keep_compiled
from music_synth.data.datasets.rendered import GAIN
from music_synth.midi.notes import read_midi
from music_synth.synthesize import synthesize

ROOT = Path(__file__).parents[1]
PIECES = {
    "piano": "piano_with_pedal",
    "strings": "string_quartet",
    "band": "band_with_drums",
    "orchestra": "mixed_orchestra",
}
FADE_SECONDS = 0.5


def player(name: str, seconds: float) -> Callable[[Path], np.ndarray]:
    """Makes a function that plays the notes of a MIDI file that begin in its first seconds."""
    model, tokenizer, params, _ = runs.load(name)
    inverter = runs.load_inverter()

    def play(path: Path) -> np.ndarray:
        notes = [note for note in read_midi(path) if note.onset < seconds]
        return synthesize(notes, model, params, tokenizer, inverter)[0]

    return play


def main(argv: list[str]) -> None:
    parser = errors.ArgumentParser("python scripts/sounds.py", __doc__)
    parser.add_argument("--soundfont", required=True, help="SF2 or SF3 file that plays the recordings")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each piece (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "sounds", help="folder (default: docs/sounds)")
    flags = parser.parse_args(argv)
    keep_compiled()

    def record(path: Path) -> np.ndarray:
        return resample(render_midi(path, flags.soundfont, gain=GAIN), RENDER_RATE, SAMPLE_RATE)

    flags.out.mkdir(parents=True, exist_ok=True)
    players = {"recording": record} | {folder: player(name, flags.seconds) for name, folder in runs.DECODERS.items()}
    length, fade = round(flags.seconds * SAMPLE_RATE), round(FADE_SECONDS * SAMPLE_RATE)
    for piece, stem in PIECES.items():
        for name, play in players.items():
            audio = play(ROOT / "data" / f"{stem}.mid")[:length]
            audio[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
            path = flags.out / f"{piece}-{name}.flac"
            with audio_writer(path) as write:
                write(audio)
            print(f"{path}: {len(audio) / SAMPLE_RATE:.1f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    errors.run(main)
