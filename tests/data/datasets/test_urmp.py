import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile

from music_synth.audio.io import resample
from music_synth.data import synthetic
from music_synth.data.datasets.urmp import CORPUS, PROGRAMS
from music_synth.errors import UserError
from music_synth.midi.notes import Note, read_midi
from tests.data.datasets.raw_urmp import CODES, write_urmp

NANOSECOND = 1e-8  # a few: the files hold nine decimals
TITLES = {1: "Jupiter", 15: "Surprise", 41: "Miserere"}
CASTS = ((40, 41, 42), (56, 56, 57), (73, 68, 71, 64, 70))
NAMES = ["01_Jupiter_vn_va_vc", "15_Surprise_tpt_tpt_tbn", "41_Miserere_fl_ob_cl_sax_bn"]


@pytest.fixture(scope="module")
def pieces():
    """(MIDI bytes, audio) of three short pieces from the composer, one in stereo, one with the misnamed part."""
    kinds = ("strings", "winds", "winds")
    specs = [synthetic.PieceSpec(k, k, cast, str(cast), 2.0) for k, cast in zip(kinds, CASTS, strict=True)]
    return [(midi, audio) for _, midi, audio in synthetic.make_pieces(specs)]


@pytest.fixture(scope="module")
def raw(pieces, tmp_path_factory):
    """The folder that holds `Dataset`, and what is in it."""
    folder = tmp_path_factory.mktemp("urmp")
    return folder, write_urmp(folder, pieces, TITLES)


@pytest.fixture
def one(tmp_path):
    """A duet of two violins with a note each, to be damaged: the folder of the piece."""
    notes = [Note(60, 80, 40, 0.25, 0.75, instrument=0), Note(67, 80, 40, 0.5, 1.0, instrument=1)]
    write_urmp(tmp_path, [(notes, np.zeros(16000, np.float32))], {2: "Sonata"})
    return tmp_path / "Dataset" / "02_Sonata_vn_vn"


def load(piece):
    return CORPUS.read(CORPUS.recordings_in(piece.parent).recordings[0])


def by_id(found):
    return {recording.id: recording for recording in found.recordings}


def test_the_writer_makes_what_this_file_says(raw):
    """The tests below would be hollow without these."""
    folder, made = raw
    assert list(made) == NAMES
    misnamed = folder / "Dataset" / NAMES[1]
    assert (misnamed / "Notes_3_tpt_15_Surprise.txt").is_file() and not list(misnamed.glob("*3_tbn*"))
    channels = [soundfile.info(folder / "Dataset" / name / f"AuMix_{name}.wav") for name in NAMES]
    assert [(i.channels, i.samplerate, i.subtype) for i in channels] == [(c, 48000, "PCM_24") for c in (1, 2, 1)]
    score = read_midi(folder / "Dataset" / NAMES[0] / f"Sco_{NAMES[0]}.mid", as_published=True)
    assert {note.program for note in score} == {0}
    assert max(n.offset for n in score) > 1.3 * max(n.offset for n in made[NAMES[0]][0])
    assert (folder / "Dataset" / f"._{NAMES[0]}").is_file()
    assert (folder / "Dataset" / NAMES[0] / "._Notes_1_vn_01_Jupiter.txt").is_file()


def test_find(raw):
    folder, _ = raw
    found = CORPUS.recordings_in(folder)
    assert found.missing == []
    assert [(r.id, r.split) for r in found.recordings] == list(
        zip(NAMES, ("validation", "train", "train"), strict=True)
    )
    assert CORPUS.recordings_in(folder / "Dataset") == found
    here = folder / "Dataset" / NAMES[1]
    assert found.recordings[1].files == (
        here / f"AuMix_{NAMES[1]}.wav",
        here / "Notes_1_tpt_15_Surprise.txt",
        here / "Notes_2_tpt_15_Surprise.txt",
        here / "Notes_3_tpt_15_Surprise.txt",
    )


def test_the_split_is_by_piece_number(tmp_path):
    """35 train and 9 validate; nothing is read, so empty files do."""
    for number in range(1, 45):
        folder = tmp_path / f"{number:02}_Title_fl_db"
        folder.mkdir()
        for name in (
            f"AuMix_{folder.name}.wav",
            f"Notes_1_fl_{number:02}_Title.txt",
            f"Notes_2_db_{number:02}_Title.txt",
        ):
            (folder / name).touch()
    recordings = CORPUS.recordings_in(tmp_path).recordings
    validation = [int(recording.id[:2]) for recording in recordings if recording.split == "validation"]
    assert validation == [1, 2, 12, 13, 24, 25, 31, 38, 39]
    assert [recording.split for recording in recordings].count("train") == 35


@pytest.mark.parametrize("name", NAMES)
def test_load_gives_the_notes_that_sound(raw, pieces, name):
    """Among them the trombone whose files are named trumpet, and no note in the score's time."""
    folder, made = raw
    notes = CORPUS.read(by_id(CORPUS.recordings_in(folder))[name]).notes
    expected = sorted(made[name][0], key=lambda note: (note.onset, note.is_drum, note.program, note.pitch))
    assert [n[:3] + n[5:] for n in notes] == [n[:3] + n[5:] for n in expected]
    for attribute in ("onset", "offset"):
        times = [[getattr(note, attribute) for note in part] for part in (notes, expected)]
        np.testing.assert_allclose(*times, atol=NANOSECOND, rtol=0)
    cast = CASTS[NAMES.index(name)]
    assert {note.program for note in notes} == set(cast) and {note.velocity for note in notes} == {100}
    played = sorted((n.onset, n.program, n.pitch) for n in read_midi(pieces[NAMES.index(name)][0], as_published=True))
    np.testing.assert_allclose(sorted((n.onset, n.program, n.pitch) for n in notes), played, atol=NANOSECOND)


@pytest.mark.parametrize("name", NAMES[:2])
def test_load_gives_the_mix(raw, name):
    """Mono or stereo."""
    folder, made = raw
    loaded = CORPUS.read(by_id(CORPUS.recordings_in(folder))[name]).audio
    audio = made[name][1]
    assert loaded.dtype == np.float32 and len(loaded) == len(audio)
    np.testing.assert_allclose(loaded, resample(resample(audio, 16000, 48000), 48000, 16000), atol=1e-5)
    assert np.sqrt(np.mean((loaded - audio) ** 2)) < 0.01 * np.sqrt(np.mean(audio**2))


def test_instruments():
    expected = {"vn": 40, "va": 41, "vc": 42, "db": 43, "tpt": 56, "tbn": 57, "tba": 58, "hn": 60, "sax": 64}
    expected |= {"ob": 68, "bn": 70, "cl": 71, "fl": 73}
    assert expected == PROGRAMS == {code: program for program, code in CODES.items()}


def test_players_of_one_instrument_are_told_apart(one):
    assert [(n.pitch, n.program, n.instrument) for n in load(one).notes] == [(60, 40, 0), (67, 40, 1)]


def test_only_piece_15_may_be_misnamed(one):
    """Elsewhere a part whose file names another instrument is missing, not guessed."""
    (one / "Notes_2_vn_02_Sonata.txt").rename(one / "Notes_2_va_02_Sonata.txt")
    found = CORPUS.recordings_in(one.parent)
    assert found == ([], ["02_Sonata_vn_vn: no Notes_2_vn_02_Sonata.txt"])


def test_a_mended_piece_15_works_too(tmp_path):
    notes = [Note(60, 80, p, 0.1, 0.5, instrument=i) for i, p in enumerate((56, 56, 57))]
    write_urmp(tmp_path, [(notes, np.zeros(16000, np.float32))], {15: "Surprise"})
    path = tmp_path / "Dataset" / NAMES[1] / "Notes_3_tpt_15_Surprise.txt"
    path.rename(path.with_name("Notes_3_tbn_15_Surprise.txt"))
    assert [note.program for note in load(path.parent).notes] == [56, 56, 57]


@pytest.mark.parametrize(
    "line", ["0.1 0 0.5", "0.1\t0.000\t0.5", "0.1   440.0   0", "0.1 0 0"], ids=["0 Hz", "tabs", "no length", "neither"]
)
def test_lines_without_pitch_or_length(one, line):
    """They make no note, and that is said."""
    path = one / "Notes_1_vn_02_Sonata.txt"
    path.write_text(f"{line}\n\n{path.read_text()}{line}\n")
    with pytest.warns(
        UserWarning, match=r"02_Sonata_vn_vn: 2 lines of Notes_1_vn_02_Sonata\.txt without pitch or length"
    ):
        notes = load(one).notes
    assert [(n.pitch, n.onset, n.offset) for n in notes] == [(60, 0.25, 0.75), (67, 0.5, 1.0)]


def test_nothing_is_said_of_good_lines(one):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(one)


@pytest.mark.parametrize(
    "line",
    [
        "0.1 440",
        "0.1 440 0.2 1",
        "0.1,440,0.2",
        "onset frequency duration",
        "0.1 nan 0.2",
        "nan 440 0.2",
        "0.1 inf 0.2",
        "0.1 440 inf",
        "0.1 -440 0.2",
        "0.1 440 -0.2",
    ],
)
def test_bad_lines(one, line):
    path = one / "Notes_2_vn_02_Sonata.txt"
    path.write_text(f"0.2 440 0.1\n{line}\n")
    with pytest.raises(UserError, match=r"02_Sonata_vn_vn: line 2 of .*Notes_2_vn_02_Sonata\.txt is not.*--skip_bad"):
        load(one)


@pytest.mark.parametrize("line", ["-0.1 440 0.2", "0.1 20000 0.2", "0.1 4 0.2", "2.0 440 0.5"])
def test_notes_that_cannot_be(one, line):
    """Before the start, too high, too low, after the audio."""
    (one / "Notes_2_vn_02_Sonata.txt").write_text(line)
    with pytest.raises(UserError, match=r"02_Sonata_vn_vn: .*--skip_bad"):
        load(one)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00", b"0.1 0 0.2"])
def test_a_part_without_notes(one, content):
    (one / "Notes_1_vn_02_Sonata.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"02_Sonata_vn_vn: .*Notes_1_vn_02_Sonata\.txt.*--skip_bad"):
        load(one)


def test_missing_files(one):
    (one / "AuMix_02_Sonata_vn_vn.wav").unlink()
    (one / "Notes_1_vn_02_Sonata.txt").unlink()
    lines = ["02_Sonata_vn_vn: no AuMix_02_Sonata_vn_vn.wav", "02_Sonata_vn_vn: no Notes_1_vn_02_Sonata.txt"]
    assert CORPUS.recordings_in(one.parent) == ([], lines)


def test_files_that_go_away(one):
    recording = CORPUS.recordings_in(one.parent).recordings[0]
    recording.files[2].unlink()
    with pytest.raises(UserError, match=r"02_Sonata_vn_vn: cannot read .*Notes_2_vn_02_Sonata\.txt"):
        CORPUS.read(recording)


def test_damaged_audio(one):
    audio = one / "AuMix_02_Sonata_vn_vn.wav"
    soundfile.write(audio, np.full((48000, 2), np.nan, np.float32), 48000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"AuMix_02_Sonata_vn_vn\.wav holds samples that are NaN"):
        load(one)
    audio.write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"AuMix_02_Sonata_vn_vn\.wav as audio"):
        load(one)


def test_unknown_instrument(one):
    one.rename(one.with_name("02_Sonata_vn_kazoo"))
    with pytest.raises(UserError, match=r"02_Sonata_vn_kazoo: unknown instrument 'kazoo'; URMP has vn, va.*rename"):
        CORPUS.recordings_in(one.parent)


def test_a_folder_without_instruments(one):
    (one.parent / "03_Dance").mkdir()
    with pytest.raises(UserError, match="03_Dance: not named like 01_Jupiter_vn_vc"):
        CORPUS.recordings_in(one.parent)


@pytest.mark.parametrize("make", ["nothing", "empty", "other things"])
def test_wrong_folder(tmp_path, make):
    folder = tmp_path / "wrong"
    if make != "nothing":
        folder.mkdir()
    if make == "other things":
        (folder / "Supplementary_Files").mkdir()
        (folder / "01_Jupiter_vn_vc").touch()
        (folder / "._02_Sonata_vn_vn").mkdir()
    with pytest.raises(UserError, match=r"wrong does not hold URMP: no folder such as 01_Jupiter_vn_vc.*unpack"):
        CORPUS.recordings_in(folder)


def test_load_in_another_process(raw):
    """From a pickle, without TensorFlow."""
    recording = CORPUS.recordings_in(raw[0]).recordings[1]
    code = (
        "import pickle, sys\n"
        "from music_synth.data.datasets.urmp import CORPUS\n"
        "loaded = CORPUS.read(pickle.loads(sys.stdin.buffer.read()))\n"
        "print(len(loaded.notes), len(loaded.audio), 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, input=pickle.dumps(recording), capture_output=True, check=True).stdout.decode()
    loaded = CORPUS.read(recording)
    assert output.split() == [str(len(loaded.notes)), str(len(loaded.audio)), "False"]


def test_what_a_person_downloads():
    assert (CORPUS.archives, CORPUS.trim) == (("Dataset.tar.gz",), False)
