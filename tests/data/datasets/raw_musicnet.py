"""Writes small folders like those that the archives of MusicNet and MusicNet-EM unpack into."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from music_synth.audio.io import resample
from music_synth.midi import smf
from music_synth.midi.notes import Note

RATE = 44100
FIELDS = ["start_time", "end_time", "instrument", "note", "start_beat", "end_beat", "note_value"]
# The instruments in the order of the paper: (number in labels, General MIDI program from 0).
INSTRUMENTS = {
    "piano": (1, 0),
    "violin": (41, 40),
    "cello": (43, 42),
    "viola": (42, 41),
    "clarinet": (72, 71),
    "bassoon": (71, 70),
    "horn": (61, 60),
    "oboe": (69, 68),
    "flute": (74, 73),
    "string bass": (44, 43),
    "harpsichord": (7, 6),
}
NUMBERS = {program: number for number, program in INSTRUMENTS.values()}
OFFICIAL_TEST = {"1759", "1819", "2106", "2191", "2298", "2303", "2382", "2416", "2556", "2628"}
METADATA = """id,composer,composition,movement,ensemble,source,transcriber,catalog_name,seconds
1727,Schubert,Piano Quintet in A major,2. Andante,Piano Quintet,European Archive,http://tirolmusic.blogspot.com/,OP114,447
1733,Schubert,Piano Sonata in A major,2. Andantino,Solo Piano,Museopen,Segundo G. Yogore,D959,546
1759,Schubert,Piano Sonata in C minor,3. Menuetto and Trio,Solo Piano,Museopen,Martin Charles Bucknall,D958,194
1819,Mozart,Serenade in E-flat major,4. Menuetto,Pairs Clarinet-Horn-Bassoon,Soni Ventorum Wind Quintet,Oliver Seely,K375,177
2118,Brahms,Clarinet Sonata No 1 in F minor,3. Allegretto grazioso,Accompanied Clarinet,Ben Redwine,clarinetinstitute,OP120NO1,232
2155,Brahms,String Sextet No 1 in B-flat major,"2. Andante, ma moderato",String Sextet,Carl Banner,harfesoft.de,OP18,606
2194,Bach,"WTK I, No 13: Prelude and Fugue in F-sharp major",1. Prelude,Solo Piano,Kimiko Ishizaka,www.bachcentral.com,BWV858,100
2532,Beethoven,Piano Sonata No 20 in C minor,1. Maestoso,Solo Piano,Neal O’Doan,piano-midi.de,OP111,548
"""  # noqa: E501  rows of the real file
METADATA_IDS = [line.split(",")[0] for line in METADATA.splitlines()[1:]]


def write_musicnet(folder: Path, pieces: Mapping[str, tuple[Sequence[Note], np.ndarray]]) -> Path:
    """Writes `musicnet/` in `folder` and returns its path. No metadata: that is another download.

    Args:
      pieces: id -> (notes of the 11 instruments, audio float32 [S] at 16 kHz). Official test recordings go to the
        folders for tests. Labels have no velocities, and times to the sample at 44.1 kHz: round(44100 * seconds).
    """
    root = folder / "musicnet"
    for part in ("train", "test"):
        for kind in ("data", "labels"):
            (root / f"{part}_{kind}").mkdir(parents=True, exist_ok=True)
    for id_, (notes, audio) in pieces.items():
        part = "test" if id_ in OFFICIAL_TEST else "train"
        path = root / f"{part}_data" / f"{id_}.wav"
        soundfile.write(path, resample(audio, 16000, RATE), RATE, subtype="FLOAT")
        with open(root / f"{part}_labels" / f"{id_}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(FIELDS)
            for note in sorted(notes, key=lambda note: note.onset):
                start, end = round(note.onset * RATE), round(note.offset * RATE)
                # "end_beat" is a length; both are as at 120 beats a minute
                beats = note.onset * 2, (note.offset - note.onset) * 2
                writer.writerow([start, end, NUMBERS[note.program], note.pitch, *beats, "Dotted Half"])
    return root


def write_musicnet_em(folder: Path, pieces: Mapping[str, Sequence[Note]]) -> Path:
    """Writes `musicnet_em/` in `folder` and returns its path.

    Args:
      pieces: id -> notes of one piece, with programs from 0. As in the real files, a program is a track of a channel
        of its own, there is no tempo, a tick is 1/960 s, and times are rounded down to it.
    """
    root = folder / "musicnet_em"
    root.mkdir(parents=True)
    for id_, notes in pieces.items():
        parts = defaultdict(list)
        for note in notes:
            parts[note.program].append(note)
        tracks = []
        for channel, (program, part) in enumerate(sorted(parts.items())):
            events = [smf.Event(0, smf.PROGRAM_CHANGE, channel, program, 0)]
            for note in part:
                events.append(smf.Event(int(note.onset * 960), smf.NOTE_ON, channel, note.pitch, note.velocity))
                events.append(smf.Event(int(note.offset * 960), smf.NOTE_OFF, channel, note.pitch, 0))
            tracks.append(sorted(events, key=lambda event: (event.tick, event.kind != smf.PROGRAM_CHANGE, event.kind)))
        (root / f"{id_}.mid").write_bytes(smf.build(tracks, 480))
    return root
