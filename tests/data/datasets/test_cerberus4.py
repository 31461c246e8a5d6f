import itertools
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from music_synth.data.datasets.cerberus4 import CORPUS, MAX_SUBSETS, SOUNDING_BASS, quartets
from music_synth.data.datasets.slakh import Song, Stem
from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes, read_midi
from tests.data.datasets.raw_slakh import BAND, NOT_RENDERED, RawStem, write_slakh, write_track

PIANO, BASS, GUITAR, DRUMS, STRINGS = BAND
CLAVINET = PIANO | {"program_num": 7, "midi_program_name": "Clavinet", "plugin_name": "scarbee_clavinet_full.nkm"}
ORDER = (32, None, 24, 0)  # programs by instrument; None: drums


def tone(pitch: int) -> tuple[bytes, np.ndarray]:
    """Two notes and their sound, a sine at 16 kHz: this data set is about who plays with whom."""
    notes = [Note(pitch, 90, 77, 0.1, 0.5), Note(pitch + 2, 70, 77, 0.6, 1.5)]
    audio = np.zeros(24000, np.float32)
    for note in notes:
        time = np.arange(round(note.onset * 16000), round(note.offset * 16000))
        audio[time] = 0.2 * np.sin(2 * np.pi * 440 * 2 ** ((note.pitch - 69) / 12) * time / 16000)
    return midi_bytes(notes), audio


def write(root: Path, track: str, *parts: dict) -> Path:
    stems = {f"S{i:02d}": RawStem(info, *tone(45 + 5 * i)) for i, info in enumerate(parts)}
    write_track(root / track, stems, rate=16000)
    return root / track


@pytest.fixture
def root(tmp_path):
    """Songs: the four; two pianos and two guitars; no guitar; the four and strings; the four, omitted."""
    (tmp_path / "validation").mkdir()
    write(tmp_path, "train/Track00001", PIANO, BASS, GUITAR, DRUMS)
    write(tmp_path, "train/Track00002", GUITAR, DRUMS, PIANO, BASS, CLAVINET, GUITAR)
    write(tmp_path, "train/Track00003", PIANO, BASS, STRINGS, DRUMS)
    write(tmp_path, "test/Track01876", STRINGS, DRUMS, BASS, PIANO, GUITAR)
    write(tmp_path, "omitted/Track01939", PIANO, BASS, GUITAR, DRUMS)
    return tmp_path


def test_every_subset_of_one_each(root):
    recordings, missing = CORPUS.recordings_in(root)
    assert missing == []
    assert [(r.id, r.split) for r in recordings] == [
        ("Track00001-S01-S03-S02-S00", "train"),
        *((f"Track00002-S03-S01-{g}-{p}", "train") for g in ("S00", "S05") for p in ("S02", "S04")),
        ("Track01876-S02-S01-S04-S03", "test"),
    ]
    for r in recordings:
        assert [None if stem.is_drum else stem.program for stem in r.stems] == list(ORDER)
        assert len(r.files) == 9 and all(file.is_file() for file in r.files)


def test_programs_and_order_whatever_plays(root):
    """Bass, drums, guitar, piano are instruments 0 to 3; a clavinet is a piano."""
    recording = next(r for r in CORPUS.recordings_in(root).recordings if r.id == "Track00002-S03-S01-S05-S04")
    notes, audio = CORPUS.read(pickle.loads(pickle.dumps(recording)))
    folder = root / "train/Track00002"
    names = ("S03", "S01", "S05", "S04")
    assert Counter(notes) == Counter(
        note._replace(program=ORDER[i] or 0, is_drum=ORDER[i] is None, instrument=i)
        for i, name in enumerate(names)
        for note in read_midi(folder / "MIDI" / f"{name}.mid", as_published=True)
    )
    sounds = [soundfile.read(folder / "stems" / f"{name}.flac", dtype="float32")[0] for name in names]
    np.testing.assert_allclose(audio, sum(sounds), atol=1e-6)


def test_stems_without_files_take_no_part(root):
    folder = root / "train/Track00002"
    (folder / "stems/S05.flac").unlink()
    recordings, missing = CORPUS.recordings_in(root)
    assert [r.id for r in recordings if "Track00002" in r.id] == [
        "Track00002-S03-S01-S00-S02",
        "Track00002-S03-S01-S00-S04",
    ]
    assert missing == [f"Track00002: no stems/S05.flac or .wav in {folder}"]


def test_the_octave_of_basses(root):
    published, mended = (
        corpus.read(corpus.recordings_in(root).recordings[0]).notes for corpus in (CORPUS, SOUNDING_BASS)
    )
    assert [(n.instrument, n.pitch - m.pitch) for n, m in zip(published, mended, strict=True)].count((0, 12)) == 2
    assert sum(n != m for n, m in zip(published, mended, strict=True)) == 2


def test_songs_with_very_many_subsets_give_a_hundred():
    """Drawn by the name of the track alone, evenly; 48 stems would make 20,736."""
    programs = [PIANO, BASS, GUITAR, DRUMS] * 12
    stems = tuple(
        Stem(f"S{i:02d}", Path(), Path(), 0 if info is DRUMS else info["program_num"], info["is_drum"], 0)
        for i, info in enumerate(programs)
    )
    song = Song("Track00009", "train", Path(), stems)
    subsets = list(quartets(song))
    assert len(subsets) == len(set(subsets)) == MAX_SUBSETS
    assert subsets == list(quartets(song))
    assert subsets != list(quartets(song._replace(track="Track00010")))
    assert min(Counter(stem.name for subset in subsets for stem in subset).values()) >= 1
    few = song._replace(stems=stems[:40])  # 10 of each are too many still; 3 of each are not
    assert len(list(quartets(few))) == MAX_SUBSETS
    some = [[stem.name for stem in subset] for subset in quartets(song._replace(stems=stems[:12]))]
    assert some == [
        [f"S{4 * i + place:02d}" for i, place in zip(choice, (1, 3, 2, 0), strict=True)]
        for choice in itertools.product(range(3), repeat=4)
    ]


def test_reads_what_slakh_reads(root, tmp_path):
    midi, audio = tone(60)
    download = write_slakh(tmp_path / "download", [(midi, audio)] * 5)
    assert Counter(r.split for r in CORPUS.recordings_in(download.parent).recordings) == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    write_track(
        root / "validation/Track01502", {"S00": RawStem(PIANO, midi, audio), "S01": RawStem(NOT_RENDERED, None, None)}
    )
    assert not any(r.split == "validation" for r in CORPUS.recordings_in(root).recordings)


def test_bad_input(root, tmp_path_factory):
    with pytest.raises(UserError, match="does not hold Cerberus4 of Slakh2100: train, validation, test not found"):
        CORPUS.recordings_in(tmp_path_factory.mktemp("empty"))
    recording = CORPUS.recordings_in(root).recordings[0]
    soundfile.write(root / "train/Track00001/stems/S03.flac", np.zeros(16), 16000)
    with pytest.raises(
        UserError, match=r"^Track00001-S01-S03-S02-S00, stem S03: 0\.00 s of audio for labels up to 1\.50 s"
    ):
        CORPUS.read(recording)
    shutil.rmtree(root / "train/Track00001/stems")
    with pytest.raises(UserError, match=r"^Track00001-S01-S03-S02-S00, stem S01: no audio file at .*--skip_bad$"):
        CORPUS.read(recording)
    (root / "train/Track00001/metadata.yaml").write_text("stems: [")
    with pytest.raises(UserError, match=r"Track00001/metadata.yaml cannot be read as YAML"):
        CORPUS.recordings_in(root)
