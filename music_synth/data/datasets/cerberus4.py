"""Cerberus4: quartets of piano, guitar, bass and drums out of Slakh2100. There is no download of its own.

Get Slakh2100 (see `slakh`, with its layout, license and quirks, which are the same here). A recording is a subset
of a song's stems with exactly one each of

    instrument   0 bass            1 drums    2 guitar          3 piano
    from         programs 32-39    is_drum    programs 24-31    programs 0-7
    program      32                drums      24                0

whole, whether or not they play at the same time: every such subset, in all splits, as published. Songs that lack
one of the four give none. A song with more than 100 subsets, as ten guitars would make, gives 100 of them,
drawn at random by the name of the track, so that it does not outweigh the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from music_synth.data.datasets.corpus import Found
from music_synth.data.datasets.slakh import Mix, MixReader, Song, Stem, split_songs

PROGRAMS = (32, None, 24, 0)  # bass, drums, guitar, piano: the first of each family of eight
MAX_SUBSETS = 100  # of a song


class Cerberus4(MixReader):
    """Cerberus4 out of a folder of Slakh2100. Raises as `Corpus` says."""

    title = "Cerberus4 of Slakh2100"
    archives = ("slakh2100_flac_redux.tar.gz",)
    pieces = ()  # it depends on the programs of the stems

    def recordings_in(self, root: Path) -> Found:
        songs, missing = split_songs(root, self.title, self.bass_octave)
        mixes = [
            Mix.of(song, "-".join([song.track, *(stem.name for stem in stems)]), stems)
            for song in songs
            for stems in quartets(song)
        ]
        return Found(mixes, missing)


CORPUS = Cerberus4()
SOUNDING_BASS = Cerberus4(bass_octave=True)


def quartets(song: Song) -> Iterator[tuple[Stem, ...]]:
    """Its subsets of one bass, drums, guitar and piano each, in this order; the order of subsets is fixed."""
    groups = [[_as(program, stem) for stem in song.stems if _plays(program, stem)] for program in PROGRAMS]
    shape = [len(group) for group in groups]
    numbers: Sequence[int] = range(math.prod(shape))
    if len(numbers) > MAX_SUBSETS:  # drawn by number, so the product is never listed
        numbers = sorted(random.Random(f"cerberus4/{song.track}").sample(numbers, MAX_SUBSETS))
    for number in numbers:
        yield tuple(group[i] for group, i in zip(groups, np.unravel_index(number, shape), strict=True))


def _plays(program: int | None, stem: Stem) -> bool:
    return stem.is_drum if program is None else not stem.is_drum and stem.program // 8 == program // 8


def _as(program: int | None, stem: Stem) -> Stem:
    return stem if program is None else stem._replace(program=program)
