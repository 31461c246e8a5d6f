"""MIDI to audio through FluidSynth and a SoundFont: the sound of the embedded data set."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from music_synth.errors import UserError
from music_synth.midi import players, smf

RENDER_RATE = 44_100  # Hz; the rate of most SoundFont samples
GAIN = 0.8  # FluidSynth master gain: the pieces of our composer then peak between 0.2 and 0.8
BLOCK = 64  # samples; FluidSynth starts events only at multiples of it, so events are up to 0.73 ms off
MAX_TAIL = 6.0  # seconds; how long releases and reverb may ring after the last event
QUIET = 1e-4  # -80 dB; the tail ends with the first tenth of a second below it
REVERB_SEND = 40  # CC91 where the file sets none, General MIDI 2's default; FluidSynth's own is 0
REVERB = 91  # a controller
FINE_TUNE = 52  # a generator of SoundFonts, cents
MELODIC, DRUMS = 0, 1  # FluidSynth's types of channels
_SETUP = threading.Lock()  # FluidSynth fills its tables when the first synthesizer is made; rendering needs no lock


class Room(NamedTuple):
    """FluidSynth's reverb; the defaults are its own."""

    size: float = 0.2  # 0..1
    damp: float = 0.0  # 0..1, of high frequencies
    width: float = 0.5  # 0..100, of the stereo image
    level: float = 0.9  # 0..1


def default_soundfont() -> Path:
    """TimGM6mb.sf2 (General MIDI, 6 MB), which ships inside pretty_midi."""
    package = importlib.util.find_spec("pretty_midi")  # finds it without the cost of importing it
    if package is None or package.origin is None:
        raise UserError("no SoundFont: install pretty_midi, which holds TimGM6mb.sf2, or name a .sf2 file")
    return Path(package.origin).parent / "TimGM6mb.sf2"


def render_midi(
    midi: bytes | str | os.PathLike | smf.MidiFile,
    soundfont: str | os.PathLike | None = None,
    sample_rate: int = RENDER_RATE,
    reverb: bool | Room = True,
    gain: float = GAIN,
    tuning: float = 0.0,
) -> np.ndarray:
    """Plays a MIDI file from its first tick until the last release has rung out.

    Program changes, controllers and pitch bends act when they come; the channels that `players.Channel` takes for
    drums, channel 10 first, play the drum kit (bank 128). The same input gives the same samples. Time 0 of the MIDI
    file is sample 0. Threads may render side by side.

    Args:
      midi: the bytes of a MIDI file, or its path, or what was read from it.
      soundfont: a .sf2 or .sf3 file; the default is `default_soundfont()`.
      sample_rate: of the result, Hz. FluidSynth does not filter what it transposes: render at 44.1 kHz and
        resample, rather than ask for 16 kHz.
      reverb: a small room, or the one given; without it sounds end with their release.
      gain: FluidSynth's linear master gain. It is fixed, so that loudness means the same in every piece.
      tuning: cents above A = 440 Hz.

    Returns:
      Mono float32 [S], the mean of left and right. It is never clipped here, but loud files may exceed 1.

    Raises:
      UserError: FluidSynth, the SoundFont or the MIDI file is missing or cannot be read.
    """
    events = _timed_events(midi)
    fluidsynth = _import_fluidsynth()
    path = Path(soundfont) if soundfont is not None else default_soundfont()
    if not path.is_file():
        raise UserError(f"no SoundFont at {path}; give a .sf2 file")
    settings: dict[str, float] = {"synth.reverb.active": int(bool(reverb)), "synth.chorus.active": 0}
    settings["synth.dynamic-sample-loading"] = int(path.suffix.lower() == ".sf3")  # decoding all takes seconds
    if isinstance(reverb, Room):
        names = ("room-size", "damp", "width", "level")
        settings |= {f"synth.reverb.{name}": float(value) for name, value in zip(names, reverb, strict=True)}
    with _SETUP:
        synth = fluidsynth.Synth(gain=float(gain), samplerate=float(sample_rate), channels=16, **settings)
    try:
        if synth.sfload(str(path)) == fluidsynth.FLUID_FAILED:
            raise UserError(f"{path} is not a SoundFont that FluidSynth can read")
        return _play(_Device(synth, fluidsynth, tuning), fluidsynth, events, sample_rate)
    finally:
        synth.delete()


class _Device:
    """A synthesizer that takes the events of a MIDI file."""

    def __init__(self, synth: Any, fluidsynth: ModuleType, tuning: float):
        self.synth, self.library, self.tuning = synth, fluidsynth._fl, tuning
        self.library.fluid_synth_set_gen.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float]
        self.library.fluid_synth_set_channel_type.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
        self.channels = [players.Channel(number) for number in range(16)]
        self.reset(smf.GM)

    def reset(self, device: int) -> None:
        self.synth.system_reset()
        for channel in self.channels:
            channel.reset(device)
            self._set_type(channel)
            self.synth.program_change(channel.number, 0)
            self.synth.cc(channel.number, REVERB, REVERB_SEND)
            self._tune(channel)

    def _set_type(self, channel: players.Channel) -> None:
        kind = DRUMS if channel.is_drum else MELODIC
        self.library.fluid_synth_set_channel_type(self.synth.synth, channel.number, kind)

    def _tune(self, channel: players.Channel) -> None:
        if self.tuning:
            self.library.fluid_synth_set_gen(self.synth.synth, channel.number, FINE_TUNE, self.tuning)

    def send(self, event: smf.Event) -> None:
        _, kind, number, a, b = event
        channel = self.channels[number]
        if kind == smf.NOTE_ON and b > 0:
            self.synth.noteon(number, a, b)
        elif kind in (smf.NOTE_ON, smf.NOTE_OFF):
            self.synth.noteoff(number, a)
        elif kind == smf.CONTROL_CHANGE:
            if a == players.BANK:
                channel.bank = b
            self.synth.cc(number, a, b)
            if a == players.RESET_CONTROLLERS:
                self._tune(channel)  # FluidSynth forgets it
        elif kind == smf.PROGRAM_CHANGE:
            was_drum = channel.is_drum
            channel.change_program(a)
            if channel.is_drum != was_drum:
                self._set_type(channel)
            self.synth.program_change(number, a)
        elif kind == smf.PITCH_BEND:
            self.synth.pitch_bend(number, (b << 7 | a) - 8192)
        elif kind == smf.RHYTHM_PART:
            channel.set_rhythm_part(bool(a))
            self._set_type(channel)
            self.synth.program_change(number, channel.program)
        elif kind == smf.RESET:
            self.reset(a)

    def let_go(self) -> None:
        """Lets go what is down at the end of the file."""
        for number in range(16):
            self.synth.cc(number, players.SUSTAIN_CONTROL, 0)
            self.synth.all_notes_off(number)


def _play(device: _Device, fluidsynth: ModuleType, events: list, sample_rate: int) -> np.ndarray:
    write = _float_writer(fluidsynth)
    last = events[-1][0] if events else 0.0
    step = BLOCK * max(1, round(0.1 * sample_rate / BLOCK))  # a tenth of a second of tail
    stereo = np.zeros((2, int((last + MAX_TAIL) * sample_rate) + 2 * step), np.float32)
    position = 0
    for seconds, event in events:
        start = BLOCK * round(seconds * sample_rate / BLOCK)
        if start > position:
            write(device.synth, stereo, position, start - position)
            position = start
        device.send(event)
    device.let_go()
    end = position + int(MAX_TAIL * sample_rate)
    while position < end:
        write(device.synth, stereo, position, step)
        position += step
        if np.abs(stereo[:, position - step : position]).max() < QUIET:
            break
    return stereo[:, :position].mean(axis=0)


def _timed_events(midi: bytes | str | os.PathLike | smf.MidiFile) -> list[tuple[float, smf.Event]]:
    """All events of all tracks with their seconds, in order; the clock is that of the notes."""
    if isinstance(midi, smf.MidiFile):
        file = midi
    else:
        source = midi if isinstance(midi, bytes) else Path(midi)
        file = smf.load(source)
        smf.warn_of_problems(file, source)
    events = [event for _, event in players.in_order(file) if event.kind != smf.TEMPO]
    seconds = smf.tick_times(file, np.array([event.tick for event in events], np.int64))
    return list(zip(seconds.tolist(), events, strict=True))


def _import_fluidsynth():
    try:
        import fluidsynth
    except ModuleNotFoundError as error:
        raise UserError("rendering needs the package pyfluidsynth: pip install pyfluidsynth") from error
    except ImportError as error:
        raise UserError(
            "rendering needs the FluidSynth library: apt-get install libfluidsynth3 (macOS: brew install fluid-synth)"
        ) from error
    return fluidsynth


def _float_writer(fluidsynth):
    """FluidSynth's float output, which cannot clip; pyfluidsynth wraps only the 16-bit one."""
    function = fluidsynth._fl.fluid_synth_write_float
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, integer, pointer, integer, integer, pointer, integer, integer]
    function.restype = integer

    def write(synth, stereo: np.ndarray, position: int, length: int) -> None:
        left, right = stereo[0].ctypes.data, stereo[1].ctypes.data
        if function(synth.synth, length, left, position, 1, right, position, 1) != fluidsynth.FLUID_OK:
            raise RuntimeError("FluidSynth could not render")

    return write
