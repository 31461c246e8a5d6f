import math
import pickle
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile
import yaml

from music_synth.audio.io import read_audio, resample
from music_synth.data.datasets.slakh import BABY, CORPUS, SOUNDING_BASS, Song, Stem, class_program, sub_mixes
from music_synth.data.synthetic import PieceSpec, compose, render
from music_synth.errors import UserError
from music_synth.midi import smf
from music_synth.midi.notes import Note, Pedal, midi_bytes, read_midi
from music_synth.midi.tokenizer import SLAKH_PROGRAMS
from tests.data.datasets.raw_slakh import (
    BAND,
    band,
    write_babyslakh,
    write_slakh,
    write_track,
)

BAND_PROGRAMS = (0, 33, 29, 0, 48)  # of the classes of BAND's programs; drums have 0
OF_EACH_SIZE = {3: 0, 4: 1, 5: 6, 6: 10, 7: 10, 48: 10}  # stems: sub-mixes


@pytest.fixture(scope="module")
def pieces():
    """The five parts of a short band piece, each (MIDI bytes, audio)."""
    parts = {}
    for note in read_midi(compose(PieceSpec("x", "band", (26, 0, 48, 33), "slakh", 4.0)), as_published=True):
        parts.setdefault((note.is_drum, note.program), []).append(note._replace(instrument=0))
    midis = [midi_bytes(notes) for notes in parts.values()]
    assert len(midis) == 5
    return [(midi, render(midi)) for midi in midis]


@pytest.fixture(scope="module")
def root(pieces, tmp_path_factory):
    return write_slakh(tmp_path_factory.mktemp("download"), pieces)


@pytest.fixture
def song(pieces, tmp_path):
    """(root, the folder of its only track), to be damaged."""
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
    write_track(tmp_path / "test/Track01876", band(pieces), rate=16000)
    return tmp_path, tmp_path / "test/Track01876"


def stem(i, **changes):
    return Stem(f"S{i:02d}", "", "", 0, False, 0)._replace(**changes)


def rewrite(folder, change):
    """Lets `change` edit the metadata of a track."""
    metadata = yaml.safe_load((folder / "metadata.yaml").read_text())
    change(metadata)
    (folder / "metadata.yaml").write_text(yaml.safe_dump(metadata))


def expected_notes(folder, names):
    """The notes of stems of BAND by their place in `names`, as (onset, pitch) and so on, without order."""
    return Counter(
        note._replace(
            program=BAND_PROGRAMS[int(name[1:])], is_drum=BAND[int(name[1:])]["inst_class"] == "Drums", instrument=i
        )
        for i, name in enumerate(names)
        for note in read_midi(folder / "MIDI" / f"{name}.mid", as_published=True)
    )


def expected_audio(folder, names):
    sounds = [soundfile.read(folder / "stems" / f"{name}.flac", dtype="float32") for name in names]
    return resample(sum(sound for sound, _ in sounds), sounds[0][1], 16000)


def test_find_lists_splits_and_sub_mixes(root):
    recordings, missing = CORPUS.recordings_in(root)
    assert missing == []
    assert [(r.id, r.split) for r in recordings] == [
        *((f"Track00001-{i}", "train") for i in range(6)),  # of five stems there are six subsets of four or more
        *((f"Track00002-{i}", "train") for i in range(6)),
        ("Track01501", "validation"),
        ("Track01876", "test"),
    ]
    for r in recordings:
        names = [stem.name for stem in r.stems]
        folder = root / r.split / r.id[:10]
        assert names == sorted(names) and len(names) >= 4
        assert set(r.files) == {folder / "metadata.yaml"} | {
            folder / part for name in names for part in (f"MIDI/{name}.mid", f"stems/{name}.flac")
        }
        assert all(file.is_file() for file in r.files)
    assert [len(r.stems) for r in recordings[-2:]] == [5, 5], "validation and test hear the full mix"
    assert CORPUS.recordings_in(root.parent) == CORPUS.recordings_in(root), "or the folder that holds it"


def test_the_original_release_has_no_omitted_folder(root, tmp_path):
    shutil.copytree(root, tmp_path / "x", ignore=shutil.ignore_patterns("omitted"))
    assert [r.id for r in CORPUS.recordings_in(tmp_path / "x").recordings] == [
        r.id for r in CORPUS.recordings_in(root).recordings
    ]


@pytest.mark.parametrize("track", ["Track00001-0", "Track00002-3", "Track01501", "Track01876"])
def test_load_is_the_sum_of_stems_and_their_notes(root, track):
    recording = next(r for r in CORPUS.recordings_in(root).recordings if r.id == track)
    notes, audio = CORPUS.read(recording)
    folder = root / recording.split / track[:10]
    names = [stem.name for stem in recording.stems]
    assert Counter(notes) == expected_notes(folder, names)
    assert [n.onset for n in notes] == sorted(n.onset for n in notes)
    assert audio.dtype == np.float32
    np.testing.assert_allclose(audio, expected_audio(folder, names), atol=1e-5)
    if len(names) == 5:
        np.testing.assert_allclose(audio, read_audio(folder / "mix.flac"), atol=1e-4)  # 16 bits


def test_load_gives_the_music_that_was_written(root, pieces):
    """Not only what the files hold: the sound before resampling and rounding, but for a gain."""
    _, audio = CORPUS.read(CORPUS.recordings_in(root).recordings[-1])
    original = np.zeros(max(len(sound) for _, sound in pieces), np.float32)
    for _, sound in pieces:
        original[: len(sound)] += sound
    assert abs(len(audio) - len(original)) <= 1
    length = min(len(audio), len(original))
    assert np.corrcoef(audio[:length], original[:length])[0, 1] > 0.999


def test_load_in_another_process(root, tmp_path):
    recording = CORPUS.recordings_in(root).recordings[0]
    (tmp_path / "recording").write_bytes(pickle.dumps(recording))
    code = (
        "import pickle, sys; from pathlib import Path; from music_synth.data.datasets.slakh import CORPUS\n"
        "folder, root = map(Path, sys.argv[1:])\n"
        "loaded = CORPUS.read(pickle.loads((folder / 'recording').read_bytes()))\n"
        "(folder / 'loaded').write_bytes(pickle.dumps((loaded, CORPUS.recordings_in(root))))\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, root], check=True)
    (notes, audio), found = pickle.loads((tmp_path / "loaded").read_bytes())
    assert notes == CORPUS.read(recording).notes
    assert np.array_equal(audio, CORPUS.read(recording).audio)
    assert found == CORPUS.recordings_in(root), "the same sub-mixes, though strings hash otherwise there"


@pytest.mark.parametrize(("count", "expected"), OF_EACH_SIZE.items())
def test_sub_mixes_are_distinct_subsets(count, expected):
    song = Song("Track00007", "train", "", tuple(stem(i) for i in range(count)))
    mixes = sub_mixes(song)
    assert len(mixes) == len(set(mixes)) == expected == min(10, sum(math.comb(count, k) for k in range(4, count + 1)))
    assert all(len(mix) >= 4 and set(mix) <= set(song.stems) for mix in mixes)
    assert mixes == sub_mixes(song)


def test_sub_mixes_differ_between_songs_and_in_size():
    songs = [Song(f"Track{i:05d}", "train", "", tuple(stem(i) for i in range(20))) for i in range(300)]
    mixes = [mix for song in songs for mix in sub_mixes(song)]
    assert mixes[:10] != mixes[10:20]
    sizes = Counter(map(len, mixes))
    assert set(sizes) == set(range(4, 21)) and sizes[4] > 100 and sizes[12] > 100
    heard = Counter(stem for mix in mixes for stem in mix)
    assert min(heard.values()) > 0.9 * max(heard.values()), "no stem is preferred"


def test_class_programs():
    assert all(class_program(program) == program for program in SLAKH_PROGRAMS)
    assert {class_program(program) for program in range(96)} == set(SLAKH_PROGRAMS)
    assert all(class_program(program) // 8 == program // 8 for program in range(128)), "a family is never left"
    named = {7: 4, 2: 0, 15: 8, 25: 24, 28: 26, 39: 33, 45: 43, 49: 48, 54: 52, 59: 58, 63: 61, 65: 64, 79: 73, 95: 88}
    assert {program: class_program(program) for program in named} == named
    assert class_program(72) == 73, "a piccolo is a pipe, not the clarinet below it"
    assert class_program(104) == 104, "no class: itself"


def test_drums_are_what_the_metadata_says(song):
    """Neither the channel nor the program of the MIDI file has a say; and drums have no pedal."""
    root, folder = song
    notes = [Note(38, 90, 13, 0.5, 0.75), Note(42, 80, 13, 1.0, 1.25)]
    pedal = [Pedal(0.0, 0, 127), Pedal(2.0, 0, 0)]
    (folder / "MIDI/S03.mid").write_bytes(midi_bytes(notes, pedal))  # of the drums, on channel 1
    (folder / "MIDI/S00.mid").write_bytes(midi_bytes([note._replace(is_drum=True) for note in notes]))  # the piano
    loaded = CORPUS.read(CORPUS.recordings_in(root).recordings[0]).notes
    assert [n for n in loaded if n.instrument == 3] == [
        Note(38, 90, 0, 0.5, 0.75, True, 3), Note(42, 80, 0, 1.0, 1.25, True, 3)
    ]  # fmt: skip
    assert [n for n in loaded if n.instrument == 0] == [
        Note(38, 90, 0, 0.5, 0.75, False, 0), Note(42, 80, 0, 1.0, 1.25, False, 0)
    ]  # fmt: skip


def test_the_pedal_lengthens_notes_of_its_stem_only(song):
    root, folder = song
    note = Note(60, 90, 0, 0.5, 0.75)
    (folder / "MIDI/S00.mid").write_bytes(midi_bytes([note], [Pedal(0.1, 0, 127), Pedal(2.0, 0, 0)]))
    (folder / "MIDI/S04.mid").write_bytes(midi_bytes([note]))
    offsets = {n.instrument: n.offset for n in CORPUS.read(CORPUS.recordings_in(root).recordings[0]).notes}
    assert offsets[0] == 2.0 and offsets[4] == 0.75


def test_stems_that_are_not_there_are_neither_heard_nor_labeled(song):
    root, folder = song
    (folder / "stems/S01.flac").unlink()
    (folder / "MIDI/S04.mid").unlink()
    (recording,), missing = CORPUS.recordings_in(root)
    assert [stem.name for stem in recording.stems] == ["S00", "S02", "S03"]
    assert missing == [
        f"Track01876: no stems/S01.flac or .wav in {folder}",
        f"Track01876: no MIDI/S04.mid in {folder}",
    ]  # S05 was never rendered, so it is not missed
    notes, audio = CORPUS.read(recording)
    assert Counter(notes) == expected_notes(folder, ["S00", "S02", "S03"])
    np.testing.assert_allclose(audio, expected_audio(folder, ["S00", "S02", "S03"]), atol=1e-6)


def test_midi_of_a_stem_that_was_not_rendered_is_not_labeled(song):
    """There is more MIDI than audio in the download."""
    root, folder = song
    shutil.copy(folder / "MIDI/S00.mid", folder / "MIDI/S05.mid")
    (recording,), missing = CORPUS.recordings_in(root)
    assert missing == [] and [stem.name for stem in recording.stems] == ["S00", "S01", "S02", "S03", "S04"]


def test_songs_of_too_few_stems_are_named(song):
    root, folder = song
    shutil.copytree(folder, root / "train/Track00003")
    for name in ("S00", "S01"):
        (root / "train/Track00003/stems" / f"{name}.flac").unlink()
    shutil.rmtree(folder / "stems")
    recordings, missing = CORPUS.recordings_in(root)
    assert recordings == []
    assert [line for line in missing if "fewer" in line] == [
        f"Track00003: 3 stems with audio and MIDI in {root / 'train/Track00003'}, fewer than 4",
        f"Track01876: 0 stems with audio and MIDI in {folder}, fewer than 1",
    ]
    (folder / "metadata.yaml").unlink()
    assert CORPUS.recordings_in(root).missing[-1] == f"Track01876: no metadata.yaml in {folder}"


def test_find_reads_no_audio_and_no_folder_names_of_the_metadata(song):
    root, folder = song
    before = CORPUS.recordings_in(root)
    for file in (folder / "stems").glob("S*"):
        file.write_bytes(b"")
    rewrite(folder, lambda m: m.update(audio_dir="Volumes/data/manilow/Track00001/stems", midi_dir="Volumes/MIDI"))
    assert CORPUS.recordings_in(root) == before


def test_what_the_metadata_may_lack(song):
    root, folder = song
    before = CORPUS.recordings_in(root)

    def strip(metadata):
        for key in [key for key in metadata if key != "stems"]:
            del metadata[key]
        metadata["stems"] = {
            name: {key: info[key] for key in ("is_drum", "program_num")} for name, info in metadata["stems"].items()
        }
        del metadata["stems"]["S03"]["program_num"]  # of the drums
        metadata["stems"]["S05"] = {}  # not there

    rewrite(folder, strip)
    assert CORPUS.recordings_in(root) == before


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("S00", "is_drum", None, "is_drum of stem S00 is None, not true or false"),
        ("S00", "is_drum", "no", "is_drum of stem S00 is 'no', not true or false"),
        ("S01", "program_num", None, "program_num of stem S01 is None, not a number"),
        ("S01", "program_num", "Bass", "program_num of stem S01 is 'Bass', not a number"),
        ("S01", "program_num", True, "program_num of stem S01 is True, not a number"),
        ("S02", "program_num", 128, "program_num of stem S02 is 128, not 0 to 127"),
    ],
)
def test_what_the_metadata_must_have(song, name, key, value, message):
    root, folder = song

    def change(metadata):
        del metadata["stems"][name][key]
        if value is not None:
            metadata["stems"][name][key] = value

    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        CORPUS.recordings_in(root)
    assert str(error.value) == (
        f"{folder / 'metadata.yaml'}: {message}; unpack the archive again, or move the track's folder away"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"stems: {S00: [", "cannot be read as YAML"),
        (b"\xff\xfe", "cannot be read as YAML"),
        (b"", "does not list the track's stems"),
        (b"- stems", "does not list the track's stems"),
        (b"UUID: x", "does not list the track's stems"),
        (b"stems: {S00: piano}", "does not list the track's stems"),
    ],
)
def test_metadata_that_does_not_parse(song, text, message):
    root, folder = song
    (folder / "metadata.yaml").write_bytes(text)
    with pytest.raises(UserError, match=f"^{folder}/metadata.yaml {message}.*; unpack the archive again") as error:
        CORPUS.recordings_in(root)
    assert "\n" not in str(error.value)


def test_basses_sound_an_octave_below_their_labels(song):
    root, folder = song
    labels = read_midi(folder / "MIDI/S01.mid", as_published=True)
    published, mended = (
        corpus.read(corpus.recordings_in(root).recordings[0]).notes for corpus in (CORPUS, SOUNDING_BASS)
    )
    for notes, shift in ((published, 0), (mended, -12)):
        basses = sorted(n.pitch for n in notes if n.instrument == 1)
        assert basses == sorted(note.pitch + shift for note in labels)
        others = [n for n in notes if n.instrument != 1]
        assert Counter(others) == Counter(n for n in published if n.instrument != 1)


def test_one_bass_plugin_sounds_as_written(song):
    root, folder = song
    rewrite(folder, lambda m: m["stems"]["S01"].update(plugin_name="scarbee_jay_bass_slap_both.nkm"))
    assert SOUNDING_BASS.recordings_in(root) == CORPUS.recordings_in(root)
    rewrite(folder, lambda m: m["stems"]["S01"].pop("plugin_name"))
    CORPUS.recordings_in(root)
    with pytest.raises(UserError, match="plugin_name of stem S01 is None, not a name"):
        SOUNDING_BASS.recordings_in(root)


def test_a_track_in_two_splits(song):
    root, folder = song
    shutil.copytree(folder, root / "train/Track01876")
    with pytest.raises(UserError, match=r"^Track01876 is both in train and in test; move one away$"):
        CORPUS.recordings_in(root)


def test_wrong_folder(root, tmp_path):
    with pytest.raises(UserError, match="does not hold Slakh2100: train, validation, test not found"):
        CORPUS.recordings_in(tmp_path)
    with pytest.raises(UserError, match="does not hold Slakh2100"):
        CORPUS.recordings_in(root / "train")
    with pytest.raises(UserError, match="does not hold BabySlakh"):
        BABY.recordings_in(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "stems/S02.flac").unlink(), "no audio file at"),
        (lambda folder: (folder / "stems/S02.flac").write_bytes(b"fLaC"), "as audio"),
        (lambda folder: (folder / "MIDI/S02.mid").unlink(), "no such MIDI file"),
        (lambda folder: (folder / "MIDI/S02.mid").write_bytes(b"MThd"), "MIDI"),
        (lambda folder: (folder / "MIDI/S02.mid").write_bytes(smf.build([[]], 500)), "no notes in this MIDI file"),
        (
            lambda folder: soundfile.write(folder / "stems/S02.flac", np.zeros(1600), 16000),
            r"0\.10 s of audio for labels up to",
        ),
    ],
)
def test_stems_that_cannot_be_read(song, spoil, message):
    root, folder = song
    (recording,), _ = CORPUS.recordings_in(root)
    spoil(folder)
    with pytest.raises(
        UserError, match=f"^Track01876, stem S02: .*{message}.*; (unpack it again, or )?leave it out with --skip_bad$"
    ) as error:
        CORPUS.read(recording)
    assert "\n" not in str(error.value)


def test_nan_samples(song):
    root, folder = song
    (folder / "stems/S02.flac").unlink()
    soundfile.write(folder / "stems/S02.wav", np.full(160000, np.nan), 16000, subtype="FLOAT")
    (recording,), _ = CORPUS.recordings_in(root)
    with pytest.raises(UserError, match=r"^Track01876, stem S02: .*S02.wav holds samples that are NaN"):
        CORPUS.read(recording)


def test_bass_notes_that_would_be_below_the_lowest(song):
    root, folder = song
    (folder / "MIDI/S01.mid").write_bytes(midi_bytes([Note(5, 90, 33, 0.5, 0.75)]))
    corpus = SOUNDING_BASS
    with pytest.raises(UserError, match=r"^Track01876, stem S01: Note\(pitch=-7, .* out of range"):
        corpus.read(corpus.recordings_in(root).recordings[0])


def test_babyslakh(pieces, tmp_path):
    root = write_babyslakh(tmp_path, pieces)
    recordings, missing = BABY.recordings_in(tmp_path)
    assert missing == [] and BABY.recordings_in(root).recordings == recordings
    assert Counter(r.split for r in recordings) == {"train": 12, "validation": 2, "test": 2}
    assert [(r.id, r.split) for r in recordings[-4:]] == [
        ("Track00017", "validation"), ("Track00018", "validation"), ("Track00019", "test"), ("Track00020", "test")
    ]  # fmt: skip
    for recording in (recordings[0], recordings[-1]):
        names = [stem.name for stem in recording.stems]
        assert all(file.suffix == ".wav" for file in recording.files if file.parent.name == "stems")
        folder = root / recording.id[:10]
        notes, audio = BABY.read(recording)
        assert Counter(notes) == expected_notes(folder, names)
        sounds = [soundfile.read(folder / "stems" / f"{name}.wav", dtype="float32")[0] for name in names]
        np.testing.assert_allclose(audio, sum(sounds), atol=1e-6)
    write_track(root / "Track00021", band(pieces), rate=16000, suffix=".wav")
    with pytest.raises(UserError, match="Track00021 is not of BabySlakh"):
        BABY.recordings_in(root)
