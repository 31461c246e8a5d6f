"""Pictures of a piece: piano roll, log-mel spectrograms and waveform over one time axis in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from music_synth.audio.mel import FRAME_RATE, MAX_LOG_MEL, MIN_LOG_MEL, NUM_MELS, SAMPLE_RATE
from music_synth.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from music_synth.midi.notes import Note

PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
MAX_LEGEND_ROWS = 10
FREQUENCY_TICKS = (100, 250, 500, 1000, 2000, 4000, 8000)  # Hz


def plot_piece(
    path: str | Path,
    notes: Sequence[Note],
    sampled_mel: np.ndarray,
    audio: np.ndarray,
    target_mel: np.ndarray | None = None,
    title: str = "",
) -> None:
    """Writes a picture of a piece: its notes, the target mel if there is one, the sampled mel and the audio.

    Args:
      path: `.png`, `.pdf` or `.svg`.
      notes: may reach past the audio; what lies outside is not drawn.
      sampled_mel: log-mel [T, M].
      audio: [S] at 16 kHz, in [-1, 1].
      target_mel: log-mel [T', M] of the recording, drawn above the sampled one on the same color scale.

    Raises:
      UserError: the suffix is no picture format or the file cannot be written.
    """
    # No pyplot: a bare Figure keeps no global state and needs no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: pictures are written as {', '.join(PICTURE_SUFFIXES)}, not {path.suffix!r}")
    mels = {"sampled log-mel": sampled_mel}
    if target_mel is not None:
        mels = {"target log-mel": target_mel, **mels}
    seconds = max(len(audio) / SAMPLE_RATE, *(len(mel) / FRAME_RATE for mel in mels.values()), 1 / FRAME_RATE)

    heights = [3.0, *[2.6] * len(mels), 1.4]
    width = float(np.clip(4 + 0.6 * seconds, 10, 40))  # inches
    figure = Figure(figsize=(width, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    draw_piano_roll(grid[0], notes, seconds)
    for axes, (name, mel) in zip(grid[1:], mels.items(), strict=False):
        image = draw_mel(axes, mel)
        axes.set_title(name, loc="left", fontsize=9)
        # Beside the axes, not cut from them: the time axes of all rows stay aligned.
        bar = figure.colorbar(image, cax=axes.inset_axes((1.005, 0.0, 0.01, 1.0)))
        bar.set_label("ln magnitude", fontsize=8)
    draw_waveform(grid[-1], audio)
    grid[-1].set_xlim(0, seconds)
    grid[-1].set_xlabel("time (s)")
    if title:
        figure.suptitle(title, fontsize=11)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written ({error.strerror or error})") from error


def draw_piano_roll(axes: Axes, notes: Sequence[Note], seconds: float) -> None:
    """Notes as bars over MIDI pitch, a color a program; drum hits as black crosses at their drum pitch."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    shown = [note for note in notes if note.onset < seconds]
    pitched = [note for note in shown if not note.is_drum]
    drums = [note for note in shown if note.is_drum]
    palette = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]]  # strong colors first
    programs = sorted({note.program for note in pitched})
    for row, program in enumerate(programs):
        own = [note for note in pitched if note.program == program]
        bars = [[(note.onset, note.pitch), (min(note.offset, seconds), note.pitch)] for note in own]
        label = program_name(program) if row < MAX_LEGEND_ROWS else None
        color = palette[row % len(palette)]
        axes.add_collection(LineCollection(bars, colors=[color], linewidths=2.5, label=label))
        onsets, pitches = [note.onset for note in own], [note.pitch for note in own]
        axes.plot(onsets, pitches, "|", color="black", markersize=4)  # keeps repeated notes apart
    if len(programs) > MAX_LEGEND_ROWS:
        axes.plot([], [], " ", label=f"and {len(programs) - MAX_LEGEND_ROWS} more programs")
    if drums:
        onsets, pitches = [note.onset for note in drums], [note.pitch for note in drums]
        axes.plot(onsets, pitches, "x", color="black", markersize=4, markeredgewidth=0.8, label="drums")
    if shown:
        pitches = [note.pitch for note in shown]
        axes.set_ylim(min(pitches) - 3, max(pitches) + 3)
        axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), fontsize=7, frameon=False)
    axes.set_ylabel("MIDI pitch")
    axes.set_title("piano roll", loc="left", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def draw_mel(axes: Axes, mel: np.ndarray):
    """A log-mel [T, M] over seconds and frequency; returns the image for a color bar."""
    num_frames, num_mels = mel.shape
    image = axes.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, max(num_frames, 1) / FRAME_RATE, -0.5, num_mels - 0.5),
        vmin=MIN_LOG_MEL,
        vmax=MAX_LOG_MEL,
        cmap="magma",
    )
    axes.set_yticks([mel_bin(hertz) for hertz in FREQUENCY_TICKS], [f"{hertz}" for hertz in FREQUENCY_TICKS])
    axes.set_ylim(-0.5, num_mels - 0.5)
    axes.set_ylabel("frequency (Hz)")
    return image


def draw_waveform(axes: Axes, audio: np.ndarray) -> None:
    """Audio [S] as its envelope, minimum to maximum of every frame."""
    hop = SAMPLE_RATE // FRAME_RATE
    frames = np.pad(audio, (0, -len(audio) % hop)).reshape(-1, hop)  # [T, hop]
    times = np.arange(len(frames)) / FRAME_RATE
    axes.fill_between(times, frames.min(axis=1, initial=0), frames.max(axis=1, initial=0), linewidth=0.4)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("amplitude")
    axes.set_title("audio", loc="left", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def mel_bin(hertz: float) -> float:
    """Where a frequency lies among the mel bins: bin k peaks at the f for which mel_bin(f) = k."""

    def mel(frequency: float) -> float:
        return 1127 * float(np.log1p(frequency / 700))

    return mel(hertz) / mel(SAMPLE_RATE / 2) * (NUM_MELS + 1) - 1


def program_name(program: int) -> str:
    """`33 Electric Bass (finger)`: General MIDI's name beside the zero-based number."""
    from pretty_midi import program_to_instrument_name

    return f"{program} {program_to_instrument_name(program)}"
