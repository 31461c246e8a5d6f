"""Scores inverters on recorded audio: audio -> mel -> inverter -> audio again.

    python scripts/score_inverters.py                               # shipped against Griffin-Lim, test split
    python scripts/score_inverters.py --soundfont FluidR3_GM.sf2    # the same pieces from another SoundFont

Prints a table: log-mel error and multi-resolution STFT distance (lower is better), speed as multiples of real time, by
the clock and by the time that cores spent, which other work on the machine changes less.
Inverters are named as for --inverter of synthesize; "shipped" is the one in the package. With --plot, a picture of each
piece: spectrograms of target and inverters, and the sharpest attack from near.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from music_synth import errors
from music_synth.audio.io import audio_from_int16
from music_synth.audio.mel import DB_PER_NEPER, FRAME_RATE, HOP_LENGTH, SAMPLE_RATE, log_mel
from music_synth.compilation import keep_compiled
from music_synth.data import synthetic
from music_synth.data.audio_feed import Source
from music_synth.runs import load_inverter
from music_synth.vocoder.objective import RESOLUTIONS, stft_parts


def excerpts(task: str, data_dir: str | None, soundfont: Path | None, seconds: float) -> list[np.ndarray]:
    """The beginning of each test piece, float32 [S], S a multiple of the hop; or the embedded set's, rendered anew."""
    if soundfont is None:
        pieces = (audio_from_int16(piece.audio) for piece in Source(task, data_dir).load("test"))
    else:
        specs = synthetic.plan_split("test", 40)
        pieces = (synthetic.render(synthetic.compose(spec), soundfont=soundfont) for spec in specs)
    length = round(seconds * SAMPLE_RATE) // HOP_LENGTH * HOP_LENGTH
    return [piece[: min(length, len(piece) // HOP_LENGTH * HOP_LENGTH)] for piece in pieces]


@jax.jit
def distances(made: jax.Array, audio: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    """Both parts of the multi-resolution STFT distance, [B] each, for each resolution."""
    return [stft_parts(made, audio, *resolution) for resolution in RESOLUTIONS]


def score(inverter, pieces: list[np.ndarray]) -> dict[str, float]:
    """Means over pieces; seconds of audio made in a second, and in a second of one core (compiled before)."""
    mels = [log_mel(piece, np) for piece in pieces]
    inverter(mels[0])  # compiles
    rows, spent = [], np.zeros(2)
    clocks = lambda: np.array([time.perf_counter(), time.process_time()])
    for piece, mel in zip(pieces, mels, strict=True):
        start = clocks()
        made = inverter(mel)
        spent += clocks() - start
        convergence, log_error = np.mean(distances(made[None], piece[None]), axis=(0, 2))
        error = DB_PER_NEPER * np.abs(log_mel(made, np) - mel)[:-1].mean()
        rows.append((error, convergence + log_error, convergence, log_error))
    error, total, convergence, log_error = np.mean(rows, axis=0)
    speed, per_core = sum(map(len, pieces)) / SAMPLE_RATE / spent
    return {
        "log-mel error, dB": error,
        "STFT distance": total,
        "convergence": convergence,
        "log magnitude": log_error,
        "times real time": speed,
        "in a core's time": per_core,
    }


def plot(path: Path, piece: np.ndarray, made: dict[str, np.ndarray]) -> None:
    """Four seconds with the piece's sharpest attack among them, and a quarter of a second around it; target first.

    Left: windows of 64 ms, in which partials, wrong pitches and stripes across them (combing) would show. Right:
    windows of 4 ms, and the waveform over them, in which smeared attacks would.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rise = np.diff(np.exp(log_mel(piece, np)).sum(axis=1))  # [T-1]
    rise[: FRAME_RATE // 2] = 0.0  # the piece's own beginning is no attack out of music
    attack = float(rise.argmax() + 1) / FRAME_RATE
    views = [(max(0.0, attack - 2.0), 4.0, 1024, 128), (max(0.0, attack - 0.1), 0.25, 64, 8)]  # seconds; samples
    shown = {"target": piece, **made}
    shape = {"figsize": (16, 3 * len(shown)), "width_ratios": (3, 2), "squeeze": False, "sharex": "col"}
    figure, axes = plt.subplots(len(shown), 2, **shape)
    for row, (name, audio) in zip(axes, shown.items(), strict=True):
        for axis, (start, seconds, window, hop) in zip(row, views, strict=True):
            begin = round(start * SAMPLE_RATE)
            part = audio[begin : begin + round(seconds * SAMPLE_RATE)] + 1e-9  # digital silence has no logarithm
            scale = {"vmin": -140, "vmax": -30, "xextent": (start, start + len(part) / SAMPLE_RATE)}
            axis.specgram(part, NFFT=window, Fs=SAMPLE_RATE, noverlap=window - hop, **scale)
            axis.set(title=name, ylabel="Hz")
        seconds = start + np.arange(len(part)) / SAMPLE_RATE
        wave = row[1].twinx()
        wave.plot(seconds, part, "w", linewidth=0.6)
        wave.set(ylim=(-1.2, 1.2), yticks=[])
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str]) -> None:
    keep_compiled()
    parser = errors.ArgumentParser("scripts/score_inverters.py", __doc__.splitlines()[0])
    parser.add_argument("--inverters", default="shipped,griffin_lim", help="by commas")
    parser.add_argument("--task", default="synthetic", help="a data set, or a folder prepared with --audio")
    parser.add_argument("--data_dir", help="where data sets live")
    parser.add_argument("--soundfont", type=Path, help="render the embedded test pieces with this .sf2 instead")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each piece (default: 30)")
    parser.add_argument("--plot", type=Path, help="folder for spectrograms of each piece")
    flags = parser.parse_args(argv)
    pieces = excerpts(flags.task, flags.data_dir, flags.soundfont, flags.seconds)
    inverters = {name: load_inverter(None if name == "shipped" else name) for name in flags.inverters.split(",")}
    where = flags.soundfont.name if flags.soundfont else flags.task
    print(f"{len(pieces)} pieces, {sum(map(len, pieces)) / SAMPLE_RATE:.0f} s, {where}; {time.strftime('%Y-%m-%d')},")
    print(f"{os.cpu_count()} cores, {platform.machine()}, {jax.default_backend()}\n")
    for number, (name, inverter) in enumerate(inverters.items()):
        scores = score(inverter, pieces)
        if number == 0:
            print("| inverter | " + " | ".join(scores) + " |\n|---|" + "---:|" * len(scores))
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in scores.values()) + " |", flush=True)
    if flags.plot:
        flags.plot.mkdir(parents=True, exist_ok=True)
        for number, piece in enumerate(pieces):
            made = {name: inverter(log_mel(piece, np)) for name, inverter in inverters.items()}
            plot(flags.plot / f"{number}.png", piece, made)


if __name__ == "__main__":
    errors.run(main)
