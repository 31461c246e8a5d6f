import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import soundfile

from music_synth.data.datasets.corpus import Recording
from music_synth.data.datasets.musicnet import (
    CORPUS,
    CORPUS_EM,
    CORPUS_OFFICIAL,
    EM_LACKS,
    HELD_OUT,
    PROGRAMS,
    MusicNet,
)
from music_synth.data.synthetic import PieceSpec, compose, render
from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes, parse_midi
from tests.data.datasets import raw_musicnet as raw

VIOLIN, VIOLA, CELLO, PIZZICATO = 40, 41, 42, 45
# A scale by all 11 instruments, then a quartet whose violins share a pitch. Times are whole samples and whole ticks.
SCALE = [Note(60 + i, 100, p, 0.1 * i, 0.1 * i + 0.35) for i, p in enumerate(sorted(raw.NUMBERS))]
QUARTET = [
    Note(76, 100, VIOLIN, 0.5, 1.0),
    Note(72, 100, VIOLIN, 0.5, 1.5),
    Note(64, 100, VIOLA, 1.0, 1.5),
    Note(76, 100, VIOLIN, 1.5, 2.0),
    Note(48, 100, CELLO, 1.5, 2.0),
    Note(64, 100, CELLO, 2.0, 2.5),
]
SPLITS = {"1733": "validation", "1727": "train", "1759": "train", "2118": "test", "2194": "train"}


@pytest.fixture(scope="module")
def pieces():
    solo = parse_midi(compose(PieceSpec("solo", "piano", (0,), "musicnet", 2.0)))[0]
    solo = [note._replace(velocity=100, instrument=0) for note in solo]
    made = {"1727": SCALE, "1733": QUARTET, "1759": solo, "2118": SCALE[::-1], "2194": solo[:1]}
    audio = {id_: render(midi_bytes(notes)) for id_, notes in made.items() if id_ in ("1733", "1759")}
    return {id_: (notes, audio.get(id_, audio["1759"])) for id_, notes in made.items()}


@pytest.fixture(scope="module")
def download(pieces, tmp_path_factory):
    """Both archives unpacked in one folder. MusicNet-EM has no 2194."""
    folder = tmp_path_factory.mktemp("download")
    raw.write_musicnet(folder, pieces)
    em = {id_: notes for id_, (notes, _) in pieces.items() if id_ not in EM_LACKS}
    second_violin = {72}
    em["1733"] = [note._replace(program=PIZZICATO) if note.pitch in second_violin else note for note in QUARTET]
    raw.write_musicnet_em(folder, em)
    return folder


@pytest.fixture
def folder(download, tmp_path):
    """The same, to be damaged."""
    return shutil.copytree(download, tmp_path / "download")


def by_id(corpus, root) -> dict[str, Recording]:
    return {recording.id: recording for recording in corpus.recordings_in(root).recordings}


def as_played(notes) -> list[tuple]:
    return sorted((note.onset, note.offset, note.pitch, note.program) for note in notes)


def in_samples(notes) -> list[tuple]:
    """As the labels have them: times are whole samples at 44.1 kHz."""
    return sorted((round(n.onset * 44100) / 44100, round(n.offset * 44100) / 44100, n.pitch, n.program) for n in notes)


def test_instruments_count_from_one():
    """The numbers of the 11 instruments of the paper, by the names that General MIDI gives to their programs."""
    assert sorted(PROGRAMS) == sorted(number for number, _ in raw.INSTRUMENTS.values()) and len(PROGRAMS) == 11
    assert all(PROGRAMS[number] == program == number - 1 for number, program in raw.INSTRUMENTS.values())


def test_published_and_official_split():
    for splits, sizes in (("published", (15, 15)), ("official", (0, 10))):
        validation, test = (HELD_OUT[splits].get(split, []) for split in ("validation", "test"))
        assert (len(set(validation)), len(set(test))) == sizes and not set(validation) & set(test)
    assert set(HELD_OUT["official"]["test"]) == raw.OFFICIAL_TEST
    assert not {id_ for splits in HELD_OUT.values() for ids in splits.values() for id_ in ids} & set(EM_LACKS)
    with pytest.raises(UserError, match=r"'mt3'; choose one of published, official"):
        MusicNet(split="mt3")


def test_find(download):
    """Recordings of either folder are in the split that their ids say, published or official."""
    for root in (download, download / "musicnet"):
        recordings, missing = CORPUS.recordings_in(root)
        assert {recording.id: recording.split for recording in recordings} == SPLITS
        assert [recording.id for recording in recordings] == sorted(SPLITS)
        assert len(missing) == 28, "held out and not there"
        assert (
            missing[0] == "1729: no 1729.wav in train_data or test_data and no 1729.csv in train_labels or test_labels"
        )
    found = by_id(CORPUS, download)
    root = download / "musicnet"
    assert found["1759"].files == (root / "test_data" / "1759.wav", root / "test_labels" / "1759.csv")
    assert found["2118"].files == (root / "train_data" / "2118.wav", root / "train_labels" / "2118.csv")
    official = {recording.id: recording.split for recording in CORPUS_OFFICIAL.recordings_in(download).recordings}
    assert official == dict.fromkeys(SPLITS, "train") | {"1759": "test"}


def test_corpora_say_what_they_are():
    assert (CORPUS.title, CORPUS.archives) == ("MusicNet", ("musicnet.tar.gz",))
    assert CORPUS_EM.archives == ("musicnet.tar.gz", "musicnet_em.zip")
    assert not CORPUS.trim and not CORPUS_EM.trim


def test_metadata_lists_what_is_missing(folder):
    """With the metadata, beside the folders or among them, a training recording of which nothing is there is missed."""
    without = CORPUS.recordings_in(folder).missing
    for place in (folder, folder / "musicnet"):
        (place / "musicnet_metadata.csv").write_text(raw.METADATA, encoding="cp1252")
        missing = CORPUS.recordings_in(folder).missing
        unseen = {line.partition(":")[0] for line in missing} - {line.partition(":")[0] for line in without}
        assert unseen == set(raw.METADATA_IDS) - set(SPLITS) - {line.partition(":")[0] for line in without}
        assert "2155" in unseen
        (place / "musicnet_metadata.csv").unlink()
    (folder / "musicnet_metadata.csv").write_text("id,composer\nfirst,Bach\n")
    with pytest.raises(UserError, match=r"musicnet_metadata.csv has no column of ids.*optional"):
        CORPUS.recordings_in(folder)


def test_partial_download(folder):
    (folder / "musicnet" / "train_data" / "1727.wav").unlink()
    (folder / "musicnet" / "test_labels" / "1759.csv").unlink()
    recordings, missing = CORPUS.recordings_in(folder)
    assert {recording.id for recording in recordings} == {"1733", "2118", "2194"}
    assert "1727: no 1727.wav in train_data or test_data" in missing
    assert "1759: no 1759.csv in train_labels or test_labels" in missing


def test_scores_and_hidden_files_are_passed_over(folder):
    expected = CORPUS.recordings_in(folder), CORPUS_EM.recordings_in(folder)
    root = folder / "musicnet"
    for path in (
        root / "train_data" / "._1727.wav",
        root / "train_labels" / "._1727.csv",
        root / "train_data" / "a.wav",
    ):
        path.write_bytes(b"\0\5\26\7")
    for name in ("train_labels_midi", "test_labels_midi"):  # which have 1759 twice
        (root / name).mkdir()
        (root / name / "1759.mid").write_bytes(b"")
    (folder / "musicnet_midis" / "Bach").mkdir(parents=True)
    (folder / "musicnet_midis" / "Bach" / "2194_prelude13.mid").write_bytes(b"")
    (folder / "musicnet_em" / "._1727.mid").write_bytes(b"")
    assert (CORPUS.recordings_in(folder), CORPUS_EM.recordings_in(folder)) == expected


def test_load(download, pieces):
    """Notes to the sample of 44.1 kHz, programs from 0, velocity 100; audio as it was before it went to 44.1 kHz."""
    for id_, recording in by_id(CORPUS, download).items():
        notes, audio = CORPUS.read(recording)
        expected, sound = pieces[id_]
        assert as_played(notes) == in_samples(expected)
        assert {note.velocity for note in notes} == {100} and not any(note.is_drum for note in notes)
        assert len({(n.program, n.instrument) for n in notes}) == len({n.program for n in notes})
        assert audio.dtype == np.float32 and audio.shape == sound.shape
        assert np.abs(audio - sound).max() < 0.02 * np.abs(sound).max()
    assert {note.program for note in CORPUS.read(by_id(CORPUS, download)["1727"]).notes} == set(PROGRAMS.values())


def test_find_reads_no_recording(folder):
    for pattern in ("*_data/*.wav", "*_labels/*.csv"):
        for path in (folder / "musicnet").glob(pattern):
            path.write_bytes(b"")
    assert (
        len(CORPUS.recordings_in(folder).recordings)
        == len(CORPUS_EM.recordings_in(folder).recordings) + 1
        == len(SPLITS)
    )


# --- MusicNet-EM ---


def test_em_finds_what_it_has(folder):
    recordings, missing = CORPUS_EM.recordings_in(folder)
    assert {recording.id: recording.split for recording in recordings} == {
        id_: split for id_, split in SPLITS.items() if id_ != "2194"
    }
    assert "2194: no musicnet_em/2194.mid, which MusicNet-EM does not have" in missing
    recording = recordings[0]
    assert [path.name for path in recording.files] == ["1727.wav", "1727.csv", "1727.mid"]
    # The archive may be unpacked among the folders of MusicNet, or into a folder of its own name.
    for place in (folder / "musicnet" / "musicnet_em", folder / "musicnet_em" / "musicnet_em"):
        (folder / "musicnet_em").rename(folder / "moved")
        place.parent.mkdir(exist_ok=True)
        (folder / "moved").rename(place)
        moved = CORPUS_EM.recordings_in(folder)
        assert [r.id for r in moved.recordings] == [r.id for r in recordings] and moved.missing == missing
        assert moved.recordings[0].files[2] == place / "1727.mid"
        place.rename(folder / "moved")
        shutil.rmtree(folder / "musicnet_em", ignore_errors=True)
        (folder / "moved").rename(folder / "musicnet_em")
    shutil.rmtree(folder / "musicnet_em")
    with pytest.raises(UserError, match=r"does not hold MusicNet-EM; unpack musicnet_em.zip there"):
        CORPUS_EM.recordings_in(folder)


def test_em_loads_the_times_of_its_own_files(folder, pieces):
    """Labels that are off by a third of a second change nothing; programs count from 0 in these files."""
    path = folder / "musicnet" / "train_labels" / "1727.csv"
    late = [note._replace(onset=note.onset + 1 / 3, offset=note.offset + 1 / 3) for note in SCALE]
    late_folder = raw.write_musicnet(folder / "late", {"1727": (late, pieces["1727"][1])})
    shutil.copy(late_folder / "train_labels" / "1727.csv", path)
    notes, audio = CORPUS_EM.read(by_id(CORPUS_EM, folder)["1727"])
    np.testing.assert_allclose(as_played(notes), as_played(SCALE), rtol=0, atol=1 / 960 + 1e-9)
    assert np.array_equal(audio, CORPUS.read(by_id(CORPUS, folder)["1727"]).audio)


def test_em_second_violins(download):
    """Pizzicato strings that are none take the instrument of the nearest label of that pitch."""
    recording = by_id(CORPUS_EM, download)["1733"]
    assert {note.program for note in parse_midi(recording.files[2])[0]} == {VIOLIN, VIOLA, CELLO, PIZZICATO}
    assert as_played(CORPUS_EM.read(recording).notes) == as_played(QUARTET)


def test_em_files_without_instruments(folder):
    """The first edition had program 0 throughout. Pitch 64 is the viola's near 1 s and the cello's near 2 s."""
    low = Note(30, 100, 0, 1.0, 1.5)  # no label has this pitch, so it stays as it is
    moved = [note._replace(program=0, onset=note.onset + 0.1, offset=note.offset + 0.1) for note in QUARTET]
    (folder / "musicnet_em" / "1733.mid").unlink()
    shutil.copy(raw.write_musicnet_em(folder / "early", {"1733": [*moved, low]}) / "1733.mid", folder / "musicnet_em")
    notes = CORPUS_EM.read(by_id(CORPUS_EM, folder)["1733"]).notes
    by_pitch = sorted((note.pitch, note.onset, note.program) for note in notes)
    assert [row[::2] for row in by_pitch] == [
        (30, 0), (48, CELLO), (64, VIOLA), (64, CELLO), (72, VIOLIN), (76, VIOLIN), (76, VIOLIN),
    ]  # fmt: skip


def test_load_in_another_process(download):
    recording = by_id(CORPUS_EM, download)["1733"]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        notes, audio = pool.submit(pickle.loads(pickle.dumps(CORPUS_EM)).read, recording).result()
    expected = CORPUS_EM.read(recording)
    assert notes == expected.notes and np.array_equal(audio, expected.audio)


# --- bad input ---


def test_wrong_folder(folder):
    for root in (folder / "musicnet" / "train_data", folder / "none"):
        with pytest.raises(UserError, match=r"does not hold MusicNet \(unpack musicnet.tar.gz there\).*train_labels"):
            CORPUS.recordings_in(root)
    shutil.rmtree(folder / "musicnet" / "test_data")
    with pytest.raises(UserError, match="does not hold MusicNet"):
        CORPUS_EM.recordings_in(folder)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("instrument,note", "program,note", r"row 1 needs a whole number in each of start_time, end_time, instrument"),
        ("\n0,", "\n0.0,", r"row 1 needs a whole number"),
        (",43,", ",45,", r"row 3 has the instrument 45, which is none of 1, 7, 41, .*"),
        (",42,", ",0,", r"row 2 has the instrument 0"),
        (",42,64,", "\n", r"row 2 needs a whole number"),  # a file that was cut
        ("22050,", "220500,", r"Note\(.*onset=5.0, .* does not end after it begins"),
        (",76,", ",176,", r"Note\(pitch=176, .* out of range"),
        ("Dotted Half", '"Half', r"cannot be read as labels"),
    ],
)
def test_bad_labels(old, new, message, folder):
    notes = [Note(76, 100, VIOLIN, 0.0, 0.4), Note(64, 100, VIOLA, 0.5, 1.0), Note(48, 100, CELLO, 0.6, 1.0)]
    root = raw.write_musicnet(folder / "bad", {"1727": (notes, np.zeros(32000, np.float32))})
    path = root / "train_labels" / "1727.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=rf"^1727: .*{message}.*leave it out with --skip_bad$") as caught:
        CORPUS.read(by_id(CORPUS, root)["1727"])
    assert "\n" not in str(caught.value)


def test_bad_recordings(folder):
    found = by_id(CORPUS_EM, folder)
    audio, rate = soundfile.read(found["1727"].files[0])
    soundfile.write(found["1727"].files[0], audio[:100], rate, subtype="FLOAT")
    audio[1000] = np.nan
    soundfile.write(found["1733"].files[0], audio, rate, subtype="FLOAT")
    found["1759"].files[0].write_bytes(b"RIFF")
    found["2118"].files[2].write_bytes(b"MThd")
    empty = Recording("2194", "train", (*by_id(CORPUS, folder)["2194"].files,))
    empty.files[1].write_text(",".join(raw.FIELDS) + "\n")
    gone = Recording("1730", "train", (folder / "1730.wav", folder / "1730.csv"))
    messages = {"1727": "of audio for labels up to", "1733": "NaN", "1759": "cannot read", "2118": "truncated MIDI"}
    for recording, message in [
        *((found[id_], text) for id_, text in messages.items()),
        (empty, "no notes"),
        (gone, "no labels at"),
    ]:
        with pytest.raises(UserError, match=rf"^{recording.id}: .*{message}.*leave it out with --skip_bad$") as caught:
            CORPUS_EM.read(recording)
        assert "\n" not in str(caught.value)
