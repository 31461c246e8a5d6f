"""MIDI files through SoundFonts: which pieces there are, in which split, and how they sound."""

import os
import struct

import numpy as np
import pytest

from music_synth import prepare_data
from music_synth.audio.soundfont import default_soundfont
from music_synth.data.datasets import reading
from music_synth.data.datasets.rendered import CORPUS, find_renderings
from music_synth.data.prepared import read_manifest
from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes, read_midi

pytestmark = pytest.mark.filterwarnings("ignore::music_synth.midi.smf.MidiWarning")
CUT = midi_bytes([Note(60, 90, 0, 0.0, 0.5), Note(61, 90, 0, 0.5, 1.0)])[:-12]


def song(number):
    return midi_bytes([Note(50 + (number * 7 + i) % 40, 90, number % 128, i / 2, i / 2 + 0.4) for i in range(3)])


def wad(lumps):
    body, directory = b"", b""
    for name, data in lumps:
        directory += struct.pack("<II8s", 12 + len(body), len(data), name)
        body += data
    return struct.pack("<4sII", b"PWAD", len(lumps), 12 + len(body)) + body + directory


@pytest.fixture
def folder(tmp_path):
    """Five pieces, one of them three times, another in a WAD archive; a file that is cut, and two that are none."""
    source = tmp_path / "music"
    (source / "more").mkdir(parents=True)
    for number in range(3):
        (source / f"song {number}.mid").write_bytes(song(number))
    (source / "more" / "song 0.MID").write_bytes(song(3))
    (source / "more" / "copy.kar").write_bytes(song(0))
    (source / "cut.rmi").write_bytes(CUT)
    (source / "text.mid").write_text("hello")
    (source / "zeros.wad").write_bytes(b"IWAD" + bytes(3))
    (source / "game.wad").write_bytes(wad([(b"D_ONE", song(4)), (b"D_TWO", song(0)), (b"D_BAD", b"MThd" + bytes(20))]))
    (source / "notes.txt").write_text("not looked at")
    return source


def test_every_piece_is_found_once_and_what_cannot_be_read_is_listed(folder):
    found = find_renderings([folder])
    assert sorted(item.id for item in found.recordings) == [
        "cut.TimGM6mb",
        "game.D_ONE.TimGM6mb",
        "game.D_TWO.TimGM6mb",  # song 0, which comes twice more
        "more.song_0.TimGM6mb",
        "song_1.TimGM6mb",
        "song_2.TimGM6mb",
    ]
    assert {item.split for item in found.recordings} == {"train", "validation", "test"}
    assert len(found.missing) == 3
    for name in ("text.mid", "zeros.wad", "game.wad, D_BAD"):
        assert any(name in line for line in found.missing)


def test_splits_hang_on_the_notes_alone(tmp_path):
    """No piece is in two splits, and none moves when others come or names, sounds and velocities change."""
    folders = tmp_path / "a", tmp_path / "b"
    for place in folders:
        place.mkdir()
    for number in range(60):
        (folders[0] / f"{number:02}.mid").write_bytes(song(number))
    quieter = [note._replace(velocity=30, program=5) for note in read_midi(song(0))]
    (folders[0] / "quieter.mid").write_bytes(midi_bytes(quieter))
    for number in range(30):
        (folders[1] / f"other{number}.mid").write_bytes(song(2 * number))
    first, second = (find_renderings([place]).recordings for place in folders)
    assert len({item.files[0] for item in first}) == len(first) <= 60
    splits = {bytes(item.files[0].read_bytes()): item.split for item in first}
    same = [splits[data] == item.split for item in second if (data := item.files[0].read_bytes()) in splits]
    assert all(same) and len(same) > 10
    counts = [sum(item.split == split for item in first) for split in ("train", "validation", "test")]
    assert counts[0] > 20 and min(counts) >= 1


def test_only_training_pieces_are_varied_and_each_has_every_soundfont(folder, tmp_path):
    other = tmp_path / "Other.sf2"
    os.symlink(default_soundfont(), other)
    found = find_renderings([folder], [default_soundfont(), other], variations=2)
    assert len({item.id for item in found.recordings}) == len(found.recordings)
    pieces = {}
    for item in found.recordings:
        pieces.setdefault((item.files[0], item.lump), []).append(item)
    for items in pieces.values():
        assert len({item.split for item in items}) == 1
        assert len(items) == (6 if items[0].split == "train" else 2)
        assert sum(not item.seed for item in items) == 2
    assert len({item.settings for item in found.recordings if item.seed}) == len(found.recordings) - 2 * len(pieces)
    again = find_renderings([folder], [default_soundfont(), other], variations=2, seed=1)
    assert not {item.settings for item in again.recordings} & {item.settings for item in found.recordings if item.seed}


def test_a_rendering_sounds_where_its_notes_are(folder):
    found = find_renderings([folder], variations=1)
    plain = next(item for item in found.recordings if item.id.startswith("song_1.") and not item.seed)
    notes, audio = CORPUS.read(plain)
    assert [(n.pitch, n.velocity, n.onset) for n in notes] == [(57, 90, 0.0), (58, 90, 0.5), (59, 90, 1.0)]
    assert audio.dtype == np.float32 and 0.01 < np.abs(audio).max() <= 0.99 and len(audio) > 1.4 * 16000
    assert notes == CORPUS.read_notes(plain) and reading.seconds(plain) == pytest.approx(1.4)
    np.testing.assert_array_equal(audio, CORPUS.read(plain).audio)
    for item in found.recordings:
        if item.seed:
            varied = CORPUS.read(item)
            assert varied.notes == CORPUS.read_notes(item)
            envelope = np.array([np.abs(varied.audio[int(16000 * n.onset) :][:3000]).max() for n in varied.notes])
            assert (envelope > 0.005).all()
            assert len(varied.audio) != len(audio)
            assert reading.seconds(item) == pytest.approx(max(n.offset for n in varied.notes), rel=1e-4)
            break
    else:
        pytest.fail("no training piece is varied")


def test_pieces_of_a_wad_and_cut_files_are_rendered(folder):
    with pytest.warns(UserWarning, match=r"cut\.rmi"):
        items = {item.id: item for item in find_renderings([folder]).recordings}
    assert [n.pitch for n in CORPUS.read(items["game.D_ONE.TimGM6mb"]).notes] == [78, 79, 80]
    assert [n.pitch for n in CORPUS.read(items["cut.TimGM6mb"]).notes] == [60]


def test_a_piece_that_is_too_long_is_left_out(tmp_path):
    (tmp_path / "long.mid").write_bytes(midi_bytes([Note(60, 90, 0, 0.0, 0.5), Note(60, 90, 0, 3700.0, 3700.5)]))
    (item,) = find_renderings([tmp_path]).recordings
    with pytest.raises(UserError, match="62 minutes; a piece may last 60"):
        CORPUS.read(item)


def test_what_is_asked_wrongly_is_one_clear_error(tmp_path):
    for arguments, message in (
        (([tmp_path / "no"],), "no such file or folder"),
        (([tmp_path], [tmp_path / "no.sf2"]), "no SoundFont at"),
        (([tmp_path], [], 1, ["colour"]), "unknown variation 'colour'"),
    ):
        with pytest.raises(UserError, match=message):
            find_renderings(*arguments)
    for flags, message in (
        (["maestro", "--soundfont=a.sf2"], "are for rendered"),
        (["maestro", "--source=a,b"], "has one"),
        (["rendered", "--variations=-1"], "--variations -1"),
        (["rendered", "--gain=0"], "--gain 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_data.main(flags)


def test_from_files_to_a_prepared_folder(folder, tmp_path, capsys):
    flags = ["--source", str(folder), "--data_dir", str(tmp_path / "data"), "--variations", "1", "--workers", "1"]
    prepare_data.main(["rendered", *flags, "--out", str(tmp_path / "prepared")])
    out = capsys.readouterr().out
    assert "text.mid" in out and "rendered is built" in out
    from music_synth.data import tasks

    tasks.register_tasks(names=["rendered"], data_dir=tmp_path / "data")
    pieces = {
        piece.id: piece for split in tasks.SPLITS for piece in tasks.pieces(tasks.registered("rendered"), split)
    }  # fmt: skip
    found = find_renderings([folder], variations=1)
    assert set(pieces) == {item.id for item in found.recordings}
    plain = next(item for item in found.recordings if item.id == "song_1.TimGM6mb")
    notes, audio = CORPUS.read(plain)
    assert pieces[plain.id].notes == notes
    np.testing.assert_allclose(pieces[plain.id].audio, audio, atol=0.6 / 32768)
    stored = [piece for split in read_manifest(tmp_path / "prepared").values() for piece in split]
    assert {piece.id for piece in stored} == set(pieces)
    assert {piece.timbre for piece in [*stored, *pieces.values()]} == {"TimGM6mb"}
