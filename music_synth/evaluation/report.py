"""What people see and hear: pictures of a piece, the table of an evaluation, and its report as a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from music_synth.audio.mel import FRAME_RATE, MAX_LOG_MEL, MIN_LOG_MEL, NUM_MELS, SAMPLE_RATE
from music_synth.errors import UserError
from music_synth.evaluation.clips import Folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


# --- the table ---------------------------------------------------------------------------------------------------


def to_markdown(scores: dict[str, Any]) -> str:
    """The essential columns of scores.json, which `evaluate.evaluate` writes; the best model of each mode in bold."""
    columns = [column for column in scores["columns"] if column["essential"]]
    best = best_cells(scores["rows"], columns)
    lines = [
        f"{heading(scores)} The best model of a mode is bold.",
        "",
        "| | " + " | ".join(map(column_title, columns)) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for number, row in enumerate(scores["rows"]):
        cells = []
        for column in columns:
            text = cell_text(row, column, first=column is columns[0])
            cells.append(f"**{text}**" if (number, column["key"]) in best else text)
        lines.append(f"| {row_name(row)} | " + " | ".join(cells) + " |")
    lines += ["", not_taken(scores)] if not_taken(scores) else []
    return "\n".join(lines) + "\n"


def heading(scores: dict[str, Any]) -> str:
    clips = scores["num_clips"]
    return (
        f"`{scores['task']}`, split {scores['split']}: {clips} clip{'s' * (clips != 1)}, {scores['seconds']:.0f} s, "
        f"against {scores['reference']}. {scores['note']}"
    )


def column_title(column: dict[str, Any]) -> str:
    return f"{column['title']} {'↑' if column['higher_is_better'] else '↓'}"


def row_name(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['mode']}" if row["mode"] else row["name"]


def cell_text(row: dict[str, Any], column: dict[str, Any], first: bool) -> str:
    """The number, or why there is none, which a row that failed says in its first cell; the clips that are left out."""
    if row["failed"]:
        return f"failed: {row['failed']}" if first else "failed"
    cell = row["cells"].get(column["key"], {})
    if "value" not in cell:
        return cell.get("missing", "")
    left_out = sum(cell.get("left_out", {}).values())
    spread = f" ± {cell['spread']:.{column['digits']}f}" if "spread" in cell else ""
    return f"{cell['value']:.{column['digits']}f}{spread}" + f" ({left_out} left out)" * bool(left_out)


def best_cells(rows: Sequence[dict[str, Any]], columns: Sequence[dict[str, Any]]) -> set[tuple[int, str]]:
    """(row, column key) of what is best among the models of a mode, where they differ."""
    best = set()
    for column in columns:
        key, sign = column["key"], 1 if column["higher_is_better"] else -1
        for mode in {row["mode"] for row in rows if row["kind"] == "model"}:
            values = {
                number: sign * row["cells"][key]["value"]
                for number, row in enumerate(rows)
                if row["kind"] == "model" and row["mode"] == mode and "value" in row["cells"].get(key, {})
            }
            if len(set(values.values())) > 1:
                best |= {(number, key) for number, value in values.items() if value == max(values.values())}
    return best


def has_numbers(scores: dict[str, Any], column: dict[str, Any]) -> bool:
    return any("value" in row["cells"].get(column["key"], {}) for row in scores["rows"])


def not_taken(scores: dict[str, Any]) -> str:
    """A sentence on the columns without any number, and why."""
    reasons: dict[str, list[str]] = {}
    for column in scores["columns"]:
        missing = [row["cells"].get(column["key"], {}).get("missing", "") for row in scores["rows"]]
        if not has_numbers(scores, column) and any(missing):
            reasons.setdefault(next(filter(None, missing)), []).append(column["title"])
    return (
        "Not taken: " + "; ".join(f"{', '.join(titles)} ({why})" for why, titles in reasons.items()) + "."
        if reasons
        else ""
    )


# --- the page ----------------------------------------------------------------------------------------------------

EXCERPT_FRAMES = 10 * FRAME_RATE  # of an example
MAX_MODELS = 6  # that an example shows beside the target


@dataclass(frozen=True)
class Excerpt:
    """A part of a clip as one system makes it."""

    name: str
    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray  # [S]


@dataclass(frozen=True)
class Example:
    """An excerpt of a piece: what was to sound, and what each system made of it, the target first."""

    title: str
    notes: list[Note]  # times from the excerpt's beginning
    seconds: float
    sounds: list[Excerpt]


def write_html(path: Path, scores: dict[str, Any], examples: Sequence[Example], title: str = "Evaluation") -> None:
    """One file with everything in it: the table with intervals, plots, and examples to be seen and heard.

    UserError if jinja2 is not installed or the file cannot be written.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f"the report needs jinja2 ({error}): pip install 'music_synth[eval]'") from error
    columns = [column for column in scores["columns"] if column["essential"] or has_numbers(scores, column)]
    best = best_cells(scores["rows"], columns)
    settings = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    rows = []
    for number, row in enumerate(scores["rows"]):
        cells = [
            {
                "text": cell_text(row, column, first=column is columns[0]),
                "interval": interval_text(row["cells"].get(column["key"], {}), column["digits"]),
                "best": (number, column["key"]) in best,
                "number": "value" in row["cells"].get(column["key"], {}),
            }
            for column in columns
        ]
        rows.append({"name": row_name(row), "kind": row["kind"], "cells": cells})
    page = (
        jinja2.Environment(**settings)
        .from_string(template)
        .render(
            title=title,
            heading=heading(scores).replace("`", ""),
            not_taken=not_taken(scores),
            titles=[column_title(column) for column in columns],
            rows=rows,
            plots=[(name, data_uri(png(figure), "image/png")) for name, figure in plots(scores)],
            examples=[
                {
                    "title": example.title,
                    "roll": piano_roll_svg(example.notes, example.seconds),
                    "sounds": [
                        {
                            "name": sound.name,
                            "image": data_uri(mel_webp(sound.mel), "image/webp"),
                            "audio": data_uri(flac(sound.audio), "audio/flac"),
                        }
                        for sound in example.sounds
                    ],
                }
                for example in examples
            ],
        )
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error})") from error


def interval_text(cell: dict[str, Any], digits: int) -> str:
    if "low" in cell:
        return f"{cell['low']:.{digits}f} to {cell['high']:.{digits}f}"
    return f"R² {cell['r_squared']:.2f}" if "r_squared" in cell else ""


def make_examples(clips: Path, scores: dict[str, Any], num_examples: int) -> list[Example]:
    """Excerpts of the clips in turn, from their beginnings first, as the target and the first few models play them."""
    whole = [row for row in scores["rows"] if row["kind"] == "model"]
    whole = [row for row in whole if row["mode"] == whole[0]["mode"]][:MAX_MODELS]
    shown = [*whole, *(row for row in scores["rows"][-1:] if row["kind"] == "ceiling")]  # the ground truth, inverted
    systems = [(row["name"], Folder(clips / row["folder"])) for row in shown]
    names, targets = scores["clips"], Folder(clips / "target")
    made = []
    rounds = -(-num_examples // max(1, len(names)))
    for number in range(num_examples if names else 0):
        name, turn = names[number % len(names)], number // len(names)
        target = targets.read_target(name)
        first = max(0, len(target.mel) - EXCERPT_FRAMES) * turn // rounds
        if turn and first < EXCERPT_FRAMES:
            continue  # a short clip was heard before
        frames, samples = (
            slice(first * step, (first + EXCERPT_FRAMES) * step) for step in (1, SAMPLE_RATE // FRAME_RATE)
        )
        sounds = [Excerpt("target", target.mel[frames], target.audio[samples])]
        for system, folder in systems:
            if folder.has_sound(name):
                sound = folder.read_sound(name)
                sounds.append(Excerpt(system, sound.mel[frames], sound.audio[samples]))
        seconds, start = len(sounds[0].mel) / FRAME_RATE, first / FRAME_RATE
        notes = [
            note._replace(onset=max(note.onset - start, 0.0), offset=min(note.offset - start, seconds))
            for note in target.notes
            if note.offset > start and note.onset < start + seconds
        ]
        made.append(Example(f"{target.id}, from {start:.0f} s", notes, seconds, sounds))
    return made


# --- plots -------------------------------------------------------------------------------------------------------


def plots(scores: dict[str, Any]) -> list[tuple[str, Figure]]:
    """(caption, figure) of what there is to plot: quality against sampling cost and training time, and drift."""
    columns = {column["key"]: column for column in scores["columns"]}
    models = [row for row in scores["rows"] if row["kind"] == "model"]
    first = models[0]["mode"] if models else ""  # whole pieces
    models = [row for row in models if not row["failed"]]
    whole = [row for row in models if row["mode"] == first]
    colors = {row["name"]: f"C{number % 10}" for number, row in enumerate(whole)}
    made = []
    for key in ("log_mel", "onset_f1"):
        points = [row for row in whole if all("value" in row["cells"].get(of, {}) for of in (key, "cost"))]
        if points:
            figure, axes = new_figure(columns["cost"]["title"] + " of mel", columns[key]["title"])
            for row in points:
                cell, color = row["cells"][key], colors[row["name"]]
                axes.plot(row["cells"]["cost"]["value"], cell["value"], "o", color=color, label=row["name"])
                if "low" in cell:
                    axes.plot([row["cells"]["cost"]["value"]] * 2, [cell["low"], cell["high"]], color=color)
            costs = [row["cells"]["cost"]["value"] for row in points]
            if max(costs) > 10 * min(costs):
                axes.set_xscale("log")
            made.append(("Quality against sampling cost, whole pieces", legend(figure)))
    figure, axes = new_figure("minutes of training", "log-mel error, dB")
    drawn = []  # rows that differ in the sampler alone learned together
    for row in whole:
        points = [point for point in row["about"].get("training", ()) if "eval/sample_error_db" in point]
        if points and points not in drawn:
            drawn.append(points)
            minutes, errors = zip(*((point["minutes"], point["eval/sample_error_db"]) for point in points), strict=True)
            axes.plot(minutes, errors, "o-", color=colors[row["name"]], label=row["name"])
    if axes.lines:
        made.append(("Quality against training time, segments of the validation split", legend(figure)))
    for key, title in (("log_mel", "log-mel error, dB"), ("stft", "STFT log-magnitude error")):
        figure, axes = new_figure("k-th 5.12 s of a piece", title)
        for row in models:
            values = [point["value"] for point in row["drift"].get(key, ())]
            style = {"marker": "o", "label": row["name"]} if row in whole else {"linestyle": ":"}
            axes.plot(range(1, len(values) + 1), values, color=colors.get(row["name"], "gray"), markersize=3, **style)
        if whole and any(len(line.get_xdata()) > 1 for line in axes.lines):
            axes.xaxis.get_major_locator().set_params(integer=True)
            made.append(("Drift over whole pieces; dotted: single segments with true context", legend(figure)))
    return made


def new_figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def legend(figure: Figure) -> Figure:
    """Names the lines under the axes."""
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


# --- pictures and sounds in the page -------------------------------------------------------------------------------


def data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def mel_webp(mel: np.ndarray) -> bytes:
    """A log-mel [T, M] as a picture of T by M pixels, low notes at the bottom, on the color scale of `draw_mel`."""
    from matplotlib import colormaps
    from PIL import Image

    level = np.clip((mel.T[::-1] - MIN_LOG_MEL) / (MAX_LOG_MEL - MIN_LOG_MEL), 0, 1)  # [M, T]
    buffer = io.BytesIO()
    Image.fromarray(colormaps["magma"](level, bytes=True)[..., :3]).save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def flac(audio: np.ndarray) -> bytes:
    """Audio [S] at 16 kHz, 16 bits, without loss."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def piano_roll_svg(notes: Sequence[Note], seconds: float) -> str:
    """Notes as bars over time and pitch, a color a program, drum hits as ticks; stretches to any size."""
    pitches = [note.pitch for note in notes] or [60]
    low, high = min(pitches) - 2, max(pitches) + 2
    height = high - low + 1
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
        f'<svg viewBox="0 0 {seconds:.3f} {height}" preserveAspectRatio="none" role="img" aria-label="piano roll">'
        + "".join(bars)
        + "</svg>"
    )
