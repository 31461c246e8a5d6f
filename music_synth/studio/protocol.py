"""What page and server say to each other: JSON that is checked field by field, and binary frames.

A frame to the page is a header of 16 bytes, little-endian, and numbers:

    kind u8 (PCM, MEL, LIVE), voice u8, flags u16 (1: the first of a job, 2: the last), job u32, position u32, count u32

PCM and LIVE: int16 samples at 16 kHz from sample `position` on. MEL: uint8 [count, 128], 0 silence and 255 the loudest,
from frame `position` on.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar

import numpy as np

from music_synth.audio.io import audio_to_int16
from music_synth.audio.mel import MAX_LOG_MEL, MIN_LOG_MEL
from music_synth.errors import UserError
from music_synth.studio import limits

T = TypeVar("T")
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


def taken(must_be: str, is_right: Callable[[Any], bool], default: Any = MISSING, made: Callable = lambda v: v) -> Any:
    """Declares a field of a JSON object: what its value must be, what is made of it, and what it is if left out.

    The default `dict` stands for an empty one; where it is None, the value may be null.
    """
    absent = {"default_factory" if default is dict else "default": default}
    return field(**absent, metadata={"must_be": must_be, "is_right": is_right, "made": made})


def whole(least: int, most: int, default: Any = MISSING) -> Any:
    return taken(f"a whole number in {least} .. {most}", lambda v: type(v) is int and least <= v <= most, default)


def number(least: float, most: float, default: Any = MISSING) -> Any:
    right = f"a number in {least} .. {most}", lambda v: type(v) in (int, float) and least <= v <= most  # no NaN is
    return taken(*right, default, float)


def flag(default: Any = MISSING) -> Any:
    return taken("true or false", lambda v: isinstance(v, bool), default)


def text(default: Any = MISSING) -> Any:
    right = "a text of at most 200 characters"
    return taken(right, lambda v: isinstance(v, str) and len(v) <= 200 and not SURROGATES.search(v), default)


def choice(choices: Collection[str]) -> Any:
    return taken(f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices)


def some(most: int, made: Callable[[Any], Any]) -> Any:
    right = f"a list of at most {most}", lambda v: isinstance(v, list) and len(v) <= most
    return taken(*right, made=lambda v: tuple(map(made, v)))


def nested(kind: type, name: str) -> dict[str, Any]:
    """The metadata of a field that is an object itself."""
    return {"must_be": "an object", "is_right": lambda v: isinstance(v, dict), "made": lambda v: read(kind, v, name)}


def read(kind: type[T], value: Any, name: str) -> T:
    """Reads a JSON object, called `name` in messages, as a dataclass whose fields `taken` declares.

    ProtocolError names what is wrong: a field is missing, not what it must be, or unknown.
    """
    if not isinstance(value, dict):
        raise ProtocolError(f"{name} must be an object")
    declared: Any = kind
    left, given = dict(value), {}
    for one in fields(declared):
        if one.name not in left:
            if one.default is MISSING and one.default_factory is MISSING:
                raise ProtocolError(f"{name}.{one.name} is missing")
            continue
        found = left.pop(one.name)
        if found is not None or one.default is not None:
            if not one.metadata["is_right"](found):
                raise ProtocolError(f"{name}.{one.name} must be {one.metadata['must_be']}")
            given[one.name] = one.metadata["made"](found)
    if left:
        raise ProtocolError(f"{name} has no field {next(iter(left))[:40]!r}")
    return kind(**given)


@dataclass(frozen=True)
class PartEdit:
    """How a part of a piece is changed; None: as in the file."""

    program: int | None = whole(0, 127, None)
    drum: bool | None = flag(None)
    gain: float = number(-40.0, 20.0, 0.0)  # dB
    mute: bool = flag(False)
    solo: bool = flag(False)


def read_parts(value: dict[str, Any]) -> dict[int, PartEdit]:
    for name in value:
        if not (name.isascii() and name.isdigit() and len(name) <= 5):
            raise ProtocolError(f"edit.parts: {name[:20]!r} is no number of a part")
    return {int(name): read(PartEdit, part, "part") for name, part in value.items()}


@dataclass(frozen=True)
class Edit:
    """How a piece is changed."""

    parts: Mapping[int, PartEdit] = taken(
        "an object of at most 1000 parts", lambda v: isinstance(v, dict) and len(v) <= 1000, dict, read_parts
    )
    transpose: int = whole(-48, 48, 0)  # semitones, of what is not a drum
    tempo: float = number(0.25, 4.0, 1.0)  # times as fast

    def hears(self, part: int) -> bool:
        """Tells whether a part is heard: it is not mute, and where any are solo it is one of them."""
        own, alone = self.parts.get(part, PartEdit()), any(other.solo for other in self.parts.values())
        return not own.mute and (own.solo or not alone)


@dataclass(frozen=True)
class Voice:
    """What plays a piece. Of a decoder: which, and how it samples; None: as it was trained to."""

    kind: str = choice(KINDS)
    checkpoint: int = whole(0, 1000, 0)
    seed: int = whole(0, 2**32 - 1, 0)
    temperature: float | None = number(0.0, 2.0, None)
    steps: int | None = whole(1, 64, None)
    timbre: str = text("")  # what to sound like, of those that the decoder knows


@dataclass(frozen=True)
class Play:
    """A job: a piece as edited, by some voices, from a sample on."""

    job: int = whole(0, 2**32 - 1)
    piece: str = text()
    voices: tuple[Voice, ...] = some(limits.MAX_VOICES, lambda value: read(Voice, value, "voice"))
    edit: Edit = field(default=Edit(), metadata=nested(Edit, "edit"))
    selected: int = whole(0, limits.MAX_VOICES - 1, 0)  # the voice that is heard
    at: int = whole(0, MAX_SAMPLE, 0)  # sample
    change: bool = flag(False)  # goes on from what was heard, although notes before it have changed

    def __post_init__(self):
        if not self.voices:
            raise ProtocolError("voices: at least one")
        if self.selected >= len(self.voices):
            raise ProtocolError(f"message.selected must be a whole number in 0 .. {len(self.voices) - 1}")


@dataclass(frozen=True)
class Cursor:
    """Where the page is in a job, and the voice that is heard."""

    job: int = whole(0, 2**32 - 1)
    at: int = whole(0, MAX_SAMPLE)
    selected: int = whole(0, limits.MAX_VOICES - 1, 0)


@dataclass(frozen=True)
class Live:
    """Live mode is turned on, by a decoder and an instrument, or off (voice None)."""

    voice: Voice | None = field(default=None, metadata=nested(Voice, "voice"))
    program: int = whole(0, 127, 0)
    drum: bool = flag(False)

    def __post_init__(self):
        if self.voice is not None and self.voice.kind != "decoder":
            raise ProtocolError("live mode is played by a decoder")


@dataclass(frozen=True)
class Key:
    """A key goes down or up, heard at a sample of the live voice."""

    pitch: int = whole(0, 127)
    velocity: int = whole(0, 127)  # 0: up
    at: int = whole(0, MAX_SAMPLE)
    number: int = whole(0, 2**32 - 1, 0)


@dataclass(frozen=True)
class Stop:
    """What is being made for this client is not wanted any more."""


Message = Play | Cursor | Live | Key | Stop
MESSAGES: dict[str, type[Message]] = {"play": Play, "cursor": Cursor, "live": Live, "key": Key, "stop": Stop}


def read_message(text: str | bytes) -> Message:
    """Reads a message of the page. ProtocolError names what is wrong in it."""
    value = read_json(text)
    if not isinstance(value, dict):
        raise ProtocolError("message must be an object")
    kind = value.pop("type", None)
    if not isinstance(kind, str) or kind not in MESSAGES:
        raise ProtocolError(f"message.type must be one of {', '.join(MESSAGES)}")
    return read(MESSAGES[kind], value, "message")


def read_json(text: str | bytes) -> Any:
    """Parses JSON of bounded size and depth. ProtocolError if it is none."""
    if len(text) > limits.MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message has at most {limits.MAX_MESSAGE_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON ({error})") from None
