import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from music_synth.audio.io import resample
from music_synth.data import synthetic
from music_synth.data.datasets import guitarset
from music_synth.data.datasets.guitarset import CORPUS
from music_synth.errors import UserError
from music_synth.midi.notes import Note, read_midi, trim_overlaps
from tests.data.datasets.raw_guitarset import EXCERPTS, MIX_LEVEL, SECONDS_LATE, write_guitarset

MICROSECOND = 1e-6


@pytest.fixture(scope="module")
def pieces():
    """(MIDI bytes, audio) for each excerpt: two short ones for guitar from the composer, in turn."""
    specs = [synthetic.PieceSpec(name, "guitar", (24,), name, 2.0) for name in "ab"]
    made = [(midi, audio) for _, midi, audio in synthetic.make_pieces(specs)]
    return [made[index % 2] for index in range(len(EXCERPTS))]


@pytest.fixture(scope="module")
def raw(pieces, tmp_path_factory):
    """The unpacked download and what is in it."""
    folder = tmp_path_factory.mktemp("guitarset")
    return folder, write_guitarset(folder, pieces)


@pytest.fixture
def one(tmp_path):
    """An excerpt of a single note on the lowest string, to be damaged."""
    audio = (0.1 * np.sin(np.arange(16000) / 10)).astype(np.float32)
    write_guitarset(tmp_path, [([Note(50, 80, 0, 0.25, 0.75)], audio)])
    return tmp_path


def edit(folder, change, excerpt=EXCERPTS[0]):
    """Changes the JAMS of an excerpt: `change` gets its note_midi annotations, lowest string first."""
    path = folder / "annotation" / f"{excerpt}.jams"
    jams = json.loads(path.read_text())
    change([annotation for annotation in jams["annotations"] if annotation["namespace"] == "note_midi"])
    path.write_text(json.dumps(jams))


def row(time, duration, value):
    return {"time": time, "duration": duration, "value": value, "confidence": None}


def by_id(found):
    return {recording.id: recording for recording in found.recordings}


def assert_same_notes(notes, expected):
    """Equal, with times to a microsecond: files hold durations, not ends."""

    def order(note):
        return (round(note.onset, 6), note.pitch, note.instrument)

    notes, expected = sorted(notes, key=order), sorted(expected, key=order)
    assert [n._replace(onset=0, offset=0) for n in notes] == [n._replace(onset=0, offset=0) for n in expected]
    for attribute in ("onset", "offset"):
        times = [[getattr(note, attribute) for note in part] for part in (notes, expected)]
        np.testing.assert_allclose(*times, atol=MICROSECOND, rtol=0)


def test_find_lists_every_excerpt_twice(raw):
    folder, _ = raw
    found = CORPUS.recordings_in(folder)
    assert found.missing == []
    ids = [f"{excerpt}_{kind}" for excerpt in sorted(EXCERPTS) for kind in ("mic", "mix")]
    assert [recording.id for recording in found.recordings] == ids
    recording = by_id(found)["00_BN1-129-Eb_comp_mix"]
    assert recording.files == (
        folder / "annotation" / "00_BN1-129-Eb_comp.jams",
        folder / "audio_mono-pickup_mix" / "00_BN1-129-Eb_comp_mix.wav",
    )
    assert all(path.is_file() for recording in found.recordings for path in recording.files)


def test_third_progressions_are_validation(raw):
    splits = {recording.id.rsplit("_", 1)[0]: recording.split for recording in CORPUS.recordings_in(raw[0]).recordings}
    assert splits == {
        "00_BN1-129-Eb_comp": "train",
        "02_Funk2-119-G_comp": "train",
        "03_Rock3-117-Bb_solo": "validation",
        "04_BN3-154-E_comp": "validation",
        "04_Jazz1-200-B_comp": "train",
        "05_SS2-107-Ab_solo": "train",
    }


def test_the_whole_corpus_has_480_and_240_items(tmp_path):
    """By names alone: two lead sheets for each style and progression, six players, comp and solo."""
    keys = ("C#", "Eb")
    for player in range(6):
        for style in ("BN", "Funk", "Jazz", "Rock", "SS"):
            for number in range(6):
                for mode in ("comp", "solo"):
                    name = f"{player:02}_{style}{number // 2 + 1}-{100 + number}-{keys[number % 2]}_{mode}"
                    for end in (".jams", "_mic.wav", "_mix.wav", "_hex.wav"):
                        (tmp_path / (name + end)).touch()
    found = CORPUS.recordings_in(tmp_path)  # empty files: audio and labels are not read
    splits = [recording.split for recording in found.recordings]
    assert (splits.count("train"), splits.count("validation"), len(splits)) == (480, 240, 720)
    assert len(by_id(found)) == 720 and not found.missing
    assert not any("," in name or " " in name for name in by_id(found))


@pytest.mark.parametrize("below", [".", "GuitarSet"])
@pytest.mark.parametrize("in_folders", [True, False])
def test_either_way_of_unpacking(tmp_path, below, in_folders):
    audio = np.zeros(16000, np.float32)
    notes = [Note(50, 80, 0, 0.25, 0.75)]
    write_guitarset(tmp_path / below, [(notes, audio), (notes, audio)], in_folders=in_folders)
    found = CORPUS.recordings_in(tmp_path)
    assert len(found.recordings) == 4 and not found.missing
    for recording in found.recordings:
        assert len(CORPUS.read(recording).notes) == 1


@pytest.mark.parametrize("excerpt", EXCERPTS)
def test_load_gives_the_notes_that_sound(raw, pieces, excerpt):
    """Among them excerpts whose labels are late and one with a pluck labelled twice: all come out as they sound."""
    folder, made = raw
    recording = by_id(CORPUS.recordings_in(folder))[f"{excerpt}_mic"]
    loaded = CORPUS.read(recording)
    assert_same_notes(loaded.notes, made[excerpt][0])
    assert {(n.program, n.velocity, n.is_drum) for n in loaded.notes} == {(24, 100, False)}
    # The writer's strings aside, these are the notes of the MIDI file.
    played = sorted((n.onset, n.pitch) for n in read_midi(pieces[EXCERPTS.index(excerpt)][0], as_published=True))
    np.testing.assert_allclose(sorted((n.onset, n.pitch) for n in loaded.notes), played, atol=MICROSECOND)


def test_load_gives_the_audio_of_its_recording(raw):
    folder, made = raw
    recordings = by_id(CORPUS.recordings_in(folder))
    audio = made[EXCERPTS[0]][1]
    there_and_back = resample(resample(audio, 16000, 44100), 44100, 16000)
    for kind, level in (("mic", 1.0), ("mix", MIX_LEVEL)):
        loaded = CORPUS.read(recordings[f"{EXCERPTS[0]}_{kind}"]).audio
        assert loaded.dtype == np.float32 and abs(len(loaded) - len(audio)) <= 1
        np.testing.assert_allclose(loaded, level * there_and_back, atol=2 / 32768)
        # Nor is it far from what was rendered, besides what resampling takes from the highest octave.
        size = min(len(audio), len(loaded))
        error = np.sqrt(np.mean((loaded[:size] - level * audio[:size]) ** 2))
        assert error < 0.01 * level * np.sqrt(np.mean(audio**2))


@pytest.mark.parametrize("excerpt", SECONDS_LATE)
def test_late_labels_are_late_in_the_file(raw, excerpt):
    """What the test above rests on: the file says the later time, the reader the earlier."""
    folder, _ = raw
    path, _ = by_id(CORPUS.recordings_in(folder))[f"{excerpt}_mix"].files
    annotations = json.loads(path.read_text())["annotations"]
    first = min(row["time"] for a in annotations if a["namespace"] == "note_midi" for row in a["data"])
    loaded = CORPUS.read(by_id(CORPUS.recordings_in(folder))[f"{excerpt}_mix"])
    assert first - loaded.notes[0].onset == pytest.approx(SECONDS_LATE[excerpt], abs=MICROSECOND)


def test_a_late_first_note_does_not_begin_before_the_audio(tmp_path):
    audio = np.zeros(16000, np.float32)
    write_guitarset(tmp_path, [([Note(50, 80, 0, 0.0, 0.5)], audio)], ["04_Jazz1-200-B_comp"])
    edit(tmp_path, lambda strings: strings[0]["data"][0].update(time=0.3087), "04_Jazz1-200-B_comp")
    note = CORPUS.read(CORPUS.recordings_in(tmp_path).recordings[0]).notes[0]
    assert (note.onset, note.offset) == (0.0, 0.5)


def test_only_the_known_pluck_is_dropped(tmp_path):
    """Of GuitarSet issue 4, the longer label stays; other excerpts and other notes keep what they say."""
    issue = [row(10.860365532879541, 0.243809523809432, 50.063616568428756)]
    issue += [row(10.860546938775315, 0.06965986394561696, 50.08643818571459)]
    others = [row(11.2, 0.1, 50.1), row(11.2005, 0.3, 52.0), row(11.6, 0.1, 50.1)]
    audio = np.zeros(16000 * 12, np.float32)
    excerpts = ["02_Funk2-119-G_comp", "02_Funk2-119-G_solo"]
    write_guitarset(tmp_path, [([Note(50, 80, 0, 0.1 * i, 0.1 * i + 0.5) for i in range(3)], audio)] * 2, excerpts)
    for excerpt in excerpts:
        edit(tmp_path, lambda strings: strings[2].update(data=issue + others), excerpt)
    loaded = [CORPUS.read(by_id(CORPUS.recordings_in(tmp_path))[f"{excerpt}_mic"]) for excerpt in excerpts]
    mended, as_is = ([n for n in each.notes if n.instrument == 2] for each in loaded)
    assert [n.onset for n in mended] == [10.860365532879541, 11.2, 11.2005, 11.6]
    assert mended[0].pitch == 50 and mended[0].offset == pytest.approx(11.104175056689)
    assert len(as_is) == 5


def test_one_pitch_on_two_strings_is_for_training_to_trim(one):
    def overlap(strings):
        strings[0]["data"] = [row(0.2, 0.6, 55.02)]
        strings[1]["data"] = [row(0.5, 0.4, 54.97)]

    edit(one, overlap)
    notes = CORPUS.read(CORPUS.recordings_in(one).recordings[0]).notes
    assert [(n.pitch, n.onset, n.offset, n.instrument) for n in notes] == [(55, 0.2, 0.8, 0), (55, 0.5, 0.9, 1)]
    assert CORPUS.trim
    assert [(n.onset, n.offset) for n in trim_overlaps(notes)] == [(0.2, 0.5), (0.5, 0.9)]


def test_load_in_another_process(raw):
    """From a pickle, without TensorFlow and without the jams package."""
    recording = CORPUS.recordings_in(raw[0]).recordings[0]
    code = (
        "import pickle, sys\n"
        "from music_synth.data.datasets.guitarset import CORPUS\n"
        "loaded = CORPUS.read(pickle.loads(sys.stdin.buffer.read()))\n"
        "print(len(loaded.notes), len(loaded.audio), {'tensorflow', 'jams'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(recording), capture_output=True, check=True
    )
    loaded = CORPUS.read(recording)
    assert result.stdout.decode().split(maxsplit=2)[:2] == [str(len(loaded.notes)), str(len(loaded.audio))]
    assert "tensorflow" not in result.stdout.decode() and "jams" not in result.stdout.decode()


def test_missing_files_are_listed(one):
    name = EXCERPTS[0]
    (one / "audio_mono-mic" / f"{name}_mic.wav").unlink()
    found = CORPUS.recordings_in(one)
    assert [recording.id for recording in found.recordings] == [f"{name}_mix"]
    assert found.missing == [f"{name}: no {name}_mic.wav (from audio_mono-mic.zip)"]
    soundfile.write(one / "audio_mono-mic" / "05_SS3-98-C_solo_mic.wav", np.zeros(100), 44100)
    assert "05_SS3-98-C_solo: no 05_SS3-98-C_solo.jams (from annotation.zip)" in CORPUS.recordings_in(one).missing


@pytest.mark.parametrize("make", ["nothing", "empty", "audio only"])
def test_wrong_folder(tmp_path, make):
    folder = tmp_path / "wrong"
    if make != "nothing":
        folder.mkdir()
    if make == "audio only":
        (folder / "00_BN1-129-Eb_comp_mic.wav").touch()
        (folder / "._00_BN1-129-Eb_comp.jams").touch()
    with pytest.raises(UserError, match=r"wrong does not hold GuitarSet 1\.1\.0.*unpack annotation\.zip"):
        CORPUS.recordings_in(folder)


def test_unknown_style(one):
    (one / "annotation" / "00_Metal1-200-E_comp.jams").touch()
    with pytest.raises(UserError, match=r"00_Metal1-200-E_comp\.jams is not named like"):
        CORPUS.recordings_in(one)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


DAMAGED_LABELS = {
    "cut off": cut,
    "gone": lambda path: path.unlink(),
    "not JSON": lambda path: path.write_bytes(b"\xff\xfe\x00time,pitch"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "other annotations": lambda path: path.write_text('{"annotations": [{"namespace": "chord", "data": []}]}'),
    "a number": lambda path: path.write_text('{"annotations": 3}'),
    "no namespace": lambda path: path.write_text('{"annotations": [{"data": []}]}'),
}
DAMAGED_ROWS = {
    "no value": {"time": 0.1, "duration": 0.1},
    "no pitch": row(0.1, 0.1, None),
    "words": row("early", 0.1, 50.0),
    "NaN pitch": row(0.1, 0.1, float("nan")),
    "endless pitch": row(0.1, 0.1, float("inf")),
    "NaN time": row(float("nan"), 0.1, 50.0),
    "too high": row(0.1, 0.1, 127.6),
    "negative fret": row(0.1, 0.1, -3.0),
    "no length": row(0.1, 0.0, 50.0),
    "backwards": row(0.5, -0.2, 50.0),
    "before the start": row(-0.1, 0.3, 50.0),
    "after the audio": row(2.5, 0.1, 50.0),
    "a list": [0.1, 0.1, 50.0],
}


@pytest.mark.parametrize("damage", DAMAGED_LABELS)
def test_damaged_labels(one, damage):
    recording = CORPUS.recordings_in(one).recordings[0]
    DAMAGED_LABELS[damage](recording.files[0])
    with pytest.raises(UserError, match=rf"{EXCERPTS[0]}_mic: .*--skip_bad") as caught:
        CORPUS.read(recording)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGED_ROWS)
def test_damaged_rows(one, damage):
    edit(one, lambda strings: strings[3].update(data=[DAMAGED_ROWS[damage]]))
    with pytest.raises(UserError, match=rf"{EXCERPTS[0]}_mic: .*--skip_bad"):
        CORPUS.read(CORPUS.recordings_in(one).recordings[0])


def test_no_notes_or_a_string_short(one):
    recording = CORPUS.recordings_in(one).recordings[0]
    edit(one, lambda strings: strings[0].update(data=[]))
    with pytest.raises(UserError, match=r"_mic: no notes.*--skip_bad"):
        CORPUS.read(recording)
    edit(one, lambda strings: strings[5].update(namespace="pitch_contour"))
    with pytest.raises(UserError, match=r"_mic: .* has 5 note_midi annotations"):
        CORPUS.read(recording)


def test_damaged_audio(one):
    recording = CORPUS.recordings_in(one).recordings[0]
    audio = recording.files[1]
    soundfile.write(audio, np.full(44100, np.nan, np.float32), 44100, subtype="FLOAT")
    with pytest.raises(UserError, match=f"{EXCERPTS[0]}_mic.wav holds samples that are NaN"):
        CORPUS.read(recording)
    audio.write_bytes(b"RIFF")
    with pytest.raises(UserError, match=rf"{EXCERPTS[0]}_mic\.wav as audio"):
        CORPUS.read(recording)
    audio.unlink()
    with pytest.raises(UserError, match=rf"no audio file at .*{EXCERPTS[0]}_mic\.wav"):
        CORPUS.read(recording)


def test_audio_shorter_than_labels(one):
    recording = CORPUS.recordings_in(one).recordings[0]
    edit(one, lambda strings: strings[1].update(data=[row(1.5, 0.6, 60.0)]))
    with pytest.raises(UserError, match=rf"{EXCERPTS[0]}_mic: 1\.00 s of audio for labels up to 2\.10 s"):
        CORPUS.read(recording)


def test_what_a_person_downloads():
    assert CORPUS.archives == (
        "annotation.zip",
        "audio_mono-mic.zip",
        "audio_mono-pickup_mix.zip",
    )
    assert guitarset.PROGRAM == 24
