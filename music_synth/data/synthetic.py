"""The embedded data set: its pieces, how each is composed and sounds, and all of it as a prepared folder.

No TensorFlow here; `datasets/embedded_tfds.py` makes tfds's data set of the same pieces.

A piece is a pure function of the seed, the split and its number: seed -> MIDI bytes -> notes and audio. The
MIDI file is the only source of both, so labels and sound cannot drift apart.

    python -m music_synth.data.synthetic --kind piano --seed 3 --seconds 30 --out piece.mid

Version 1.0.0 is a narrow composer: velocities around 85, 3/4 and 4/4, steady volumes. Editions whose names end in
"_wide" are by the wider one (`composer.wide`), which starts from the same kinds.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from music_synth import errors
from music_synth.audio.io import resample, turned_down
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.audio.soundfont import RENDER_RATE, render_midi
from music_synth.data.composer.ensembles import ENSEMBLES
from music_synth.data.composer.score import to_midi
from music_synth.data.composer.wide import PACES, widened
from music_synth.data.datasets.corpus import SPLITS
from music_synth.data.examples import Piece
from music_synth.data.prepared import MANIFEST, write_folder
from music_synth.data.prepared import VERSION as ARRAYS_VERSION
from music_synth.errors import UserError, telling
from music_synth.files import locked
from music_synth.midi.notes import Note, read_midi

NAME = "synthetic"
VERSION = "1.0.0"  # raise it when the composer, its sound or the record change
DEFAULT_MINUTES = 40
KINDS = tuple(ENSEMBLES)  # they take turns, so a third of the time is piano and guitar
HELD_OUT_SHARE = 1 / 8  # of the training minutes, for validation and for test
PIECE_SECONDS = (36, 54)  # drawn evenly; pieces end with a whole phrase, so they come out 30 to 60 s long
MEAN_SECONDS = 46  # with the release of the last notes

PIANOS = (0, 0, 0, 0, 1, 2, 4, 5, 6)
GUITARS = (24, 24, 24, 25, 25, 25, 26, 26, 27)
STRINGS = (  # highest voice first
    (40, 40, 41, 42), (40, 40, 41, 42), (40, 40, 41, 42, 43), (40, 41, 42), (48, 48, 42, 43), (49, 48, 42, 43),
    (45, 45, 42, 43), (44, 44, 42, 43), (40, 46, 41, 42),
)  # fmt: skip
WINDS = (
    (73, 68, 71, 60, 70), (73, 68, 71, 70), (56, 56, 60, 57, 58), (56, 60, 57, 58), (64, 65, 66, 67),
    (65, 65, 66, 67), (74, 71, 69, 70), (72, 73, 71, 60), (59, 61, 57, 58),
)  # fmt: skip
BAND = {  # by role
    "lead": (11, 18, 22, 26, 27, 29, 30, 56, 57, 64, 65, 66, 73, *range(80, 88)),
    "chords": (0, 1, 2, 3, 4, 5, 7, 16, 17, 18, *range(24, 32)),
    "pad": (16, 19, 48, 50, 51, 52, 53, 54, 61, 62, 63, *range(88, 96)),
    "bass": tuple(range(32, 40)),
}  # fmt: skip
MIXED_BASSES = (32, 33, 35, 42, 43, 43, 57, 58, 70)
MIXED_FAMILIES = (*range(4), *range(5, 15)) * 2 + (15,)  # GM families; sound effects are a rare spice
MIXED_SIZE = 11  # instruments besides the bass; about five of them play at a time
# What the other kinds play; mixed ensembles prefer the rest, so that nearly every program is heard.
PLAYED_ELSEWHERE = frozenset(PIANOS + GUITARS + sum(STRINGS + WINDS, ()) + sum(BAND.values(), ()))


@dataclass(frozen=True)
class PieceSpec:
    """What fixes a piece: compose(spec) gives the same bytes wherever it runs."""

    id: str
    kind: str  # one of KINDS
    programs: tuple[int, ...]  # General MIDI, in the order in which the kind uses them
    seed: str
    seconds: float  # asked for; the piece ends with a whole phrase
    reverb: bool = True
    wide: bool = False  # composed by the wider composer

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of piece {self.kind!r}; choose one of {', '.join(KINDS)}")
        if not 1 <= self.seconds <= 600:
            raise UserError(f"a piece of {self.seconds} seconds cannot be composed; choose 1 to 600")


class Deck:
    """Draws without replacement, shuffled anew when it is empty: everything comes up before a repeat."""

    def __init__(self, rng: random.Random, items: Sequence, later: frozenset = frozenset()):
        self.rng, self.items, self.later = rng, list(items), later
        self.rest: list = []

    def draw(self):
        if not self.rest:
            # drawn from the end of the list, so members of `later` go to its front, as a tendency
            self.rest = sorted(self.items, key=lambda item: self.rng.random() - 0.4 * (item in self.later))
        return self.rest.pop()


class Casting:
    """Chooses the instruments of one piece after the other, so that all of them get their turn."""

    def __init__(self, rng: random.Random):
        self.solo = {"piano": Deck(rng, PIANOS), "guitar": Deck(rng, GUITARS)}
        self.sets = {"strings": Deck(rng, STRINGS), "winds": Deck(rng, WINDS)}
        self.band = [Deck(rng, programs) for programs in BAND.values()]
        self.mixed_bass = Deck(rng, MIXED_BASSES)
        self.families = Deck(rng, MIXED_FAMILIES)
        self.members = [Deck(rng, range(8 * f, 8 * f + 8), PLAYED_ELSEWHERE) for f in range(16)]

    def cast(self, kind: str) -> tuple[int, ...]:
        if kind in self.solo:
            return (self.solo[kind].draw(),)
        if kind in self.sets:
            return self.sets[kind].draw()
        if kind == "band":
            return tuple(deck.draw() for deck in self.band)
        programs = [self.mixed_bass.draw()]
        while len(programs) <= MIXED_SIZE:
            program = self.members[self.families.draw()].draw()
            if program not in programs:
                programs.append(program)
        return tuple(programs)


def plan_split(
    split: str, minutes: float, seed: int = 0, half_dry: bool = False, wide: bool = False
) -> list[PieceSpec]:
    """The pieces of a split of the data set whose training split lasts about `minutes`.

    Validation and test, an eighth of it each, take their casts from training pieces of the same kind, so
    they are played by instruments heard in training, but every piece is composed anew. half_dry: half of the
    pieces have no reverb. wide: by the wider composer.

    Raises:
      UserError: `minutes` is not between 0 and 100,000, or an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not 0 < minutes <= 100_000:
        raise UserError(f"a data set of {minutes} minutes cannot be built; choose more than 0, up to 100000")
    casting = Casting(random.Random(f"{seed}/casting"))
    train = [(kind, casting.cast(kind)) for kind in _kinds(minutes)]
    rng = random.Random(f"{seed}/{split}")
    specs = []
    for index, kind in enumerate(_kinds(minutes if split == "train" else minutes * HELD_OUT_SHARE)):
        if split == "train":
            programs = train[index][1]
        else:
            programs = rng.choice([cast for other, cast in train if other == kind])
        name = f"{split}-{index:03d}-{kind}"
        reverb = not half_dry or index // len(KINDS) % 2 == 0  # each kind in turn with and without
        specs.append(PieceSpec(name, kind, programs, f"{seed}/{name}", rng.uniform(*PIECE_SECONDS), reverb, wide))
    return specs


def _kinds(minutes: float) -> list[str]:
    return [KINDS[i % len(KINDS)] for i in range(max(1, round(minutes * 60 / MEAN_SECONDS)))]


@dataclass(frozen=True)
class Edition:
    """A size of the data set; its name says all of it.

    Minutes of music in the training split (validation and test: an eighth each), the composer's seed, whether half of
    the pieces have no reverb, for training inverters, and whether the wider composer makes them.
    """

    minutes: float = DEFAULT_MINUTES
    seed: int = 0
    half_dry: bool = False
    wide: bool = False

    def __post_init__(self):
        self.plan("train")  # complains about sizes that make no sense

    @property
    def name(self) -> str:
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.minutes:g}min{seed}" + "-halfdry" * self.half_dry + "-wide" * self.wide

    @property
    def description(self) -> str:
        further = ", half of it without reverb" * self.half_dry + ", by the wider composer" * self.wide
        return f"{self.minutes:g} minutes, seed {self.seed}{further}"

    @classmethod
    def named(cls, name: str) -> Edition:
        """Gives the edition that a name describes, with hyphens or underscores; "": the default. UserError: none."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)min(?:-seed(\d+))?(-halfdry)?(-wide)?", name.replace("_", "-"))
        if name and not match:
            raise UserError(f"no data set of the size {name!r}: it reads as in synthetic:5min or synthetic:5min_seed1")
        return cls(float(match[1]), int(match[2] or 0), bool(match[3]), bool(match[4])) if match else cls()

    def plan(self, split: str) -> list[PieceSpec]:
        """Plans the pieces of a split."""
        return plan_split(split, self.minutes, self.seed, self.half_dry, self.wide)

    def pieces(self, split: str, bar: tqdm) -> Iterator[tuple[str, list[Note], np.ndarray]]:
        """Makes the pieces of a split in order, as (id, notes, audio as of `render`); `bar` counts them."""
        for spec, midi, audio in make_pieces(self.plan(split), workers=min(4, os.cpu_count() or 1)):
            yield spec.id, read_midi(midi, as_published=not spec.wide), audio  # else with channels' volumes
            bar.update()

    def bar(self) -> tqdm:
        """A progress bar over all pieces."""
        total = sum(len(self.plan(split)) for split in SPLITS)
        return tqdm(desc=f"composing and rendering {NAME}/{self.name}", total=total, unit="piece")


def prepare_arrays(edition: Edition, data_dir: Path) -> Path:
    """Gives the prepared folder of an edition, with its audio; what is not there is made now, in a minute or two.

    It lies beside tfds's build, and its name says of which version of the data set and of the arrays it is.

    Raises:
      UserError: no room or no permission in `data_dir`, or FluidSynth missing.
    """
    folder = data_dir / NAME / edition.name / f"arrays-{VERSION}-{ARRAYS_VERSION}"
    if (folder / MANIFEST).exists():
        return folder
    with telling(f"cannot build the synthetic data set in {data_dir}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent), edition.bar() as bar:
            if not (folder / MANIFEST).exists():  # else another process was faster
                splits = {split: itertools.starmap(Piece.of_audio, edition.pieces(split, bar)) for split in SPLITS}
                write_folder(folder, splits, NAME, VERSION, audio=True)
    return folder


def compose(spec: PieceSpec) -> bytes:
    """The piece as the bytes of a MIDI file."""
    rng = random.Random(spec.seed)
    if not spec.wide:
        return to_midi(ENSEMBLES[spec.kind](rng, spec.programs, spec.seconds, False), rng)
    pace = rng.uniform(*PACES)
    score = ENSEMBLES[spec.kind](rng, spec.programs, spec.seconds * pace, True)
    return to_midi(widened(score, rng, pace), rng)


def render(midi: bytes, reverb: bool = True, soundfont: Path | None = None) -> np.ndarray:
    """The sound of a piece: float32 [S], 16 kHz, mono, peak at most 0.99, until the last release ends."""
    return turned_down(resample(render_midi(midi, soundfont, reverb=reverb), RENDER_RATE, SAMPLE_RATE))


def make_pieces(specs: Iterable[PieceSpec], workers: int = 2) -> Iterator[tuple[PieceSpec, bytes, np.ndarray]]:
    """Composes and renders pieces, in order: (spec, MIDI bytes, audio as of `render`).

    The workers are threads: FluidSynth and soxr, where nearly all of the time goes, run without Python's lock, and
    threads need neither a second import of the caller's main module nor audio sent between processes.
    """

    def make(spec: PieceSpec) -> tuple[PieceSpec, bytes, np.ndarray]:
        midi = compose(spec)
        return spec, midi, render(midi, spec.reverb)

    pool = ThreadPoolExecutor(workers)
    try:
        pending: collections.deque = collections.deque()
        for spec in specs:
            pending.append(pool.submit(make, spec))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Compose one piece and write it as a MIDI file.")
    parser.add_argument("--kind", required=True, help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long (default 30)")
    parser.add_argument("--wide", action="store_true", help="by the wider composer")
    parser.add_argument("--out", type=Path, required=True, help="MIDI file to write")
    args = parser.parse_args(argv)
    if args.kind not in KINDS:
        raise UserError(f"unknown kind of piece {args.kind!r}; choose one of {', '.join(KINDS)}")
    if not args.out.parent.is_dir():
        raise UserError(f"cannot write {args.out}: there is no folder {args.out.parent}")
    programs = Casting(random.Random(f"{args.seed}/casting")).cast(args.kind)
    name, seed = args.out.stem, f"{args.seed}/{args.kind}"
    spec = PieceSpec(name, args.kind, programs, seed, args.seconds, wide=args.wide)
    args.out.write_bytes(compose(spec))


if __name__ == "__main__":
    errors.run(main)
