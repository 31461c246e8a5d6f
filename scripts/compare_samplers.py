"""Scores samplers of a diffusion decoder against its DDPM of many steps, and names the cheapest that is no worse.

    python scripts/compare_samplers.py runs/diffusion --task runs/prepared
    python scripts/compare_samplers.py runs/diffusion runs/distilled --task runs/prepared --out runs/samplers.json

Scored are the beginnings of the test pieces, each sampled as a whole: log-mel error, Fréchet distance between
log-mel statistics, and F1 of the note onsets that basic-pitch hears. Beside them stands the network's work, as rows
of 5.12 s that it computes for 5.12 s of music (guidance takes two a call, Heun two calls a step). No worse means
inside the reference's 95 % interval (bootstrap over pieces), or better, in all three. Further runs, such as distilled
ones, are scored as they were trained. What is in --out is not sampled again, and stands in the table too: the grid
may be asked for in parts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from music_synth import errors
from music_synth.audio.mel import FRAME_RATE
from music_synth.compilation import keep_compiled
from music_synth.data.feed import Piece, open_feed
from music_synth.diffusion.objective import Diffusion
from music_synth.errors import UserError
from music_synth.evaluation.embeddings import log_mel_statistics
from music_synth.evaluation.evaluator import cut
from music_synth.evaluation.measures import log_mel_error
from music_synth.evaluation.statistics import Gaussian, bootstrap_interval, frechet_distance
from music_synth.evaluation.transcription import BasicPitch, note_scores
from music_synth.files import write_whole
from music_synth.playing import Decoder, piece_seed, whole_mels
from music_synth.runs import load, load_inverter

METRICS = {  # title, and whether higher is better
    "log_mel": ("log-mel error, dB", False),
    "frechet": ("Fréchet distance", False),
    "onset_f1": ("onset F1", True),
}


def score(run: tuple, settings: dict[str, Any], pieces: Sequence[Piece], seed: int, vocode, transcribe) -> dict:
    """One row: {name, work, and of each metric [value, low, high]}; `run` is what `runs.load` gives."""
    model, tokenizer, params, _ = run
    model = model.with_sampling(**settings)
    tokens = [tokenizer.encode(piece.notes, len(piece.mel)) for piece in pieces]
    seeds = [piece_seed(piece.id, seed) for piece in pieces]
    batches = Decoder(model, params, tokenizer).sample_pieces(tokens, seeds, len(pieces))
    sampled = dict(whole_mels(batches, [len(piece.mel) for piece in pieces]))
    mels = [sampled[number] for number in range(len(pieces))]
    about = {"name": "distilled, " * model.distilled + name_of(model.sampler), "work": work(model.sampler)}
    return about | measure(mels, pieces, seed, vocode, transcribe)


def measure(mels: Sequence[np.ndarray], pieces: Sequence[Piece], seed: int, vocode, transcribe) -> dict[str, list]:
    """Of each metric [value, low, high] for log-mels [T, M] of the pieces."""
    errors_db, gaussians, f1 = [], [], []
    for mel, piece in zip(mels, pieces, strict=True):
        errors_db.append(log_mel_error(mel, piece.mel)["value"])
        gaussians.append(tuple(Gaussian.of(log_mel_statistics(one)) for one in (piece.mel, mel)))
        f1.append(note_scores(piece.notes, transcribe(vocode(mel)))["onset_f1"])
    of_all = lambda pairs: frechet_distance(*(Gaussian.merged(side) for side in zip(*pairs, strict=True)))
    rng = np.random.default_rng(seed)
    return {
        "log_mel": [float(np.mean(errors_db)), *bootstrap_interval(errors_db, rng)],
        "frechet": [of_all(gaussians), *bootstrap_interval(gaussians, rng, of_all, num_resamples=100)],
        "onset_f1": [float(np.mean(f1)), *bootstrap_interval(f1, rng)],
    }


def name_of(sampler) -> str:
    """A row's name in the table."""
    guidance = f", guidance {sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    grid = f", {sampler.grid}" if sampler.grid != "t" else ""
    return f"{sampler.name}, {sampler.num_steps} step{'s' * (sampler.num_steps > 1)}{guidance}{grid}"


def work(sampler) -> int:
    """Rows of the network for one segment."""
    calls = 2 * sampler.num_steps - 1 if sampler.name == "heun" else sampler.num_steps
    return calls * (1 if sampler.guidance_scale == 1 else 2)


def is_no_worse(row: dict[str, Any], reference: dict[str, Any]) -> bool:
    better_or_inside = lambda value, low, high, higher: value >= low if higher else value <= high
    return all(better_or_inside(row[key][0], *reference[key][1:], higher) for key, (_, higher) in METRICS.items())


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The reference is the first row; an interval stands only there."""
    lines = ["| sampler | network rows | " + " | ".join(title for title, _ in METRICS.values()) + " | no worse |"]
    lines.append("|---|---:|" + "---:|" * len(METRICS) + ":---:|")
    for number, row in enumerate(rows):
        cells = []
        for key in METRICS:
            value, low, high = (f"{x:.2f}" if key != "onset_f1" else f"{x:.3f}" for x in row[key])
            cells.append(value if number else f"{value} ({low} to {high})")
        mark = "yes" if is_no_worse(row, rows[0]) else "no"
        lines.append(f"| {row['name']} | {row['work']:,} | {' | '.join(cells)} | {mark if number else ''} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    keep_compiled()
    flags = parse_flags(argv)
    done = read(flags.out)
    grid = itertools.product(flags.samplers.split(","), flags.steps, flags.guidance, flags.grids.split(","))
    plain = [dict(zip(("name", "num_steps", "guidance_scale", "grid"), row, strict=True)) for row in grid]
    first = flags.runs[0]
    asked = [(first, {"name": "ddpm", "num_steps": flags.reference, "guidance_scale": 1.0})]
    asked += [(first, settings) for settings in plain] + [(run, {}) for run in flags.runs[1:]]
    runs = {run: load(run) for run in flags.runs}
    for name, run in runs.items():
        if not isinstance(run[0], Diffusion):
            raise UserError(f"{name} is a run of {type(run[0]).__name__}, which has no sampler to compare")
    for run, settings in asked:  # what cannot be sampled is refused before anything is
        runs[run][0].with_sampling(**settings)
    frames = round(flags.seconds * FRAME_RATE)
    feed = open_feed(flags.task, runs[first][1], batch_size=1)
    pieces = [cut(piece, min(frames, len(piece.mel))) for piece in feed.pieces("test")]
    # What must be equal for rows to stand in one table.
    table = f"step {runs[first][3]} of {first}, {flags.task}, {flags.seconds} s, seed {flags.seed}"
    rows = done.setdefault(table, {})
    tools = load_inverter(None), BasicPitch()
    for run, settings in tqdm(asked, unit="row"):
        key = f"{json.dumps(settings)}" if settings else f"step {runs[run][3]} of {run}"
        if key not in rows:
            rows[key] = score(runs[run], settings, pieces, flags.seed, *tools)
            write(flags.out, done)
    reference = rows[json.dumps(asked[0][1])]
    others = sorted((row for row in rows.values() if row != reference), key=lambda row: row["work"])
    seconds = sum(len(piece.mel) for piece in pieces) / FRAME_RATE
    print(f"{len(pieces)} test pieces of {flags.task}, {seconds:.0f} s; {time.strftime('%Y-%m-%d')}, {os.cpu_count()}")
    print(f"cores, {platform.machine()}, {jax.default_backend()}\n\n{to_markdown([reference, *others])}\n")
    fit = [row for row in others if is_no_worse(row, reference)]
    cheapest = min(fit, key=lambda row: (row["work"], row["log_mel"][0]), default={"name": "none"})
    print(f"cheapest that is no worse than {reference['name']}: {cheapest['name']}")


def read(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The rows that were made before, by table and settings."""
    try:
        done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        for rows in done.values():
            to_markdown(list(rows.values()))  # reads all that is read of a row
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"--out {out} cannot be read as scores ({error}): move it away, or name another") from error
    return done


def write(out: Path, done: dict[str, dict[str, dict[str, Any]]]) -> None:
    try:
        write_whole(out, json.dumps(done, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error})") from error


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse_flags(argv: list[str]):
    parser = errors.ArgumentParser("python scripts/compare_samplers.py", __doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="MODEL_DIR", help="a diffusion decoder; more: as they were trained")
    parser.add_argument("--task", default="synthetic", help="a task, or a prepared folder (default: synthetic)")
    parser.add_argument("--samplers", default="ddim,dpmpp_2m,dpmpp_2m_sde,heun,ddpm", help="by commas")
    parser.add_argument("--steps", type=whole_numbers, default="4,8,16,100", help="by commas")
    parser.add_argument("--guidance", type=numbers, default="1", help="scales, by commas; 1: none")
    parser.add_argument("--grids", default="t", help="t, log_snr, karras, by commas")
    parser.add_argument("--reference", type=int, default=1000, metavar="N", help="steps of the DDPM (default: 1000)")
    parser.add_argument("--seconds", type=float, default=15.36, help="of each piece (default: 15.36, three segments)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--out", type=Path, default=Path("samplers.json"), help="all numbers (default: samplers.json)")
    flags = parser.parse_args(argv)
    if not 1 / FRAME_RATE <= flags.seconds < math.inf:
        raise UserError(f"--seconds {flags.seconds}: must be a frame ({1 / FRAME_RATE} s) or more, and finite")
    if not flags.out.parent.is_dir():
        raise UserError(f"{flags.out}: there is no folder {flags.out.parent} to write it into")
    return flags


if __name__ == "__main__":
    errors.run(main)
