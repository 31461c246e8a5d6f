"""Reads TFRecord files, and the tf.train.Examples in them, feature by feature.

A file is a row of records: length (8 bytes), its checksum (4), content, its checksum (4). It is mapped, not read: what
is asked of a record is found by its place, and the rest is never touched. TensorFlow's reader takes a record whole,
and protobuf's makes Python floats of samples. No TensorFlow here.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 2**20  # bytes that are checked at a time


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("an empty file")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def framed(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yields where the content of each record begins and ends. ValueError: from here on the file cannot be read."""
    position, number = 0, 1
    while position < len(data):
        start = position + 12
        if start <= len(data) and _checksum(data, position, position + 8) != _integer(data[position + 8 : start]):
            raise ValueError(f"damaged where record {number} begins")
        end = start + _integer(data[position : position + 8])
        position, number = end + 4, number + 1
        if position > len(data):
            raise ValueError(f"cut off in record {number - 1}")
        yield start, end


def is_whole(data: mmap.mmap, start: int, end: int) -> bool:
    """Tells whether a record's content is what was written, by its checksum."""
    return _checksum(data, start, end) == _integer(data[end : end + 4])


def _integer(content: bytes) -> int:
    return int.from_bytes(content, "little")


def _checksum(data: mmap.mmap, start: int, end: int) -> int:
    """TFRecord's: CRC-32C, rotated and shifted."""
    import google_crc32c

    crc = 0
    for position in range(start, end, BLOCK):
        crc = google_crc32c.extend(crc, data[position : min(position + BLOCK, end)])
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Example:
    """The features of a tf.train.Example in [start, end) of a file. ValueError: it is none, or lacks what is asked."""

    BYTES, FLOATS, INTEGERS = 1, 2, 3  # the field of tf.train.Feature that says what it holds

    def __init__(self, data: mmap.mmap, start: int, end: int):
        self._data = data
        self._lists: dict[str, tuple[int, list[tuple[int, int]]]] = {}  # name: what it holds, and where
        for _, *features in _fields(data, start, end):
            for _, *entry in _fields(data, *features):
                parts = {number: place for number, *place in _fields(data, *entry)}  # 1: name, 2: Feature
                held = list(_fields(data, *parts.get(2, (0, 0))))  # one list, or nothing
                places = [(first, last) for _, *values in held for _, first, last in _fields(data, *values)]
                self._lists[data[slice(*parts.get(1, (0, 0)))].decode()] = held[0][0] if held else 0, places

    def names(self) -> frozenset[str]:
        return frozenset(self._lists)

    def strings(self, name: str) -> list[bytes]:
        return [self._data[first:last] for first, last in self._places(name, self.BYTES)]

    def string(self, name: str) -> bytes:
        first, last = self.place(name)
        return self._data[first:last]

    def place(self, name: str) -> tuple[int, int]:
        """Returns where in the file the one string of a feature lies."""
        places = self._places(name, self.BYTES)
        if len(places) != 1:
            raise ValueError(f"feature {name} has {len(places)} values, not one")
        return places[0]

    def floats(self, name: str) -> np.ndarray:
        """Reads float32 [S]."""
        parts = [
            np.frombuffer(self._data, "<f4", (last - first) // 4, first)
            for first, last in self._places(name, self.FLOATS)
        ]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def num_floats(self, name: str) -> int:
        return sum(last - first for first, last in self._places(name, self.FLOATS)) // 4

    def number(self, name: str) -> float:
        """Reads the one float or integer of a feature."""
        if self._lists.get(name, (0, []))[0] == self.INTEGERS:
            (first, _), *_ = self._places(name, self.INTEGERS)
            return _varint(self._data, first)[0]
        return float(self.floats(name)[0]) if self.num_floats(name) == 1 else math.nan

    def _places(self, name: str, holds: int) -> list[tuple[int, int]]:
        if name not in self._lists:
            raise ValueError(f"no feature {name}")
        held, places = self._lists[name]
        if places and held != holds:
            raise ValueError(f"feature {name} is of another type than in this data set")
        return places


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of the fields of a protobuf message; in an Example all begin with their length."""
    while start < end:
        tag, start = _varint(data, start)
        length, start = _varint(data, start)
        if tag % 8 != 2 or start + length > end:
            raise ValueError("not a tf.train.Example")
        yield tag // 8, start, start + length
        start += length


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """The number at `position`, seven bits a byte, and where it ends."""
    value = 0
    for place, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            return value, position + place + 1
    raise ValueError("not a tf.train.Example")
