"""Prepares a data set, and says what to train on:

    python -m music_synth.prepare_data maestro --source maestro-v3.0.0.zip
    python -m music_synth.prepare_data synthetic --out FOLDER

Builds what is not there yet, from what you downloaded; then, if asked, writes a folder of prepared arrays, which trains
without TensorFlow, or seqio's offline cache, or both.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from music_synth import errors
from music_synth.data.datasets.reading import CORPORA
from music_synth.data.examples import Piece
from music_synth.data.prepared import check_target, write_folder
from music_synth.errors import UserError

if TYPE_CHECKING:
    from music_synth.data.datasets.corpus import Found

SAMPLED_TOGETHER = 8  # segments, with --sampled_by


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser(
        "python -m music_synth.prepare_data", "Builds a data set and writes it in a form to train on."
    )
    parser.add_argument(
        "task",
        help=f'name of the data set: {", ".join(CORPORA)}; "synthetic", or "synthetic:5min" for 5 minutes of it;'
        ' for the cache of a task without context "maestro_nocontext"',
    )
    parser.add_argument(
        "--source",
        type=local_path,
        help="what you downloaded: the archive, a folder of archives, or the unpacked folder; or the folder of the"
        " TFRecords that were published of the data set",
    )
    parser.add_argument("--dry_run", action="store_true", help="only list what is there and what is missing")
    parser.add_argument("--skip_bad", action="store_true", help="leave out what is missing or damaged, and list it")
    parser.add_argument("--workers", type=int, help="processes that read recordings (default: one a core)")
    parser.add_argument("--out", type=local_path, help="folder of prepared arrays to write; it must not exist yet")
    parser.add_argument("--audio", action="store_true", help="keep the audio in --out too, to train inverters on")
    parser.add_argument(
        "--sampled_by",
        help="MODEL_DIR of a decoder's run: keep in --out the mel that it samples of each segment's notes and true"
        " context, not the recording's; to fine-tune inverters on",
    )
    parser.add_argument("--cache", type=local_path, help="folder in which to write seqio's offline cache of the task")
    parser.add_argument("--data_dir", type=local_path, help="where data sets live (default: data/ of the checkout)")
    parser.add_argument("--beam_runner", help="Apache Beam's runner, for the build and the cache: FlinkRunner, ...")
    parser.add_argument("--beam_options", default="", help="options of Apache Beam, by commas")
    flags = parser.parse_args(argv)
    if flags.workers is not None and flags.workers < 1:
        parser.error(f"--workers {flags.workers}: must be at least 1")
    if flags.audio and flags.out is None:
        parser.error("--audio keeps the audio in a folder of prepared arrays: name it with --out")
    if flags.sampled_by and not flags.audio:
        parser.error("--sampled_by makes mels for training inverters: give --audio and --out too")
    return flags


def local_path(text: str) -> Path:
    if "://" in text:
        raise UserError(f"{text} is no local path: mount what it means, on every machine that takes part")
    return Path(text)


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    for folder in (flags.out, flags.cache):
        if folder is not None:
            check_writable(folder)
    if flags.out is not None:
        check_target(flags.out)
    sampler = sampler_of(flags.sampled_by) if flags.sampled_by else None
    try:
        from music_synth.data import tasks
        from music_synth.data.data_dir import default_data_dir
        from music_synth.data.datasets import builder, reading
    except ImportError as error:
        raise UserError(f"{error}: data sets are built with pip install 'music_synth[data]'") from error
    data_set = tasks.data_set_of(flags.task)
    beam_options = [f"--{option.removeprefix('--')}" for option in flags.beam_options.split(",") if option]
    beam_options += [f"--runner={flags.beam_runner}"] if flags.beam_runner else []
    if data_set in reading.CORPORA:
        folder = Path(flags.data_dir or default_data_dir())
        if flags.dry_run or not builder.is_built(data_set, folder):
            source = flags.source or folder / "downloads" / "manual" / data_set  # tfds's place for what users bring
            # By archive, not by data set: two may come out of one, as Cerberus4 does out of Slakh's 104 GB.
            place = folder / "downloads" / "extracted" / reading.corpus(data_set).archives[0]
            found = builder.scan(data_set, source, place)
            print(summary(data_set, found, measure=flags.dry_run))
            if flags.dry_run:
                return
            beam = beam_options or None
            builder.build(data_set, found, folder, skip_bad=flags.skip_bad, workers=flags.workers, beam_options=beam)
        elif flags.source is not None:
            place = folder / data_set
            print(f"{data_set} was built before, in {place}: --source is not read; remove that folder to build it anew")
        print(f"{data_set} is built: train on it with --gin.TASK={data_set}")
    elif flags.source is not None or flags.dry_run:
        raise UserError(f"{flags.task} needs no download: leave out --source and --dry_run")
    elif flags.out is None and flags.cache is None:
        raise UserError("nothing to do: name an --out folder, or a --cache")
    made = tasks.build(data_set, flags.data_dir)
    tasks.register_tasks(names=[data_set], data_dir=flags.data_dir)
    if flags.out is not None:
        pieces = {split: tasks.pieces(tasks.find(data_set), split) for split in made.info.splits}
        total = sum(split.num_examples for split in made.info.splits.values())
        with tqdm(desc=f"preparing {data_set}", total=total, unit="piece") as bar:
            shown = {split: counted(pieces[split], bar) for split in pieces}
            if sampler is not None:
                shown = {split: map(sampler, shown[split]) for split in shown}
            write_folder(flags.out, shown, data_set, str(made.info.version), flags.audio)
        print(f"{flags.out} is ready: train on it with --gin.TASK=\"'{flags.out}'\"")
    if flags.cache is not None:
        from music_synth.data.cache import write_cache

        print(f"caching {flags.task} in {flags.cache}", file=sys.stderr)
        write_cache([flags.task], flags.cache, flags.data_dir, beam_options)
        print(
            f"{flags.task} is cached: train on it with --gin.TASK=\"'{flags.task}'\""
            f" --gin.Feed.cache_dir=\"'{flags.cache}'\""
        )


def sampler_of(model_dir: str) -> Callable[[Piece], Piece]:
    """Gives a piece the mel that a run's decoder samples of its notes, segment by segment, each with true context."""
    from music_synth import runs  # here alone: only this needs JAX, and what follows
    from music_synth.compilation import keep_compiled
    from music_synth.playing import Decoder, piece_seed, whole_mels

    keep_compiled()
    model, tokenizer, params, _ = runs.load(model_dir)
    decoder = Decoder(model, params, tokenizer)

    def sampled(piece: Piece) -> Piece:
        tokens = tokenizer.encode(piece.notes, len(piece.mel))
        batches = decoder.sample_segments([tokens], [piece.mel], [piece_seed(piece.id)], SAMPLED_TOGETHER)
        ((_, mel),) = whole_mels(batches, [len(piece.mel)])
        return dataclasses.replace(piece, mel=mel)

    return sampled


def summary(name: str, found: Found, measure: bool) -> str:
    """What was found of a corpus and what is missing, for people; with `measure` hours, notes and bad labels too."""
    from music_synth.data.datasets.corpus import SPLITS
    from music_synth.data.datasets.reading import pieces, reader, seconds

    lines, bad = [f"{name}: {len(found.recordings)} recordings"], []
    for split in SPLITS:
        items = [item for item in found.recordings if item.split == split]
        if not items:
            continue
        line = f"  {split}: {len(items)}"
        if measure:
            hours, notes = 0.0, 0
            for item in tqdm(items, desc=f"looking at {split}", unit="piece", leave=False):
                try:
                    hours += seconds(item) / 3600
                    notes += len(reader(name, item).labels(item))
                except UserError as error:
                    bad.append(str(error))
            line += f", {hours:.2f} hours, {notes:,} notes"
        lines.append(line)
    count, whole = pieces(name, found.recordings)
    if whole:
        lines.append(f"  pieces: {count:,} of the {' or '.join(f'{number:,}' for number in whole)} of a whole download")
    lines += [f"  missing: {line}" for line in found.missing]
    return "\n".join([*lines, *(f"  bad: {line}" for line in bad)])


def check_writable(folder: Path) -> None:
    """Refuses, before work begins, a folder that could not be written after it."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if parent == folder and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder") from error


def counted(pieces: Iterable[Piece], bar: tqdm) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        bar.update()


if __name__ == "__main__":
    errors.run(main)
