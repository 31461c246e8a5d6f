"""The table of an evaluation, and its report as a page to be seen and heard."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np

from music_synth.audio.mel import FRAME_RATE, SAMPLE_RATE
from music_synth.errors import needing, telling
from music_synth.evaluation.clips import Folder
from music_synth.files import write_whole
from music_synth.pictures import data_uri, mel_webp, new_plot, piano_roll_svg, png
from music_synth.playing import piece_seed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_WORSE = "no worse than the reference"


# --- the table ---------------------------------------------------------------------------------------------------


def to_markdown(scores: dict[str, Any]) -> str:
    """Makes the essential columns of scores.json, which `scoring.evaluate` writes; the best of each mode in bold."""
    columns = [column for column in scores["columns"] if column["essential"] and has_numbers(scores, column)]
    titles, rows = table(scores, columns)
    lines = [f"{heading(scores)} The best model of a mode is bold.", "", "| | " + " | ".join(titles) + " |"]
    lines.append("|---|" + "---:|" * len(titles))
    for row in rows:
        cells = [f"**{cell['text']}**" if cell["best"] else cell["text"] for cell in row["cells"]]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines += ["", not_taken(scores)] if not_taken(scores) else []
    return "\n".join(lines) + "\n"


def table(scores: dict[str, Any], columns: Sequence[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """Makes titles and rows of a table; at its end, where rows are held against another, whether they are no worse."""
    best, judged = best_cells(scores["rows"], columns), any("no_worse" in row for row in scores["rows"])
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
        cells += [{"text": verdict(row, scores["rows"]), "interval": "", "best": False, "number": True}] * judged
        rows.append({"name": row_name(row), "kind": row["kind"], "cells": cells})
    return [*map(column_title, columns), *[NO_WORSE] * judged], rows


def heading(scores: dict[str, Any]) -> str:
    clips = scores["num_clips"]
    return (
        f"`{scores['task']}`, split {scores['split']}: {clips} clip{'s' * (clips != 1)}, {scores['seconds']:.0f} s, "
        f"against {scores['reference']}. {scores['note']}"
    )


def column_title(column: dict[str, Any]) -> str:
    return f"{column['title']} {'→ 1' if column['higher_is_better'] is None else '↓↑'[column['higher_is_better']]}"


def verdict(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Says whether a row is no worse than the one that it is held against; of that one: that it is the reference."""
    if "no_worse" in row:
        return "yes" if row["no_worse"] else "no"
    return "reference" if row["folder"] in [other.get("against") for other in rows] else ""


def row_name(row: dict[str, Any]) -> str:
    return f"{row['name']}, {row['mode']}" if row["mode"] else row["name"]


def cell_text(row: dict[str, Any], column: dict[str, Any], first: bool) -> str:
    """Says a number, or why there is none, which a row that failed does in its first cell; and clips left out."""
    if row["failed"]:
        return f"failed: {row['failed']}" if first else "failed"
    cell = row["cells"].get(column["key"], {})
    if "value" not in cell:
        return cell.get("missing", "")
    left_out = sum(cell.get("left_out", {}).values())
    spread = f" ± {cell['spread']:.{column['digits']}f}" if "spread" in cell else ""
    return f"{cell['value']:.{column['digits']}f}{spread}" + f" ({left_out} left out)" * bool(left_out)


def best_cells(rows: Sequence[dict[str, Any]], columns: Sequence[dict[str, Any]]) -> set[tuple[int, str]]:
    """Finds (row, column key) of what is best among the models of a mode, where they differ."""
    best = set()
    for column in columns:
        key = column["key"]
        for mode in {row["mode"] for row in rows if row["kind"] == "model"}:
            values = {
                number: goodness(row["cells"][key]["value"], column)
                for number, row in enumerate(rows)
                if row["kind"] == "model" and row["mode"] == mode and "value" in row["cells"].get(key, {})
            }
            if len(set(values.values())) > 1:
                best |= {(number, key) for number, value in values.items() if value == max(values.values())}
    return best


def goodness(value: float, column: dict[str, Any]) -> float:
    """Turns a number so that more is better."""
    return -abs(value - 1) if column["higher_is_better"] is None else value if column["higher_is_better"] else -value


def has_numbers(scores: dict[str, Any], column: dict[str, Any]) -> bool:
    return any("value" in row["cells"].get(column["key"], {}) for row in scores["rows"])


def not_taken(scores: dict[str, Any]) -> str:
    """Says in a sentence which columns have no number, and why."""
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


def write_html(path: Path, scores: dict[str, Any], examples: Sequence[dict], title: str = "Evaluation") -> None:
    """One file with everything in it: the table with intervals, plots, and examples, as of `make_examples`.

    UserError if jinja2 is not installed or the file cannot be written.
    """
    with needing("the report needs jinja2", "eval"):
        import jinja2
    columns = [column for column in scores["columns"] if column["essential"] or has_numbers(scores, column)]
    titles, rows = table(scores, columns)
    undefined = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=undefined)
    template = Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title,
        heading=heading(scores).replace("`", ""),
        not_taken=not_taken(scores),
        titles=titles,
        rows=rows,
        plots=[(name, data_uri(png(figure), "image/png")) for name, figure in plots(scores)],
        studio=studio_command(scores),
        examples=examples,
    )
    with telling(f"cannot write {path}"):
        write_whole(path, page)


def interval_text(cell: dict[str, Any], digits: int) -> str:
    if "low" in cell:
        return f"{cell['low']:.{digits}f} to {cell['high']:.{digits}f}"
    return f"R² {cell['r_squared']:.2f}" if "r_squared" in cell else ""


def make_examples(clips: Path, scores: dict[str, Any], num_examples: int) -> list[dict[str, Any]]:
    """Excerpts of the clips in turn, from their beginnings first, as the target and the first few models play them.

    Each is {title, link to the same moment in the studio, roll of its notes, sounds: of `excerpt`, the target first}.
    """
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
        if target.audio is None:
            continue
        first = max(0, len(target.mel) - EXCERPT_FRAMES) * turn // rounds
        if turn and first < EXCERPT_FRAMES:
            continue  # a short clip was heard before
        frames, samples = (
            slice(first * step, (first + EXCERPT_FRAMES) * step) for step in (1, SAMPLE_RATE // FRAME_RATE)
        )
        sounds = [excerpt("target", target.mel[frames], target.audio[samples])]
        for system, folder in systems:
            sound = folder.find_sound(name)
            if sound is not None and sound.audio is not None:
                sounds.append(excerpt(system, sound.mel[frames], sound.audio[samples]))
        seconds, start = len(target.mel[frames]) / FRAME_RATE, first / FRAME_RATE
        notes = [
            note._replace(onset=max(note.onset - start, 0.0), offset=min(note.offset - start, seconds))
            for note in target.notes
            if note.offset > start and note.onset < start + seconds
        ]
        said = {"title": f"{target.id}, from {start:.0f} s", "link": studio_link(scores, target.id, start)}
        made.append({**said, "roll": piano_roll_svg(notes, seconds), "sounds": sounds})
    return made


def excerpt(name: str, mel: np.ndarray, audio: np.ndarray) -> dict[str, str]:
    """Makes {name, image, audio}, to be seen and heard, of log-mel [T, M] and audio [S]."""
    return {"name": name, "image": data_uri(mel_webp(mel), "image/webp"), "audio": data_uri(flac(audio), "audio/flac")}


# --- the same in the studio ----------------------------------------------------------------------------------------

STUDIO = "http://127.0.0.1:8765/"
STUDIO_VOICES = 3  # that a link names beside the recording
STUDIO_SETTINGS = {"temperature": "temperature", "num_steps": "steps"}  # by which the studio can sample, and its names


def scored_runs(scores: dict[str, Any]) -> list[str]:
    """Lists the runs that are scored, in the order of the table."""
    about = [row.get("about", {}) for row in scores["rows"] if row["kind"] == "model"]
    return list(dict.fromkeys(one["model_dir"] for one in about if "model_dir" in one))


def studio_command(scores: dict[str, Any]) -> str:
    """Says the command that opens the scored pieces and runs in the studio; nothing where there are none."""
    checkpoints = [word for path in scored_runs(scores) for word in ("--checkpoint", path)]
    words = ["music_synth", "studio", "--task", scores["task"], "--split", scores["split"], *checkpoints]
    return shlex.join(words) if checkpoints else ""


def studio_link(scores: dict[str, Any], piece: str, seconds: float) -> str:
    """Makes the address of a moment of a piece in the studio, with the first rows of the table as its voices."""
    folders, voices = scored_runs(scores), []
    for row in scores["rows"]:
        about = row.get("about", {})
        if (
            row["kind"] != "model"
            or about.get("model_dir") not in folders
            or about.get("given", {}).keys() - STUDIO_SETTINGS
        ):
            continue
        settings = [f"{STUDIO_SETTINGS[name]}={value}" for name, value in about.get("given", {}).items()]
        seed = f"seed={piece_seed(piece, scores['seed'])}"
        voices.append(",".join([f"decoder:{folders.index(about['model_dir'])}", seed, *settings]))
    chosen = [*dict.fromkeys(voices)][:STUDIO_VOICES]
    if not chosen:
        return ""
    query = [("piece", piece), ("t", f"{seconds:.2f}"), *(("voice", voice) for voice in [*chosen, "recording"])]
    return f"{STUDIO}?{urlencode(query)}"


# --- plots -------------------------------------------------------------------------------------------------------


def plots(scores: dict[str, Any]) -> list[tuple[str, Figure]]:
    """Plots (caption, figure) quality against sampling cost and training time, and drift, as far as they are known."""
    from matplotlib.ticker import MaxNLocator

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
            figure, axes = new_plot(columns["cost"]["title"], columns[key]["title"])
            for row in points:
                cell, color = row["cells"][key], colors[row["name"]]
                axes.plot(row["cells"]["cost"]["value"], cell["value"], "o", color=color, label=row["name"])
                if "low" in cell:
                    axes.plot([row["cells"]["cost"]["value"]] * 2, [cell["low"], cell["high"]], color=color)
            costs = [row["cells"]["cost"]["value"] for row in points]
            if max(costs) > 10 * min(costs):
                axes.set_xscale("log")
            made.append(("Quality against sampling cost, whole pieces", figure))
    figure, axes = new_plot("minutes of training", "log-mel error, dB")
    drawn = []  # rows that differ in the sampler alone learned together
    for row in whole:
        points = [point for point in row["about"].get("training", ()) if "eval/sample_error_db" in point]
        if points and points not in drawn:
            drawn.append(points)
            minutes, errors = zip(*((point["minutes"], point["eval/sample_error_db"]) for point in points), strict=True)
            axes.plot(minutes, errors, "o-", color=colors[row["name"]], label=row["name"])
    if axes.lines:
        made.append(("Quality against training time, segments of the validation split", figure))
    for key, title in (("log_mel", "log-mel error, dB"), ("stft", "STFT log-magnitude error")):
        figure, axes = new_plot("k-th 5.12 s of a piece", title)
        for row in models:
            values = [point["value"] for point in row["drift"].get(key, ())]
            style = {"marker": "o", "label": row["name"]} if row in whole else {"linestyle": ":"}
            axes.plot(range(1, len(values) + 1), values, color=colors.get(row["name"], "gray"), markersize=3, **style)
        if whole and any(len(np.asarray(line.get_xdata())) > 1 for line in axes.lines):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            made.append(("Drift over whole pieces; dotted: single segments with true context", figure))
    return made


# --- sounds in the page -------------------------------------------------------------------------------------------


def flac(audio: np.ndarray) -> bytes:
    """Encodes audio [S] at 16 kHz without loss, 16 bits."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1, 1), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
