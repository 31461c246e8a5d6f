import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import soundfile

from music_synth.data.datasets.corpus import Recording
from music_synth.data.datasets.maestro import CORPUS, CORPUS_V2
from music_synth.data.synthetic import PieceSpec, make_pieces, render
from music_synth.errors import UserError
from music_synth.midi.notes import Note, Pedal, midi_bytes, parse_midi, read_midi
from tests.data.datasets import raw_maestro as raw

CORPORA = {"3.0.0": CORPUS, "2.0.0": CORPUS_V2}
HELD, RELEASED = Note(60, 80, 0, 0.5, 1.0), Note(64, 70, 0, 2.5, 3.0)
PEDALED = midi_bytes([HELD, RELEASED], [Pedal(0.8, 0, 100), Pedal(2.0, 0, 0)])


@pytest.fixture(scope="module")
def pieces():
    """Four of three seconds. The last is two notes, of which the pedal holds the first from 1 to 2 seconds."""
    specs = [PieceSpec(f"{i}", "piano", (0,), f"maestro/{i}", 3.0) for i in range(3)]
    return [(midi, audio) for _, midi, audio in make_pieces(specs)] + [(PEDALED, render(PEDALED))]


@pytest.fixture(scope="module")
def download(pieces, tmp_path_factory):
    """A folder with both versions unpacked."""
    folder = tmp_path_factory.mktemp("download")
    for version in CORPORA:
        raw.write_maestro(folder, pieces, version)
    return folder


@pytest.fixture
def root(download, tmp_path):
    """The folder of v3.0.0, to be damaged."""
    return shutil.copytree(download / "maestro-v3.0.0", tmp_path / "maestro-v3.0.0")


@pytest.mark.parametrize("version", CORPORA)
@pytest.mark.parametrize("form", ["csv", "json"])
def test_find(version, form, download, tmp_path):
    """Both forms of the list of either version list the same; so do its folder and the one around it."""
    corpus = CORPORA[version]
    root = shutil.copytree(download / f"maestro-v{version}", tmp_path / f"maestro-v{version}")
    for other in {"csv", "json"} - {form}:
        (root / f"maestro-v{version}.{other}").unlink()
    recordings, missing = corpus.recordings_in(root)
    assert corpus.recordings_in(tmp_path) == (recordings, missing) and missing == []
    assert [recording.id for recording in recordings] == raw.IDS
    assert [recording.split for recording in recordings] == raw.SPLITS
    for recording, (_, _, _, year, name) in zip(recordings, raw.ROWS, strict=True):
        assert recording.files == (root / str(year) / f"{name}.midi", root / str(year) / f"{name}.wav")
        assert not set(recording.id) & set(" ,/")


def test_versions_say_which_they_are():
    assert (CORPUS.title, CORPUS.archives) == ("MAESTRO v3.0.0", ("maestro-v3.0.0.zip",))
    assert CORPUS_V2.archives == ("maestro-v2.0.0.zip",)
    assert not CORPUS.trim and not CORPUS_V2.trim


def test_rows_of_the_json_are_in_the_order_of_their_numbers(root, pieces):
    """Row "10" comes after row "2", wherever the file has it."""
    (root / "maestro-v3.0.0.csv").unlink()
    path = root / "maestro-v3.0.0.json"
    renamed = dict(zip("0123", ("10", "0", "9", "2"), strict=True))
    table = json.loads(path.read_text())
    path.write_text(json.dumps({name: {renamed[r]: v for r, v in rows.items()} for name, rows in table.items()}))
    assert [recording.id for recording in CORPUS.recordings_in(root).recordings] == [raw.IDS[i] for i in (1, 3, 2, 0)]


def test_load(download, pieces):
    """Notes are those of the MIDI file; audio is the mean of the channels at 16 kHz, from 44.1 and from 48 kHz."""
    for recording, (midi, audio) in zip(CORPUS.recordings_in(download).recordings, pieces, strict=True):
        notes, loaded = CORPUS.read(recording)
        assert sorted(notes) == sorted(read_midi(midi, as_published=True)) and len(notes) > 1
        assert [note.onset for note in notes] == sorted(note.onset for note in notes)
        assert loaded.dtype == np.float32 and loaded.shape == audio.shape
        expected = (1 + raw.RIGHT) / 2 * audio
        assert np.abs(loaded - expected).max() < 0.02 * np.abs(expected).max()


def test_sustain_pedal_lengthens_notes(download):
    notes, _ = CORPUS.read(CORPUS.recordings_in(download).recordings[3])
    assert notes == [HELD._replace(offset=2.0), RELEASED]
    assert parse_midi(PEDALED)[0][0].offset == 1.0, "which is when its key was let go"


def test_midi_only_and_partial_downloads(root):
    (root / "2009" / f"{raw.ROWS[3][4]}.midi").unlink()
    for path in root.glob("*/*.wav"):
        if "2018" not in path.parts:
            path.unlink()
    recordings, missing = CORPUS.recordings_in(root)
    assert [recording.id for recording in recordings] == raw.IDS[:1]
    assert missing[0] == f"{raw.IDS[1]}: no 2004/{raw.ROWS[1][4]}.wav"
    assert missing[2] == f"{raw.IDS[3]}: no 2009/{raw.ROWS[3][4]}.midi and no 2009/{raw.ROWS[3][4]}.wav"
    assert len(missing) == 3


def test_find_reads_no_recording(root):
    for path in (*root.glob("*/*.wav"), *root.glob("*/*.midi")):
        path.write_bytes(b"")
    assert len(CORPUS.recordings_in(root).recordings) == 4


def test_load_in_another_process(download):
    recording = CORPUS.recordings_in(download).recordings[0]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        notes, audio = pool.submit(pickle.loads(pickle.dumps(CORPUS)).read, recording).result()
    expected = CORPUS.read(recording)
    assert notes == expected.notes and np.array_equal(audio, expected.audio)


def test_wrong_folder(tmp_path, download):
    with pytest.raises(UserError, match=r"does not hold MAESTRO v3.0.0.*unpack maestro-v3.0.0.zip"):
        CORPUS.recordings_in(tmp_path)
    with pytest.raises(UserError, match=r"none does not hold MAESTRO"):
        CORPUS.recordings_in(tmp_path / "none")
    with pytest.raises(UserError, match=r"no maestro-v3.0.0.csv and no maestro-v3.0.0.json"):
        CORPUS.recordings_in(download / "maestro-v2.0.0")


@pytest.mark.parametrize(
    "old, new, message",
    [
        (",audio_filename,", ",audio,", r"row 1 has no audio_filename"),
        (",test,", ",dev,", r"row 4 has the split 'dev', not one of train, validation, test"),
        (
            ",2014/MIDI-UNPROCESSED_16-18_R1_2014_MID--AUDIO_16_R1_2014_wav--3.wav,",
            "\n,",
            r"row 3 has no audio_filename",
        ),
        ('"Prélude, chorale', 'Prélude" chorale', r"row 3 has the split ' et fugue'"),
    ],
)
def test_bad_csv(old, new, message, root):
    path = root / "maestro-v3.0.0.csv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        CORPUS.recordings_in(root)
    assert "maestro-v3.0.0.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_lists_that_are_none(root):
    path = root / "maestro-v3.0.0.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.splitlines()[0])
    with pytest.raises(UserError, match="lists no recordings"):
        CORPUS.recordings_in(root)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match=r"csv cannot be read"):
        CORPUS.recordings_in(root)
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"row 5 lists 2018/.* once more"):
        CORPUS.recordings_in(root)


@pytest.mark.parametrize(
    "content", ["{", '{"split": ["train"]}', "7", '{"a": {"b": "c"}}', "[3]", '[{"split": "train"}]', "[]"]
)
def test_bad_json(content, root):
    (root / "maestro-v3.0.0.csv").unlink()
    (root / "maestro-v3.0.0.json").write_text(content)
    with pytest.raises(UserError, match=r"maestro-v3.0.0.json.*; unpack it again$"):
        CORPUS.recordings_in(root)


def test_bad_recordings(root):
    """Each is one line that names the recording and the way out."""
    first, second, third, fourth = CORPUS.recordings_in(root).recordings
    first.files[0].write_bytes(b"RIFF")
    audio, rate = soundfile.read(second.files[1])
    soundfile.write(second.files[1], audio[: len(audio) // 8], rate)
    third.files[1].write_bytes(b"not audio")
    audio[1000] = np.nan
    soundfile.write(fourth.files[1], audio, rate, subtype="FLOAT")
    gone = Recording("gone", "train", (fourth.files[0], root / "2018" / "gone.wav"))
    messages = ["not a MIDI file", "of audio for labels up to", "cannot read", "NaN", "no audio file at"]
    for recording, message in zip([first, second, third, fourth, gone], messages, strict=True):
        with pytest.raises(UserError, match=rf"^{recording.id}: .*{message}.*leave it out with --skip_bad$") as caught:
            CORPUS.read(recording)
        assert "\n" not in str(caught.value)
