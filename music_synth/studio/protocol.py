"""What page and server say to each other: JSON that is checked field by field, and binary frames.

A frame to the page is a header of 16 bytes, little-endian, and numbers:

    kind u8 (PCM, MEL, LIVE), voice u8, flags u16 (1: the first of a job, 2: the last), job u32, position u32, count u32

PCM and LIVE: int16 samples at 16 kHz from sample `position` on. MEL: uint8 [count, 128], 0 silence and 255 the loudest,
from frame `position` on.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from music_synth.audio.io import audio_to_int16
from music_synth.audio.mel import MAX_LOG_MEL, MIN_LOG_MEL
from music_synth.errors import UserError
from music_synth.studio import limits

PCM, MEL, LIVE = 1, 2, 3
FIRST, LAST = 1, 2
HEADER = struct.Struct("<BBHIII")
KINDS = ("decoder", "soundfont", "recording")
MAX_SAMPLE = 1 << 31
SURROGATES = re.compile("[\ud800-\udfff]")  # which JSON can hold and UTF-8 cannot


class ProtocolError(UserError):
    """A message that means nothing. It is answered by its text, and changes nothing."""


# --- to the page -------------------------------------------------------------------------------------------------


def pcm_frame(job: int, voice: int, position: int, audio: np.ndarray, flags: int = 0, kind: int = PCM) -> bytes:
    """Packs audio [S] in [-1, 1]: the samples that an audio file of it would have."""
    samples = audio if audio.dtype == np.int16 else audio_to_int16(audio)
    return HEADER.pack(kind, voice, flags, job, position, len(samples)) + samples.astype("<i2").tobytes()


def mel_frame(job: int, voice: int, position: int, mel: np.ndarray) -> bytes:
    """Packs a log-mel [T, 128], for a picture."""
    level = np.clip((mel - MIN_LOG_MEL) / (MAX_LOG_MEL - MIN_LOG_MEL), 0.0, 1.0)
    return HEADER.pack(MEL, voice, 0, job, position, len(mel)) + np.round(level * 255).astype(np.uint8).tobytes()


# --- from the page -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartEdit:
    """How a part of a piece is changed; None: as in the file."""

    program: int | None = None
    drum: bool | None = None
    gain: float = 0.0  # dB
    mute: bool = False
    solo: bool = False


@dataclass(frozen=True)
class Edit:
    """How a piece is changed."""

    parts: Mapping[int, PartEdit] = field(default_factory=dict)
    transpose: int = 0  # semitones, of what is not a drum
    tempo: float = 1.0  # times as fast

    def hears(self, part: int) -> bool:
        """Tells whether a part is heard: it is not mute, and where any are solo it is one of them."""
        own, alone = self.parts.get(part, PartEdit()), any(other.solo for other in self.parts.values())
        return not own.mute and (own.solo or not alone)


@dataclass(frozen=True)
class Voice:
    """What plays a piece. Of a decoder: which, and how it samples; None: as it was trained to."""

    kind: str
    checkpoint: int = 0
    seed: int = 0
    temperature: float | None = None
    steps: int | None = None
    timbre: str = ""  # what to sound like, of those that the decoder knows


@dataclass(frozen=True)
class Play:
    """A job: a piece as edited, by some voices, from a sample on."""

    job: int
    piece: str
    edit: Edit
    voices: tuple[Voice, ...]
    selected: int  # the voice that is heard
    at: int  # sample
    change: bool  # goes on from what was heard, although notes before it have changed


@dataclass(frozen=True)
class Cursor:
    """Where the page is in a job, and the voice that is heard."""

    job: int
    at: int
    selected: int


@dataclass(frozen=True)
class Live:
    """Live mode is turned on, by a decoder and an instrument, or off (voice None)."""

    voice: Voice | None
    program: int
    drum: bool


@dataclass(frozen=True)
class Key:
    """A key goes down or up, heard at a sample of the live voice."""

    pitch: int
    velocity: int  # 0: up
    at: int
    number: int


@dataclass(frozen=True)
class Stop:
    """What is being made for this client is not wanted any more."""


Message = Play | Cursor | Live | Key | Stop


def read_message(text: str | bytes) -> Message:
    """Reads a message of the page. ProtocolError names what is wrong in it."""
    reader = Fields(read_json(text), "message")
    kind = reader.choice("type", ("play", "cursor", "live", "key", "stop"))
    if kind == "play":
        voices = tuple(read_voice(value) for value in reader.list("voices", limits.MAX_VOICES))
        if not voices:
            raise ProtocolError("voices: at least one")
        message: Message = Play(
            job=reader.whole("job", 0, 2**32 - 1),
            piece=reader.text("piece"),
            edit=read_edit(reader.take("edit", {})),
            voices=voices,
            selected=reader.whole("selected", 0, len(voices) - 1, 0),
            at=reader.whole("at", 0, MAX_SAMPLE, 0),
            change=reader.flag("change", False),
        )
    elif kind == "cursor":
        selected = reader.whole("selected", 0, limits.MAX_VOICES - 1, 0)
        message = Cursor(reader.whole("job", 0, 2**32 - 1), reader.whole("at", 0, MAX_SAMPLE), selected)
    elif kind == "live":
        voice = reader.take("voice", None)
        spec = None if voice is None else read_voice(voice)
        if spec is not None and spec.kind != "decoder":
            raise ProtocolError("live mode is played by a decoder")
        message = Live(spec, reader.whole("program", 0, 127, 0), reader.flag("drum", False))
    elif kind == "key":
        message = Key(
            reader.whole("pitch", 0, 127),
            reader.whole("velocity", 0, 127),
            reader.whole("at", 0, MAX_SAMPLE),
            reader.whole("number", 0, 2**32 - 1, 0),
        )
    else:
        message = Stop()
    reader.end()
    return message


def read_json(text: str | bytes) -> Any:
    """Parses JSON of bounded size and depth. ProtocolError if it is none."""
    if len(text) > limits.MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message has at most {limits.MAX_MESSAGE_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON ({error})") from None


def read_voice(value: Any) -> Voice:
    reader = Fields(value, "voice")
    voice = Voice(
        kind=reader.choice("kind", KINDS),
        checkpoint=reader.whole("checkpoint", 0, 1000, 0),
        seed=reader.whole("seed", 0, 2**32 - 1, 0),
        temperature=reader.number("temperature", 0.0, 2.0, None),
        steps=reader.whole("steps", 1, 64, None),
        timbre=reader.text("timbre", ""),
    )
    reader.end()
    return voice


def read_edit(value: Any) -> Edit:
    reader = Fields(value, "edit")
    parts = reader.take("parts", {})
    if not isinstance(parts, dict) or len(parts) > 1000:
        raise ProtocolError("edit.parts must be an object of at most 1000 parts")
    edits = {}
    for name, part in parts.items():
        if not (name.isascii() and name.isdigit() and len(name) <= 5):
            raise ProtocolError(f"edit.parts: {name[:20]!r} is no number of a part")
        edits[int(name)] = _read_part(part)
    edit = Edit(edits, reader.whole("transpose", -48, 48, 0), float(reader.number("tempo", 0.25, 4.0, 1.0) or 1.0))
    reader.end()
    return edit


def _read_part(value: Any) -> PartEdit:
    reader = Fields(value, "part")
    drum = reader.take("drum", None)
    if drum is not None and not isinstance(drum, bool):
        raise ProtocolError("part.drum must be true or false")
    part = PartEdit(
        program=reader.whole("program", 0, 127, None),
        drum=drum,
        gain=float(reader.number("gain", -40.0, 20.0, 0.0) or 0.0),
        mute=reader.flag("mute", False),
        solo=reader.flag("solo", False),
    )
    reader.end()
    return part


_NEEDED: Any = object()


class Fields:
    """The fields of a JSON object, taken one by one; what is left at the end is an error."""

    def __init__(self, value: Any, name: str):
        if not isinstance(value, dict):
            raise ProtocolError(f"{name} must be an object")
        self.left, self.name = dict(value), name

    def take(self, key: str, default: Any = _NEEDED) -> Any:
        if key not in self.left and default is _NEEDED:
            raise ProtocolError(f"{self.name}.{key} is missing")
        return self.left.pop(key, default)

    def whole(self, key: str, least: int, most: int, default: Any = _NEEDED) -> Any:
        value = self.take(key, default)
        if value is None and default is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise ProtocolError(f"{self.name}.{key} must be a whole number in {least} .. {most}")
        return value

    def number(self, key: str, least: float, most: float, default: Any = _NEEDED) -> float | None:
        value = self.take(key, default)
        if value is None and default is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise ProtocolError(f"{self.name}.{key} must be a number in {least} .. {most}")
        return float(value)

    def flag(self, key: str, default: Any = _NEEDED) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ProtocolError(f"{self.name}.{key} must be true or false")
        return value

    def text(self, key: str, default: Any = _NEEDED) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or len(value) > 200 or SURROGATES.search(value):
            raise ProtocolError(f"{self.name}.{key} must be a text of at most 200 characters")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.take(key)
        if not isinstance(value, str) or value not in choices:
            raise ProtocolError(f"{self.name}.{key} must be one of {', '.join(choices)}")
        return value

    def list(self, key: str, most: int) -> Sequence[Any]:
        value = self.take(key)
        if not isinstance(value, list) or len(value) > most:
            raise ProtocolError(f"{self.name}.{key} must be a list of at most {most}")
        return value

    def end(self) -> None:
        if self.left:
            raise ProtocolError(f"{self.name} has no field {next(iter(self.left))[:40]!r}")
