"""Prepares a data set, and says what to train on:

    python -m music_synth.prepare_data maestro --source maestro-v3.0.0.zip
    python -m music_synth.prepare_data synthetic --out FOLDER
    python -m music_synth.prepare_data rendered --source MIDI_FOLDER --soundfont A.sf2,B.sf3 --variations 3 --out FOLDER
    python -m music_synth.prepare_data pairs --source FOLDER_OF_AUDIO_AND_MIDI --out FOLDER

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

from music_synth import errors, recordings
from music_synth.data import synthetic
from music_synth.data.data_dir import default_data_dir
from music_synth.data.datasets.corpus import SPLITS
from music_synth.data.datasets.reading import CORPORA, corpus, pieces, reader, scan, seconds
from music_synth.data.datasets.variation import KINDS as VARIATIONS
from music_synth.data.examples import Piece, data_set_of
from music_synth.data.feed import folder_of, is_embedded
from music_synth.data.prepared import read_manifest, write_folder
from music_synth.errors import UserError, telling
from music_synth.files import check_new

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
        type=local_paths,
        help="what you downloaded: the archive, a folder of archives, or the unpacked folder; or the folder of the"
        " TFRecords that were published of the data set; of rendered: MIDI files, folders, WAD archives, by commas",
    )
    rendered = parser.add_argument_group(
        "rendered", "MIDI files of your own through SoundFonts; the rest as for others"
    )
    rendered.add_argument("--soundfont", help="SF2 or SF3 files, by commas (default: the one that ships)")
    rendered.add_argument("--variations", type=int, default=0, help="of each training piece, besides it as it is (0)")
    rendered.add_argument(
        "--vary",
        help=f"what varies, by commas (default: all): {', '.join(VARIATIONS)}",
    )
    rendered.add_argument("--gain", type=float, help="FluidSynth's master gain (default 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of rendered's variations, of pairs' splits (0)")
    recordings.add_flags(parser)
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
    is_rendered = data_set_of(flags.task) == "rendered"
    if flags.source and len(flags.source) > 1 and not is_rendered:
        parser.error(f"--source {','.join(map(str, flags.source))}: {flags.task} has one")
    if not 0 <= flags.variations <= 1000:
        parser.error(f"--variations {flags.variations}: must be in 0..1000")
    if flags.gain is not None and not 0 < flags.gain <= 10:
        parser.error(f"--gain {flags.gain}: must be above 0 and at most 10")
    if not is_rendered and (flags.soundfont or flags.variations or flags.vary or flags.gain):
        parser.error(f"--soundfont, --variations, --vary and --gain are for rendered, not for {flags.task}")
    recordings.check_flags(flags, parser, data_set_of(flags.task) == "pairs", flags.task)
    if flags.audio and flags.out is None:
        parser.error("--audio keeps the audio in a folder of prepared arrays: name it with --out")
    if flags.sampled_by and not flags.audio:
        parser.error("--sampled_by makes mels for training inverters: give --audio and --out too")
    return flags


def local_path(text: str) -> Path:
    if "://" in text:
        raise UserError(f"{text} is no local path: mount what it means, on every machine that takes part")
    return Path(text)


def local_paths(text: str) -> list[Path]:
    """Splits a list at its commas, unless it is one path that has some."""
    return [local_path(part) for part in ([text] if Path(text).exists() else text.split(",")) if part]


def main(argv: list[str]) -> None:
    """Flags -> a data set that is built -> a prepared folder, a cache."""
    flags = parse_flags(argv)
    for folder in (flags.out, flags.cache):
        if folder is not None:
            check_folder(folder)
    if flags.out is not None:
        check_new(flags.out)
    sampler = sampler_of(flags.sampled_by) if flags.sampled_by else None
    data_set = data_set_of(flags.task)
    beam_options = [f"--{option.removeprefix('--')}" for option in flags.beam_options.split(",") if option]
    beam_options += [f"--runner={flags.beam_runner}"] if flags.beam_runner else []
    if data_set in CORPORA:
        if not build_corpus(data_set, flags, beam_options):
            return
    elif flags.source is not None or flags.dry_run:
        raise UserError(f"{flags.task} needs no download: leave out --source and --dry_run")
    elif flags.out is None and flags.cache is None:
        raise UserError("nothing to do: name an --out folder, or a --cache")
    if flags.out is not None:
        version, splits = open_splits(data_set, flags.data_dir)
        with tqdm(desc=f"preparing {data_set}", total=sum(count for count, _ in splits.values()), unit="piece") as bar:
            shown = {split: counted(pieces, bar) for split, (_, pieces) in splits.items()}
            if sampler is not None:
                shown = {split: map(sampler, pieces) for split, pieces in shown.items()}
            write_folder(flags.out, shown, data_set, version, flags.audio)
        print(f"{flags.out} is ready: train on it with --gin.TASK=\"'{flags.out}'\"")
    if flags.cache is not None:
        with errors.needing("data sets are built with TensorFlow", "data"):
            from music_synth.data import tasks
            from music_synth.data.cache import write_cache
        tasks.build(data_set, flags.data_dir)
        tasks.register_tasks(names=[data_set], data_dir=flags.data_dir)
        print(f"caching {flags.task} in {flags.cache}", file=sys.stderr)
        write_cache(flags.task, flags.cache, flags.data_dir, beam_options)
        print(
            f"{flags.task} is cached: train on it with --gin.TASK=\"'{flags.task}'\""
            f" --gin.Feed.cache_dir=\"'{flags.cache}'\""
        )


def build_corpus(name: str, flags: argparse.Namespace, beam_options: list[str]) -> bool:
    """Builds a corpus that is not there yet, from what was downloaded. False: it was only to be listed."""
    folder = Path(flags.data_dir or default_data_dir())
    if flags.dry_run:
        print(summary(name, find_recordings(name, flags, folder), measure=True))
        return False
    with errors.needing("data sets are built with TensorFlow", "data"):
        from music_synth.data.datasets import builder
    if not builder.is_built(name, folder):
        found = find_recordings(name, flags, folder)
        print(summary(name, found, measure=False))
        beam = beam_options or None
        skip_bad = flags.skip_bad or name == "rendered"  # whose files come from anywhere
        builder.build(name, found, folder, skip_bad=skip_bad, workers=flags.workers, beam_options=beam)
    elif flags.source is not None:
        place = folder / name
        print(f"{name} was built before, in {place}: --source is not read; remove that folder to build it anew")
    print(f"{name} is built: train on it with --gin.TASK={name}")
    return True


def find_recordings(name: str, flags: argparse.Namespace, folder: Path) -> Found:
    """Finds what --source holds of a corpus; of rendered, what to render of it."""
    sources = flags.source or [folder / "downloads" / "manual" / name]  # tfds's place for what users bring
    if name == "rendered":
        from music_synth.data.datasets import rendered

        return rendered.find_renderings(
            sources,
            local_paths(flags.soundfont or ""),
            flags.variations,
            VARIATIONS if flags.vary is None else [kind for kind in flags.vary.split(",") if kind],
            flags.seed,
            rendered.GAIN if flags.gain is None else flags.gain,
        )
    if name == "pairs":
        found, table = recordings.find(sources[0], flags)
        print(table)
        return found
    # By archive, not by data set: two may come out of one, as Cerberus4 does out of Slakh's 104 GB.
    place = folder / "downloads" / "extracted" / corpus(name).archives[0]
    return scan(name, sources[0], place)


def open_splits(data_set: str, data_dir: Path | None) -> tuple[str, dict[str, tuple[int, Iterable[Piece]]]]:
    """Gives the version of a data set, built now if it can be, and of each split the number of its pieces and them."""
    if is_embedded(data_set):
        folder = folder_of(data_set, data_dir)
        assert folder is not None  # those that are embedded have one
        stored = read_manifest(folder)
        return synthetic.VERSION, {
            split: (len(pieces), (piece.read() for piece in pieces)) for split, pieces in stored.items()
        }
    with errors.needing("data sets are built with TensorFlow", "data"):
        from music_synth.data import tasks
    info = tasks.build(data_set, data_dir).info
    tasks.register_tasks(names=[data_set], data_dir=data_dir)
    task = tasks.registered(data_set)
    return str(info.version), {
        split: (info.splits[split].num_examples, tasks.pieces(task, split)) for split in info.splits
    }


def sampler_of(model_dir: str) -> Callable[[Piece], Piece]:
    """Gives a piece the mel that a run's decoder samples of its notes, segment by segment, each with true context."""
    from music_synth import runs  # here alone: only this needs JAX, and what follows
    from music_synth.compilation import keep_compiled
    from music_synth.playing import piece_seed, whole_mels

    keep_compiled()
    decoder = runs.load(model_dir).decoder()

    def sampled(piece: Piece) -> Piece:
        tokens = decoder.tokenizer.encode(piece.notes, len(piece.mel), timbre=piece.timbre)
        batches = decoder.sample_segments([tokens], [piece.mel], [piece_seed(piece.id)], SAMPLED_TOGETHER)
        ((_, mel),) = whole_mels(batches, [len(piece.mel)])
        return dataclasses.replace(piece, mel=mel)

    return sampled


def summary(name: str, found: Found, measure: bool) -> str:
    """What was found of a corpus and what is missing, for people; with `measure` hours, notes and bad labels too."""
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
                    notes += len(reader(name, item).read_notes(item))
                except UserError as error:
                    bad.append(str(error))
            line += f", {hours:.2f} hours, {notes:,} notes"
        lines.append(line)
    count, whole = pieces(name, found.recordings)
    if whole:
        lines.append(f"  pieces: {count:,} of the {' or '.join(f'{number:,}' for number in whole)} of a whole download")
    lines += [f"  missing: {line}" for line in found.missing]
    return "\n".join([*lines, *(f"  bad: {line}" for line in bad)])


def check_folder(folder: Path) -> None:
    """Refuses, before work begins, a folder that could not be written after it."""
    with telling(f"cannot write {folder}", "; choose another folder"):
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if parent == folder and not folder.is_dir():
            raise UserError(f"{folder} is a file: choose another folder")
        tempfile.TemporaryFile(dir=parent).close()


def counted(pieces: Iterable[Piece], bar: tqdm) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        bar.update()


if __name__ == "__main__":
    errors.run(main)
