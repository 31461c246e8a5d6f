"""What `prepare_data pairs` and `adopt` are told of recordings of one's own, and what they find of them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tqdm import tqdm

from music_synth.data.datasets import pairs, pairs_check
from music_synth.data.datasets.corpus import Found
from music_synth.data.datasets.pairs_check import ALIGN, MAX_OFFSET
from music_synth.errors import UserError

FLAGS = ("manifest", "program", "align", "max_offset", "transcribe", "pictures")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of FLAGS, each None where it is not given."""
    group = parser.add_argument_group("pairs", "audio files of your own, each with the MIDI file of what is played")
    group.add_argument("--manifest", type=Path, help="CSV or JSON lines: audio,midi,split,program (default: names)")
    group.add_argument("--program", help="General MIDI, 0 to 127, or drums: of MIDI files that name none")
    group.add_argument(
        "--align",
        choices=ALIGN,
        help="how notes are moved onto the audio: not at all, by an offset (default), by offset and stretch",
    )
    group.add_argument("--max_offset", type=float, help=f"seconds; pairs further apart are refused ({MAX_OFFSET})")
    group.add_argument(
        "--transcribe",
        metavar="MODULE:NAME",
        help="write the MIDI files that are missing, as NAME.transcribed.mid: basic_pitch, or what can be called",
    )
    group.add_argument("--pictures", type=Path, help="folder for pictures of the pairs that fit least")


def check_flags(flags: argparse.Namespace, parser: argparse.ArgumentParser, are_read: bool, task: str) -> None:
    """Refuses values that cannot be, and flags that nothing reads."""
    for name in FLAGS:
        if not are_read and getattr(flags, name) is not None:
            parser.error(f"--{name} is for pairs, not for {task}")
    if flags.workers is not None and flags.workers < 1:
        parser.error(f"--workers {flags.workers}: must be at least 1")
    if flags.max_offset is not None and not 0 < flags.max_offset <= 10:
        parser.error(f"--max_offset {flags.max_offset}: must be above 0 and at most 10")


def find(source: Path, flags: argparse.Namespace) -> tuple[Found, str]:
    """Finds the pairs of a folder, transcribes audio that has no notes if asked, and listens to all of them.

    Returns what can be used, and a table of what was found.
    """
    instrument = None if flags.program is None else pairs.Instrument.named(flags.program, "--program")
    if flags.transcribe is not None:
        transcribe_missing(source, flags.transcribe)
    found = pairs.find_pairs(source, flags.manifest, instrument, flags.seed)
    align = pairs_check.OFFSET if flags.align is None else flags.align
    max_offset = MAX_OFFSET if flags.max_offset is None else flags.max_offset
    candidates = [pair for pair in found.recordings if isinstance(pair, pairs.Pair)]
    checks = pairs_check.examine_all(candidates, align, max_offset, flags.workers or os.cpu_count() or 1)
    lines = [pairs_check.table(checks, found.missing)]
    if flags.pictures is not None:
        lines += [f"  {path}" for path in pairs_check.write_pictures(flags.pictures, checks)]
    return pairs_check.accepted(found, checks), "\n".join(lines)


def transcribe_missing(source: Path, name: str) -> None:
    """Writes MIDI files of the audio files that have none, by a transcriber as `evaluate` takes it."""
    from music_synth.evaluation.scoring import load_transcriber  # here alone: it imports all that scores

    transcribe, _ = load_transcriber(name)
    if isinstance(transcribe, str):
        raise UserError(f"--transcribe {name}: give basic_pitch, or MODULE:NAME of a callable")
    for path in tqdm(pairs.audio_without_midi(source), desc="transcribing", unit="file"):
        pairs.write_transcript(path, transcribe)
