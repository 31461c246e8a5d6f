"""Archives unpack to what they held, or are refused in one line that names them."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from music_synth.data.datasets.archives import unpack, unpacked
from music_synth.errors import UserError

RNG = np.random.default_rng(0)
FILES = {
    "music/list.csv": b"split,midi_filename\n" * 40,
    "music/2018/a piece.midi": RNG.bytes(1500),
    "music/2018/a piece.wav": b"RIFF" + RNG.bytes(2000),
    "music/" + "long" * 30 + ".txt": b"name longer than a header of tar has room for",
    "music/empty": b"",
}
INNER = {name.removeprefix("music/"): content for name, content in FILES.items()}
COMPRESS = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tar_of(files, change=lambda info: None) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            opened.addfile(info, io.BytesIO(content))
    return made.getvalue()


def zip_of(files, method=zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return made.getvalue()


WHOLE = {kind: compress(tar_of(FILES)) for kind, compress in COMPRESS.items()} | {
    ".zip": zip_of(FILES),
    "-stored.zip": zip_of(FILES, zipfile.ZIP_STORED),
    "-bzip2.zip": zip_of(FILES, zipfile.ZIP_BZIP2),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".unpacked.json"
    }


def unpack_bytes(folder: Path, kind: str, data: bytes) -> dict[str, bytes]:
    archive = folder / f"music{kind}"
    archive.write_bytes(data)
    return contents(unpack(archive, folder / "out"))


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.filterwarnings("ignore:.*has no checksums")
def test_whole_archives(tmp_path, kind):
    assert unpack_bytes(tmp_path, kind, WHOLE[kind]) == (FILES if kind.startswith("-") else INNER)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"music{kind}".partition(".")[0]}


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A bit that flipped, a piece that is lost or comes twice, zeros, or an end that is missing."""
    first, last = sorted(rng.integers(0, len(data.rstrip(b"\0")), 2).tolist())  # not in the zeros that end a tar
    match rng.integers(8):
        case 0:
            return data[:first]
        case 1:
            return data[:first] + data[last:]
        case 2:
            return data[:last] + data[first:]
        case 3:
            return data[:first] + bytes(last - first) + data[last:]
        case _:
            changed = bytearray(data)
            changed[first] ^= 1 << rng.integers(8)
            return bytes(changed)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", WHOLE)
def test_damage_never_makes_other_files(tmp_path, kind, count):
    refused = 0
    for seed in range(count):
        folder = tmp_path / str(seed)
        folder.mkdir()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                made = unpack_bytes(folder, kind, damaged(WHOLE[kind], np.random.default_rng([seed])))
            except UserError as error:
                refused += 1
                assert str(folder / f"music{kind}") in str(error) and "\n" not in str(error), seed
                assert not list((folder / "out").iterdir()), seed
                continue
        if kind == ".tar":  # which has checksums of its headers alone
            assert any("has no checksums" in str(warning.message) for warning in told), seed
            assert sorted(map(len, made.values())) == sorted(map(len, INNER.values())), seed
            continue
        whole = FILES if kind.startswith("-") else INNER
        assert made in (whole, {f"music/{name}": content for name, content in whole.items()}), seed
    assert refused > count // 4


def with_flag(data: bytes, offset: int, value: int) -> bytes:
    """A zip of one file with a 16-bit field of both its headers replaced."""
    central = data.rindex(b"PK\x01\x02")
    changed = bytearray(data)
    struct.pack_into("<H", changed, 4 + offset, value)
    struct.pack_into("<H", changed, central + 6 + offset, value)
    return bytes(changed)


ONE = zip_of({"a.wav": FILES["music/list.csv"]})


def links_to(target: str, kind: bytes):
    def change(info):
        info.type, info.linkname, info.size = kind, target, 0

    return change


def bomb() -> bytes:
    """A tar of 2 GB of zeros in a few kilobytes, by streams of gzip that repeat."""
    info = tarfile.TarInfo("zeros")
    info.size = 2**31
    return gzip.compress(info.tobuf()) + gzip.compress(bytes(2**20)) * 2**11 + gzip.compress(bytes(1024))


def zip_link() -> bytes:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as opened:
        opened.writestr(info, "/etc/passwd")
    return made.getvalue()


@pytest.mark.parametrize(
    "kind, make, message",
    [
        (".zip", lambda: with_flag(ONE, 2, 1), r"at a\.wav: .*encrypted"),
        (".zip", lambda: with_flag(ONE, 4, 99), r"at a\.wav: .*not supported"),
        (".zip", lambda: with_flag(ONE, 2, 0x800), None),
        (".zip", lambda: zip_of({"../a.wav": b"x"}), r"at \.\./a\.wav: a path outside"),
        (".zip", lambda: zip_of({"/a.wav": b"x"}), r"at /a\.wav: a path outside"),
        (".zip", zip_link, "link is a link"),
        (".zip", lambda: b"no zip", "not a zip"),
        (".zip", lambda: zip_of({"n" * 300: b"x"}), "at nnn.*File name too long"),
        (".tar.gz", lambda: gzip.compress(tar_of({"../a.wav": b"x"})), r"at \.\./a\.wav: a path outside"),
        (".tar.gz", lambda: gzip.compress(tar_of({"a": b""}, links_to("/etc/passwd", tarfile.SYMTYPE))), "a is a link"),
        (".tar.gz", lambda: gzip.compress(tar_of({"a": b""}, links_to("b", tarfile.LNKTYPE))), "a is a link"),
        (".tar.gz", lambda: gzip.compress(tar_of({"a": b""}, links_to("", tarfile.CHRTYPE))), "a is a .*device"),
        (".tar.gz", lambda: gzip.compress(tar_of({"a": b"1"})[:1024] + tar_of({"a": b"2"})), "second file"),
        (".tar.gz", bomb, "at zeros: it would fill more than 100 times its size"),
        (".tar.gz", lambda: b"", "a header cannot be read: empty"),
        (".tar.gz", lambda: gzip.compress(tar_of(FILES)[:-10240]), "a header cannot be read"),
        (".tar.gz", lambda: gzip.compress(tar_of(FILES)) + b"more", "damaged"),
        (".tar.xz", lambda: lzma.compress(tar_of(FILES))[:-9], "damaged"),
        (".tar", lambda: tar_of(FILES) + bytes(2**20), "zeros follow"),
        (".rar", lambda: b"", "is no archive: its name must end in"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, kind, make, message):
    if message is None:
        assert unpack_bytes(tmp_path, kind, make()) == {"a.wav": FILES["music/list.csv"]}
        return
    with pytest.raises(UserError, match=message) as told:
        unpack_bytes(tmp_path, kind, make())
    assert f"music{kind}" in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {f"music{kind}", "out"}


def test_what_fills_the_disk_is_refused_before(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: os.terminal_size((1, 1)) and Room(100))
    with pytest.raises(UserError, match=r"cannot unpack .*music\.zip.* at music/list\.csv: No space left .* 800 bytes"):
        unpack_bytes(tmp_path, ".zip", WHOLE[".zip"])


class Room:
    def __init__(self, free):
        self.free = free


def test_another_archive_of_the_name_is_read_again(tmp_path):
    first, second = ({"a.wav": content, "b.wav": bytes(2**22)} for content in (b"cut", b"all"))
    archive = tmp_path / "music.zip"
    assert unpack_bytes(tmp_path, ".zip", zip_of(first)) == first
    made = (tmp_path / "out" / "music" / "a.wav").stat().st_mtime_ns
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "music" / "a.wav").stat().st_mtime_ns == made  # the same: not unpacked again
    assert unpack_bytes(tmp_path, ".zip", zip_of(second)) == second  # of equal size
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        unpack(archive, tmp_path / "out")
    assert contents(tmp_path / "out" / "music") == second  # what was whole is not lost to what is not
    # Nor is what nobody knows the origin of.
    (tmp_path / "out" / "music" / ".unpacked.json").write_text("{")
    assert unpack_bytes(tmp_path, ".zip", zip_of(first)) == first


def test_what_may_be_given(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        unpacked(tmp_path / "nowhere", (), tmp_path)
    assert unpacked(tmp_path, ("music.zip",), tmp_path / "out") == tmp_path
    (tmp_path / "music.zip").write_bytes(WHOLE[".zip"])
    assert unpacked(tmp_path, ("music.zip",), tmp_path / "out") == tmp_path / "out" / "music"
