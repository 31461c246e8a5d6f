"""Prepares a data set: `python -m music_synth.prepare_data synthetic --out FOLDER`, then train on FOLDER.

Builds what is not there yet; then writes a folder of prepared arrays, which trains without TensorFlow, or seqio's
offline cache, or both.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from music_synth import errors
from music_synth.data.examples import Piece
from music_synth.data.prepared import check_target, write_folder
from music_synth.errors import UserError


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser(
        "python -m music_synth.prepare_data", "Builds a data set and writes it in a form to train on."
    )
    parser.add_argument(
        "task",
        help='name of the data set: "synthetic", or "synthetic:5min" for 5 minutes of it; for the'
        ' cache of the task without context "synthetic_nocontext"',
    )
    parser.add_argument("--out", type=Path, help="folder of prepared arrays to write; it must not exist yet")
    parser.add_argument("--cache", type=Path, help="folder in which to write seqio's offline cache of the task")
    parser.add_argument("--data_dir", type=Path, help="where data sets live (default: data/ of the checkout)")
    parser.add_argument("--beam_options", default="", help="for the cache: options of Apache Beam, by commas")
    flags = parser.parse_args(argv)
    if flags.out is None and flags.cache is None:
        parser.error("nothing to do: name an --out folder, or a --cache")
    return flags


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    for folder in (flags.out, flags.cache):
        if folder is not None:
            check_writable(folder)
    if flags.out is not None:
        check_target(flags.out)
    try:
        from music_synth.data import tasks
    except ImportError as error:
        raise UserError(f"{error}: data sets are built with pip install 'music_synth[data]'") from error
    data_set = tasks.data_set_of(flags.task)
    builder = tasks.build(data_set, flags.data_dir)
    tasks.register_tasks(names=[data_set], data_dir=flags.data_dir)
    if flags.out is not None:
        pieces = {split: tasks.pieces(tasks.find(data_set), split) for split in tasks.SPLITS}
        total = sum(builder.info.splits[split].num_examples for split in tasks.SPLITS)
        with tqdm(desc=f"preparing {data_set}", total=total, unit="piece") as bar:
            shown = {split: counted(pieces[split], bar) for split in pieces}
            write_folder(flags.out, shown, data_set, str(builder.info.version))
        print(f"{flags.out} is ready: train on it with --gin.TASK=\"'{flags.out}'\"")
    if flags.cache is not None:
        from music_synth.data.cache import write_cache

        print(f"caching {flags.task} in {flags.cache}", file=sys.stderr)
        beam_options = [option for option in flags.beam_options.split(",") if option]
        write_cache([flags.task], flags.cache, flags.data_dir, beam_options)
        print(
            f"{flags.task} is cached: train on it with --gin.TASK=\"'{flags.task}'\""
            f" --gin.Feed.cache_dir=\"'{flags.cache}'\""
        )


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
