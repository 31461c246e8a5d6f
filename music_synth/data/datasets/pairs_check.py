"""Whether pairs of audio and MIDI belong together, before they cost a training: damage, silence, and alignment."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from music_synth.audio.io import BLOCK, read_audio
from music_synth.audio.mel import FRAME_RATE, SAMPLE_RATE
from music_synth.data.alignment import Fit, fit, mel_of
from music_synth.data.datasets.corpus import MAX_MISSING_SECONDS, Found
from music_synth.data.datasets.pairs import CORPUS, Pair, cut
from music_synth.data.datasets.reading import in_processes
from music_synth.errors import UserError, telling
from music_synth.pictures import plot_piece

OFF, OFFSET, STRETCH = ALIGN = ("off", "offset", "stretch")
MAX_OFFSET = 0.5  # seconds that are mended, unless another limit is given
IN_PLACE = 0.02  # seconds of offset that are left as they are: a frame, and what the measure is good for
DRIFT = 0.06  # seconds of stretch over a piece that are left as they are
MAX_MINUTES = 60  # of a recording
MIN_SECONDS, MIN_PEAK, MIN_NOTES = 2.0, 10 ** (-60 / 20), 8  # less is too short, silent, too little to align by
FULL_SCALE, MAX_CLIPPED = 0.999, 1e-4  # share of samples at full scale from which a recording is called clipped
NUM_PICTURES, PICTURE_SECONDS = 3, 20.0
DAMAGED, SHORT, SILENT, ELSEWHERE = "damaged", "too short", "silent", "does not fit"


class Levels(NamedTuple):
    """What a file holds, whatever its header says."""

    rate: int  # Hz
    channels: int
    seconds: float
    clipped: float  # share of the samples


class Check(NamedTuple):
    """What was found of a pair."""

    pair: Pair  # with the length of its audio; moved, if it is to be
    num_notes: int = 0
    levels: Levels | None = None
    fit: Fit | None = None
    trouble: str = ""  # DAMAGED, SHORT, SILENT, ELSEWHERE; "": it can be used
    reason: str = ""  # for the trouble
    remark: str = ""  # of what can be used


class Refused(Exception):
    """A pair that cannot be used: (trouble, reason)."""


def examine(pair: Pair, align: str = OFFSET, max_offset: float = MAX_OFFSET) -> Check:
    """Reads a pair and looks whether it can be used, and where its notes lie in its audio."""
    check = Check(pair)
    try:
        notes = CORPUS.read_notes(pair)
        check = check._replace(num_notes=len(notes))
        levels = read_levels(pair.files[0])
        check = check._replace(levels=levels, pair=replace(pair, seconds=levels.seconds))
        if levels.seconds < MIN_SECONDS:
            raise Refused(SHORT, f"{levels.seconds:.2f} s of audio; at least {MIN_SECONDS:g} are needed")
        audio = read_audio(pair.files[0])
        if np.abs(audio).max() < MIN_PEAK:
            raise Refused(SILENT, "the audio, mixed to one channel, is silent")
        check = check._replace(fit=found_fit(notes, audio, align))
        check = aligned(check, align, max_offset)
        last = check.pair.offset + check.pair.stretch * max(note.offset for note in notes)
        if levels.seconds + MAX_MISSING_SECONDS < last:
            raise Refused(SHORT, f"{levels.seconds:.1f} s of audio for notes up to {last:.1f} s")
        if levels.clipped > MAX_CLIPPED:
            clipped = f"{100 * levels.clipped:.2g} % of the samples are clipped"
            check = check._replace(remark=", ".join(filter(None, [check.remark, clipped])))
    except Refused as refused:
        return check._replace(trouble=refused.args[0], reason=refused.args[1])
    except UserError as error:
        reason = str(error).removeprefix(f"{pair.id}: ").removesuffix("; mend it, or leave it out with --skip_bad")
        return check._replace(trouble=DAMAGED, reason=reason)
    except Exception as error:  # a library met what nobody foresaw
        return check._replace(trouble=DAMAGED, reason=f"{type(error).__name__}: {error}")
    return check


def read_levels(path: Path) -> Levels:
    """Reads a file once, block by block. UserError: it cannot be read, is empty or longer than an hour."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            frames = clipped = 0
            for block in file.blocks(BLOCK, dtype="float32", always_2d=True):
                frames += len(block)
                clipped += int(np.count_nonzero(np.abs(block) >= FULL_SCALE))
                if frames > MAX_MINUTES * 60 * file.samplerate:
                    raise UserError(f"{path} lasts more than {MAX_MINUTES} minutes: cut it, and its MIDI file")
            if not frames:
                raise UserError(f"{path} holds no audio samples")
            share = clipped / (frames * file.channels)
            return Levels(file.samplerate, file.channels, frames / file.samplerate, share)
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"cannot read {path} as audio ({error})") from error


def found_fit(notes: Sequence, audio: np.ndarray, align: str) -> Fit | None:
    """Finds where notes lie in audio; with a stretch if that is asked for, or without one they fit nowhere.

    None: there are too few notes to tell.
    """
    if len(notes) < MIN_NOTES:
        return None
    mel = mel_of(audio)
    found = fit(notes, mel)
    if align == STRETCH or (align == OFFSET and not found.is_clear):
        stretched = fit(notes, mel, stretches=True)
        if stretched.is_clear and (stretched.correlation > found.correlation or not found.is_clear):
            return stretched
    return found


def aligned(check: Check, align: str, max_offset: float) -> Check:
    """The pair moved as far as its alignment asks for it and the settings allow it; Refused: they do not."""
    found, pair = check.fit, check.pair
    if found is None:
        return check._replace(remark="too few notes to align by")
    if align == OFF:
        return check
    if not found.is_clear:
        raise Refused(
            ELSEWHERE,
            f"the notes are nowhere in the audio (correlation {found.correlation:.2f}, {100 * found.agreement:.0f} % of"
            " the windows agree): is this the MIDI file of this recording?",
        )
    offset, stretch = (found.offset if abs(found.offset) > IN_PLACE else 0.0), 1.0
    if abs(found.stretch - 1) * pair.seconds > DRIFT:
        if align != STRETCH:
            raise Refused(ELSEWHERE, f"the audio is {in_percent(found.stretch)}: --align stretch moves the notes")
        offset, stretch = found.offset, found.stretch
    if abs(offset) > max_offset:
        raise Refused(
            ELSEWHERE, f"the audio is {in_seconds(offset)}: trim it, or allow more than --max_offset {max_offset:g}"
        )
    moved = [f"{in_seconds(offset)}, mended"] * bool(offset) + [f"{in_percent(stretch)}, mended"] * (stretch != 1)
    return check._replace(
        pair=replace(pair, offset=round(offset, 4), stretch=round(stretch, 7)), remark=", ".join(moved)
    )


def in_seconds(offset: float) -> str:
    return f"{abs(offset):.2f} s {'late' if offset > 0 else 'early'}"


def in_percent(stretch: float) -> str:
    return f"{100 * abs(stretch - 1):.2f} % {'slower' if stretch > 1 else 'faster'} than the notes"


# --- many --------------------------------------------------------------------------------------------------------


def examine_all(pairs: Sequence[Pair], align: str, max_offset: float, workers: int) -> list[Check]:
    """Examines pairs in several processes; in their order."""
    checks: dict[int, Check] = {}
    arguments = ((pair, align, max_offset) for pair in pairs)
    with (
        tqdm(desc="listening to pairs", total=len(pairs), unit="pair") as bar,
        contextlib.closing(in_processes(examine, arguments, max(1, min(workers, len(pairs))))) as results,
    ):
        for number, check in results:
            checks[number] = check
            bar.update()
    return [checks[number] for number in range(len(pairs))]


def accepted(found: Found, checks: Sequence[Check]) -> Found:
    """What can be used of what was found; `missing` also lists the others, with the reason."""
    usable = [part for check in checks if not check.trouble for part in cut(check.pair)]
    refused = [f"{check.pair.id}: {check.reason}" for check in checks if check.trouble]
    return Found(usable, [*found.missing, *refused])


def table(checks: Sequence[Check], unpaired: Sequence[str] = ()) -> str:
    """What was found, a line a pair, for people."""
    rows = [("pair", "length", "audio", "notes", "offset", "fit", "")]
    for check in checks:
        levels, found = check.levels, check.fit
        rows.append(
            (
                check.pair.id,
                f"{levels.seconds:.1f} s" if levels else "",
                f"{levels.rate / 1000:g} kHz, {levels.channels} ch" if levels else "",
                f"{check.num_notes:,}",
                f"{found.offset:+.3f} s" if found and found.is_clear else "",
                f"{found.correlation:.2f}, {100 * found.agreement:.0f} %" if found else "",
                f"{check.trouble}: {check.reason}" if check.trouble else check.remark or "ok",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]) for row in rows
    ]
    counts = {kind: sum(check.trouble == kind for check in checks) for kind in (DAMAGED, SHORT, SILENT, ELSEWHERE)}
    told = [f"{counts[kind]} {kind}" for kind in counts if counts[kind]] + [f"{len(unpaired)} unpaired"] * bool(
        unpaired
    )
    usable = [check for check in checks if not check.trouble]
    minutes = sum(check.pair.seconds for check in usable) / 60
    total = f"{len(usable)} pairs, {minutes:.1f} minutes" + f"; left out: {', '.join(told)}" * bool(told)
    return "\n".join([*(line.rstrip() for line in lines), total])


def write_pictures(folder: Path, checks: Sequence[Check]) -> list[Path]:
    """Draws the notes of the pairs that fit least over their mel, at most three; returns the files.

    UserError: they cannot be written.
    """
    with telling(f"cannot write into {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    told = [(bool(check.trouble), check.fit, check) for check in checks if check.fit is not None]
    told.sort(key=lambda one: (not one[0], one[1].agreement, one[1].correlation))
    paths = []
    for _, _, check in told[:NUM_PICTURES]:
        pair = check.pair
        notes = CORPUS.read_notes(pair)
        start = max(0.0, min(note.onset for note in notes) - 1.0)
        first, end = round(start * FRAME_RATE), round((start + PICTURE_SECONDS) * SAMPLE_RATE)
        mel = mel_of(read_audio(pair.files[0])[:end])[first:]
        shown = [note.since(start) for note in notes]
        path = folder / f"{pair.id[:100]}.png"
        plot_piece(
            path, {"log-mel": mel}, shown, title=f"{pair.id}, from {start:.1f} s. {check.reason or check.remark}"
        )
        paths.append(path)
    return paths
