"""Makes an instrument of your own recordings, audio files each with the MIDI file of what is played:

    music_synth adopt FOLDER --out runs/mine

Looks which pairs belong together (OUT/check), prepares them (OUT/data), tunes a decoder to them (OUT/run, at its best
OUT/run/best), sets the temperature at which it plays, scores it on held-out pieces beside what it was before, with a
report to be heard (OUT/evaluation), and exports it (OUT/instrument). What is there is kept: the same command goes on
where it stopped, and a step whose folder is removed is done again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from music_synth import config, convert, errors, evaluate, prepare_data, recordings, runs, train
from music_synth.data.datasets.reading import write_arrays
from music_synth.data.feed import open_feed
from music_synth.data.prepared import MANIFEST
from music_synth.errors import UserError
from music_synth.evaluation.pieces import take
from music_synth.evaluation.sources import WHOLE
from music_synth.evaluation.transcription import BasicPitch, note_scores
from music_synth.files import write_whole
from music_synth.gin_files import CONFIG_FILE
from music_synth.interop.model_card import WEIGHTS
from music_synth.playing import Decoder
from music_synth.training.best import BEST

RECIPE = "finetune.gin"
SCORED = ("log_mel", "stft", "onset_f1")  # columns that are told at the end
TEMPERATURES = (0.5, 0.3, 0.1)  # tried, from the highest on, where fewer notes are heard at the recipe's own
TOLERANCE = 0.01  # of onset F1: a few pieces tell no more


def main(argv: list[str]) -> None:
    """Flags -> the steps, in order, each only if it is not done yet."""
    files, overrides, rest = config.split_flags(argv)
    flags = parse_flags(rest)
    if files:
        raise UserError(f"--gin_file: adopt follows {RECIPE} on the recipe of --checkpoint; give --gin.NAME=VALUE")
    out, start = flags.out, runs.find(flags.checkpoint)
    recipe = start / CONFIG_FILE
    if not recipe.is_file():
        raise UserError(f"{start} has no {CONFIG_FILE} to go on from: make a run of it by music_synth convert")
    prepare_data.check_folder(out)
    data, run, scores, instrument = (out / name for name in ("data", "run", "evaluation", "instrument"))
    if (data / MANIFEST).exists():
        print(f"{data} was prepared before: {flags.folder} is not read; remove it to do so")
    else:
        prepare(flags, out, data)
    step("tuning", run)
    knobs = {"TASK": str(data), "MODEL_DIR": str(run), "INITIAL_CHECKPOINT": flags.checkpoint}
    settings = [f"{name}={value!r}" for name, value in (knobs | {"train.max_minutes": flags.minutes}).items()]
    gin = [f"--gin.{setting}" for setting in (*settings, *overrides)]
    train.main([f"--gin_file={recipe.resolve()}", f"--gin_file={RECIPE}", *gin])
    can_hear = all(map(importlib.util.find_spec, ("basic_pitch", "onnxruntime", "mir_eval")))
    if can_hear and not (instrument / WEIGHTS).exists():
        step("settling", run / BEST)
        settle(start, run / BEST, data, flags.test_seconds)
    step("scoring", scores)
    evaluate.main(
        [
            f"--checkpoints={flags.checkpoint},{run / BEST}",
            f"--transcriber={'basic_pitch' if can_hear else 'none'}",
            f"--gin.TASK={str(data)!r}",
            f"--gin.OUTPUT_DIR={str(scores)!r}",
            f"--gin.MAX_SECONDS={flags.test_seconds}",
        ]
    )
    if not (instrument / WEIGHTS).exists():
        step("exporting", instrument)
        license = [f"--license={flags.license}"] if flags.license else []
        convert.main([str(run / BEST), str(instrument), f"--scores={scores}", *license])
    print(told(json.loads((scores / "scores.json").read_text(encoding="utf-8"))))
    print(f"to be heard before and after: {scores / 'report.html'}")
    print(f"play: music_synth play FILE.mid --checkpoint {shlex.quote(str(instrument))} --out OUT.wav")


def step(what: str, folder: Path) -> None:
    print(f"--- {what}: {folder}", flush=True)


def prepare(flags: argparse.Namespace, out: Path, data: Path) -> None:
    """Looks through the folder and prepares what belongs together. UserError: some is bad, or too little is left."""
    step("looking", out / "check")
    flags.pictures = flags.pictures or out / "check"
    found, table = recordings.find(flags.folder, flags)
    print(table)
    (out / "check").mkdir(parents=True, exist_ok=True)
    write_whole(out / "check" / "table.txt", table + "\n")
    step("preparing", data)
    write_arrays("pairs", found, data, flags.skip_bad, flags.workers or os.cpu_count() or 1)


def settle(start: Path, best: Path, data: Path, seconds: float) -> None:
    """Lowers the temperature of the decoder in `best` until as many notes are heard in it as in `start`.

    Onset F1 of basic-pitch on the validation pieces, `seconds` of them at most, is held against that of `start` at its
    own temperature, within `TOLERANCE`. Where no temperature reaches it, the one that comes nearest is set.
    """
    trained = runs.load(best)
    if not trained.model.can_sample(temperature=0):
        return
    pieces = list(take(open_feed(str(data), trained.tokenizer, batch_size=1).pieces("validation"), seconds))
    inverter = runs.load_inverter()

    def heard(decoder: Decoder) -> float:
        parts = ([part.audio for part in decoder.play([piece.notes], inverter)] for piece in pieces)
        found = [BasicPitch()(np.concatenate(audio)) for audio in parts]
        return float(np.mean([note_scores(p.notes, f)["onset_f1"] for p, f in zip(pieces, found, strict=True)]))

    wanted = heard(runs.load(start).decoder())
    print(f"onset F1 on the validation pieces: {wanted:.3f} before", flush=True)
    scores = {}
    for temperature in (None, *TEMPERATURES):
        tried = trained.model if temperature is None else trained.model.with_sampling(temperature=temperature)
        scores[tried] = heard(trained._replace(model=tried).decoder())
        at = "its own temperature" if temperature is None else f"temperature {temperature}"
        print(f"  {scores[tried]:.3f} now, at {at}", flush=True)
        if scores[tried] >= wanted - TOLERANCE:
            break
    chosen = max(scores, key=lambda tried: scores[tried])
    if chosen != trained.model:
        write_whole(best / CONFIG_FILE, config.run_text(str((best / CONFIG_FILE).resolve()), [chosen]))


def told(scores: dict[str, Any]) -> str:
    """Says of each score what it was before and is now, on whole pieces: as it samples, and the mean if it has one."""
    rows = [row for row in scores["rows"] if row["kind"] == "model" and row["mode"] == WHOLE and not row["failed"]]
    lines = []
    for mean in (False, True):
        pair = [row for row in rows if ("temperature" in row["about"]["given"]) == mean]
        if len(pair) != 2:
            continue
        before, after = pair
        for column in scores["columns"]:
            cells = [row["cells"].get(column["key"], {}) for row in (before, after)]
            if column["key"] in SCORED and all("value" in cell for cell in cells):
                one, other = (cell["value"] for cell in cells)
                change = f" ({100 * (other / one - 1):+.0f} %)" if one else ""
                values = f"{one:.{column['digits']}f} before, {other:.{column['digits']}f} now{change}"
                lines.append(f"  {column['title']}{', the mean' * mean}: {values}")
    return "\n".join([f"on {scores['seconds']:.0f} s that it did not learn from:", *lines])


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("music_synth adopt", __doc__)
    parser.add_argument("folder", type=prepare_data.local_path, help="audio files and their MIDI files")
    parser.add_argument("--out", required=True, type=prepare_data.local_path, help="folder for all that is made")
    parser.add_argument(
        "--checkpoint", default=runs.SHIPPED, help=f"what to start from: a run, or {runs.SHIPPED} (the default)"
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="of tuning, at most (20)")
    parser.add_argument("--test_seconds", type=float, default=180.0, help="of held-out music that are scored, at most")
    parser.add_argument("--license", help="of the recordings, for the card of the instrument")
    parser.add_argument("--skip_bad", action="store_true", help="leave out pairs that are damaged or do not fit")
    parser.add_argument("--workers", type=int, help="processes that read recordings (default: one a core)")
    parser.add_argument("--seed", type=int, default=0, help="of the splits (0)")
    parser.add_argument("--gin.NAME", metavar="VALUE", help=f"sets a knob of {RECIPE}, such as --gin.TRAIN_STEPS=1000")
    recordings.add_flags(parser)
    flags = parser.parse_args(argv)
    recordings.check_flags(flags, parser, True, "adopt")
    for name in ("minutes", "test_seconds"):
        if not 0 < getattr(flags, name) < math.inf:
            parser.error(f"--{name} {getattr(flags, name)}: must be positive and finite")
    return flags


if __name__ == "__main__":
    errors.run(main)
