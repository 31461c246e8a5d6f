"""MIDI files inside the WAD archives of Doom and its kin, such as Debian's `freedoom` (BSD-style license).

Written from the published description of the format: a header (magic, number of lumps, position of the directory;
little-endian), and a directory of (position, length, name of 8 bytes).
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

from music_synth.midi.smf import MAX_BYTES, MidiError, MidiWarning

MAGIC = (b"IWAD", b"PWAD")
MAX_WAD_BYTES = 1 << 30
MAX_LUMPS = 1 << 20
MUS = b"MUS\x1a"  # id Software's own format, which is not read


def is_wad(path: Path) -> bool:
    """Tells whether a file begins as a WAD archive does."""
    try:
        with path.open("rb") as file:
            return file.read(4) in MAGIC
    except OSError:
        return False


def read_wad(path: Path) -> dict[str, bytes]:
    """Reads the MIDI files of a WAD archive by the names of their lumps, in the archive's order.

    Warns where there is music in the MUS format, or a lump lies outside the file. Raises `MidiError` where the file is
    no WAD archive or its directory is damaged.
    """
    try:
        with path.open("rb") as file:
            header = file.read(12)
            if header[:4] not in MAGIC or len(header) < 12:
                raise MidiError(f"{path} is no WAD archive: it does not begin with IWAD or PWAD")
            count, start = struct.unpack("<II", header[4:])
            size = file.seek(0, 2)
            if count > MAX_LUMPS or start + 16 * count > size or size > MAX_WAD_BYTES:
                raise MidiError(f"{path}: damaged WAD archive: {count} lumps from byte {start} of {size}")
            file.seek(start)
            directory = list(struct.iter_unpack("<II8s", file.read(16 * count)))
            pieces: dict[str, bytes] = {}
            passed_over = []
            for position, length, name in directory:
                lump = name.split(b"\0")[0].decode("ascii", "replace")
                if length < 14 or length > MAX_BYTES:
                    continue
                file.seek(position)
                magic = file.read(4)
                if magic == MUS or (magic == b"MThd" and position + length > size):
                    passed_over.append(lump)
                elif magic == b"MThd":
                    pieces[lump] = magic + file.read(length - 4)  # as in the game, the last of a name counts
    except OSError as error:
        raise MidiError(f"{path} cannot be read ({error.strerror or error})") from error
    if passed_over:
        warnings.warn(
            f"{path}: music that is MUS or cut off: {', '.join(passed_over[:5])}: passed over", MidiWarning, 2
        )
    return pieces
