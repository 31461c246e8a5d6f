"""Compares what `read_midi` hears in MIDI files with what FluidSynth's own player plays of them.

    apt-get install freedoom libfluidsynth3
    python scripts/compare_players.py /usr/share/games/doom/freedoom1.wad /usr/share/games/doom/freedoom2.wad

Sources are MIDI files, folders of them, and WAD archives. The note-ons that libfluidsynth's player sends (its own file
reader, tempo map and clock; nothing of this project) are matched with our notes of the same pitch and program: two
agree where their onsets differ by at most 10 ms. A line a file says how many do, and the end sums up; exit status 1
where any file differs. Drums are channel 10 on FluidSynth's side, whatever bank or system exclusive messages say.
At each tempo event the player goes on from a whole millisecond of its clock, so that it drifts in files with many of
them. Where onsets differ, they are compared again at the ticks that the player says it is at.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from music_synth import errors
from music_synth.errors import ArgumentParser, UserError
from music_synth.midi import smf
from music_synth.midi.notes import read_midi
from music_synth.midi.wad import is_wad, read_wad

TOLERANCE = 0.010  # seconds
RATE, BLOCK = 44100, 64  # FluidSynth's player looks at its clock once a block
DONE = 3  # a player's status
Key = tuple[int, int, bool]  # pitch, program, is_drum
HANDLER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class FluidPlayer:
    """libfluidsynth's player, with a synthesizer that makes no sound."""

    def __init__(self):
        name = ctypes.util.find_library("fluidsynth")
        if name is None:
            raise UserError("no FluidSynth library: apt-get install libfluidsynth3")
        self.library = ctypes.CDLL(name)
        for function, result, *arguments in (
            ("new_fluid_settings", "P"),
            ("fluid_settings_setnum", "i", "P", "s", "d"),
            ("new_fluid_synth", "P", "P"),
            ("delete_fluid_synth", "n", "P"),
            ("new_fluid_player", "P", "P"),
            ("delete_fluid_player", "n", "P"),
            ("fluid_player_add_mem", "i", "P", "s", "z"),
            ("fluid_player_set_playback_callback", "i", "P", "h", "P"),
            ("fluid_player_play", "i", "P"),
            ("fluid_player_get_status", "i", "P"),
            ("fluid_player_get_current_tick", "i", "P"),
            ("fluid_synth_write_float", "i", "P", "i", "P", "i", "i", "P", "i", "i"),
            ("fluid_midi_event_get_type", "i", "P"),
            ("fluid_midi_event_get_channel", "i", "P"),
            ("fluid_midi_event_get_key", "i", "P"),
            ("fluid_midi_event_get_velocity", "i", "P"),
            ("fluid_set_log_function", "P", "i", "P", "P"),
        ):
            kinds = {"P": ctypes.c_void_p, "i": ctypes.c_int, "s": ctypes.c_char_p, "d": ctypes.c_double}
            kinds |= {"n": None, "z": ctypes.c_size_t, "h": HANDLER}
            getattr(self.library, function).restype = kinds[result]
            getattr(self.library, function).argtypes = [kinds[kind] for kind in arguments]
        for level in range(5):
            self.library.fluid_set_log_function(level, None, None)
        settings = self.library.new_fluid_settings()
        self.library.fluid_settings_setnum(settings, b"synth.sample-rate", float(RATE))
        self.synth = self.library.new_fluid_synth(settings)

    def play(self, data: bytes) -> dict[Key, list[tuple[float, int]]]:
        """The onsets, in seconds and in ticks, of each (pitch, program, is_drum) of a MIDI file."""
        lib, onsets, programs, blocks = self.library, defaultdict(list), [0] * 16, 0

        def handle(_, event):
            kind, channel = lib.fluid_midi_event_get_type(event), lib.fluid_midi_event_get_channel(event)
            key, velocity = lib.fluid_midi_event_get_key(event), lib.fluid_midi_event_get_velocity(event)
            if kind == smf.PROGRAM_CHANGE and key < 128:
                programs[channel] = key
            elif kind == smf.NOTE_ON and key < 128 and velocity > 0:
                onset = blocks * BLOCK / RATE, lib.fluid_player_get_current_tick(player)
                onsets[key, programs[channel], channel == smf.DRUM_CHANNEL].append(onset)
            return 0

        handler = HANDLER(handle)
        player = lib.new_fluid_player(self.synth)
        try:
            lib.fluid_player_set_playback_callback(player, handler, None)
            lib.fluid_player_add_mem(player, data, len(data))
            lib.fluid_player_play(player)
            sound = ((ctypes.c_float * BLOCK) * 2)()
            while lib.fluid_player_get_status(player) != DONE and blocks * BLOCK < 24 * 3600 * RATE:
                lib.fluid_synth_write_float(self.synth, BLOCK, sound[0], 0, 1, sound[1], 0, 1)
                blocks += 1
        finally:
            lib.delete_fluid_player(player)
        return onsets


def pieces(sources: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of every MIDI file that files, folders and WAD archives hold."""
    for source in map(Path, sources):
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.suffix.lower() in smf.SUFFIXES and path.is_file():
                    yield str(path), path.read_bytes()
        elif is_wad(source):
            for lump, data in read_wad(source).items():
                yield f"{source.name}:{lump}", data
        elif source.is_file():
            yield str(source), source.read_bytes()
        else:
            raise UserError(f"no such file or folder: {source}")


def ours(data: bytes) -> dict[Key, list[float]]:
    onsets = defaultdict(list)
    for note in read_midi(data):
        onsets[note.pitch, note.program, note.is_drum].append(note.onset)
    return onsets


def match(theirs: list[float], ours: list[float]) -> tuple[int, float]:
    """How many onsets of one key agree, each with one of the other side, and the largest distance of these."""
    theirs, ours = sorted(theirs), sorted(ours)
    count, largest, i, j = 0, 0.0, 0, 0
    while i < len(theirs) and j < len(ours):
        distance = theirs[i] - ours[j]
        if abs(distance) <= TOLERANCE:
            count, largest = count + 1, max(largest, abs(distance))
        i, j = i + (distance <= TOLERANCE), j + (distance >= -TOLERANCE)
    return count, largest


def compare(theirs: dict[Key, list[float]], ours: dict[Key, list[float]]) -> tuple[int, float]:
    """How many notes agree, and the largest distance of these."""
    counts = [match(theirs.get(key, []), ours.get(key, [])) for key in theirs.keys() | ours.keys()]
    return sum(count for count, _ in counts), max((distance for _, distance in counts), default=0.0)


def main(argv: list[str]) -> None:
    parser = ArgumentParser(prog="compare_players", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", help="MIDI files, folders, WAD archives")
    flags = parser.parse_args(argv)
    player = FluidPlayer()
    files, by_clock, by_ticks, num_notes = 0, 0, 0, 0
    for name, data in pieces(flags.sources):
        files += 1
        played, heard, midi = player.play(data), {}, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                heard, midi = ours(data), smf.parse(data)
        except UserError as error:
            print(f"{name}: {error}")
        counts = [sum(map(len, notes.values())) for notes in (played, heard)]
        num_notes += counts[0]
        clock = {key: [seconds for seconds, _ in onsets] for key, onsets in played.items()}
        agree, furthest = compare(clock, heard)
        line = f"{name}: FluidSynth {counts[0]}, here {counts[1]}, agree {agree}, within {1000 * furthest:.1f} ms"
        by_clock += agree == counts[0] == counts[1]
        if agree < max(counts) and midi:
            ticks = {
                key: smf.tick_times(midi, np.array([tick for _, tick in onsets])).tolist()
                for key, onsets in played.items()
            }
            agree, furthest = compare(ticks, heard)
            line += f"; at its ticks {agree}, within {1000 * furthest:.1f} ms"
            by_ticks += agree == counts[0] == counts[1]
        print(line)
    print(f"{num_notes} notes: {by_clock} of {files} files agree by the player's clock, {by_ticks} more by its ticks")
    if by_clock + by_ticks < files:
        raise UserError(f"{files - by_clock - by_ticks} of {files} files differ")


if __name__ == "__main__":
    errors.run(main)
