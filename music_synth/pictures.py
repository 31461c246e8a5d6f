"""Draws mels, notes, audio and curves: every picture of the project, with one color map for mels.

No pyplot: a bare Figure keeps no global state and needs no display. Matplotlib is imported where it is first needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from music_synth.audio.mel import FRAME_RATE, MAX_LOG_MEL, MIN_LOG_MEL, SAMPLE_RATE, mel_bin
from music_synth.errors import UserError, telling
from music_synth.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from music_synth.midi.notes import Note

PICTURE_SUFFIXES = (".png", ".pdf", ".svg")
MAX_LEGEND_ROWS = 10
FREQUENCY_TICKS = (100, 250, 500, 1000, 2000, 4000, 8000)  # Hz
# Colors of a mel from its floor to the loudest: black, purple, red, orange, pale yellow.
MEL_COLORS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float64)


# --- mels as images ----------------------------------------------------------------------------------------------


def mel_image(mel: np.ndarray) -> np.ndarray:
    """Colors a log-mel [T, M]: uint8 [M, T, 3], a pixel a bin, low notes at the bottom."""
    level = np.clip((np.asarray(mel, np.float64).T[::-1] - MIN_LOG_MEL) / (MAX_LOG_MEL - MIN_LOG_MEL), 0.0, 1.0)
    grid = np.linspace(0.0, 1.0, len(MEL_COLORS))
    return np.stack([np.interp(level, grid, channel) for channel in MEL_COLORS.T], axis=-1).round().astype(np.uint8)


def mel_webp(mel: np.ndarray) -> bytes:
    """Encodes `mel_image` of a log-mel [T, M] as WebP."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mel_image(mel)).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Makes an address that holds its content, for a page that is one file; `kind` is the MIME type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --- a piece -----------------------------------------------------------------------------------------------------


def plot_piece(
    path: str | Path,
    mels: Mapping[str, np.ndarray],
    notes: Sequence[Note] = (),
    audio: np.ndarray | None = None,
    title: str = "",
) -> None:
    """Writes a picture of a piece over one time axis: its notes, log-mels under their names, the audio.

    Args:
      path: `.png`, `.pdf` or `.svg`.
      mels: log-mel [T, M] each, on one color scale: what was sampled, or a recording beside its samples.
      notes: may reach past the mels; what lies outside is not drawn. (): no piano roll.
      audio: [S] at 16 kHz, in [-1, 1]; None: no waveform.

    Raises:
      UserError: the suffix is no picture format or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"{path}: pictures are written as {', '.join(PICTURE_SUFFIXES)}, not {path.suffix!r}")
    seconds = max(1 / FRAME_RATE, *(len(mel) / FRAME_RATE for mel in mels.values()))
    heights = [*[3.0] * bool(notes), *[2.6] * len(mels), *[1.4] * (audio is not None)]  # inches
    figure = new_figure(float(np.clip(4 + 0.6 * seconds, 10, 40)), sum(heights) + 0.8)
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    if notes:
        draw_piano_roll(rows[0], notes, seconds)
    for axes, (name, mel) in zip(rows[bool(notes) :], mels.items(), strict=False):
        image = draw_mel(axes, mel, name)
        # Beside the axes, not cut from them: the time axes of all rows stay aligned.
        bar = figure.colorbar(image, cax=axes.inset_axes((1.005, 0.0, 0.01, 1.0)))
        bar.set_label("ln magnitude", fontsize=8)
    if audio is not None:
        draw_waveform(rows[-1], audio)
    rows[-1].set(xlim=(0, seconds), xlabel="time (s)")
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)  # names of files may hold dollar signs
    with telling(f"{path}: the picture cannot be written"), replacing(path) as part:
        figure.savefig(part, dpi=110)


def draw_piano_roll(axes: Axes, notes: Sequence[Note], seconds: float) -> None:
    """Draws notes as bars over MIDI pitch, a color a program; drum hits as black crosses at their drum pitch."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    shown = [note for note in notes if note.onset < seconds]
    pitched = [note for note in shown if not note.is_drum]
    drums = [note for note in shown if note.is_drum]
    tab20 = colormaps["tab20"]
    palette = [tab20(place) for place in (*range(0, 20, 2), *range(1, 20, 2))]  # strong colors first
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


def draw_mel(axes: Axes, mel: np.ndarray, title: str = "log-mel"):
    """Draws a log-mel [T, M] over seconds and frequency; returns the image, for a color bar."""
    from matplotlib.colors import LinearSegmentedColormap

    num_frames, num_mels = mel.shape
    image = axes.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, max(num_frames, 1) / FRAME_RATE, -0.5, num_mels - 0.5),
        vmin=MIN_LOG_MEL,
        vmax=MAX_LOG_MEL,
        cmap=LinearSegmentedColormap.from_list("mel", MEL_COLORS / 255),
    )
    axes.set_yticks([mel_bin(hertz) for hertz in FREQUENCY_TICKS], [f"{hertz}" for hertz in FREQUENCY_TICKS])
    axes.set_ylim(-0.5, num_mels - 0.5)
    axes.set_ylabel("frequency (Hz)")
    axes.set_title(title, loc="left", fontsize=9, parse_math=False)
    return image


def draw_waveform(axes: Axes, audio: np.ndarray) -> None:
    """Draws audio [S] as its envelope, minimum to maximum of every frame."""
    hop = SAMPLE_RATE // FRAME_RATE
    frames = np.pad(audio, (0, -len(audio) % hop)).reshape(-1, hop)  # [T, hop]
    times = np.arange(len(frames)) / FRAME_RATE
    axes.fill_between(times, frames.min(axis=1, initial=0), frames.max(axis=1, initial=0), linewidth=0.4)
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("amplitude")
    axes.set_title("audio", loc="left", fontsize=9)
    axes.grid(axis="x", alpha=0.3)


def program_name(program: int) -> str:
    """Names a program: `33 Electric Bass (finger)`, General MIDI's name beside the zero-based number."""
    from pretty_midi import program_to_instrument_name

    return f"{program} {program_to_instrument_name(program)}"


def piano_roll_svg(notes: Sequence[Note], seconds: float) -> str:
    """Draws notes as bars over time and pitch, a color a program, drum hits as ticks: an SVG that stretches."""
    pitches = [note.pitch for note in notes] or [60]
    low, high = min(pitches) - 2, max(pitches) + 2
    programs = sorted({note.program for note in notes if not note.is_drum})
    bars = []
    for note in notes:
        hue = 137 * programs.index(note.program) % 360 if not note.is_drum else 0
        color = "currentColor" if note.is_drum else f"hsl({hue} 65% 50%)"
        length = max(0.03, 0.03 if note.is_drum else note.offset - note.onset)
        bars.append(
            f'<rect x="{note.onset:.3f}" y="{high - note.pitch}" width="{length:.3f}" height="0.9" fill="{color}"/>'
        )
    return (
        f'<svg viewBox="0 0 {seconds:.3f} {high - low + 1}" preserveAspectRatio="none" role="img"'
        f' aria-label="piano roll">{"".join(bars)}</svg>'
    )


# --- curves ------------------------------------------------------------------------------------------------------


def new_figure(width: float = 5.4, height: float = 4.6) -> Figure:
    """Makes an empty figure, in inches, that can be saved as it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_plot(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Makes a figure with one pair of axes and a grid."""
    figure = new_figure()
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def png(figure: Figure) -> bytes:
    """Encodes a figure, the names of its lines under the axes."""
    figure.legend(loc="outside lower center", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
