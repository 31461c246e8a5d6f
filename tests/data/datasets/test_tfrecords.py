"""The published TFRecords give what the archives give, and say what is wrong with them."""

import io
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from music_synth import prepare_data
from music_synth.data import synthetic
from music_synth.data.datasets import builder, reading, tf_example, tfrecords
from music_synth.data.datasets.corpus import SPLITS
from music_synth.data.note_sequences import parse_note_sequence, write_note_sequence
from music_synth.errors import UserError
from music_synth.midi.notes import Note, Pedal, midi_bytes, parse_midi, read_midi
from music_synth.midi.tokenizer import SLAKH_PROGRAMS
from tests.data.datasets import raw_guitarset, raw_maestro, raw_musicnet, raw_slakh, raw_urmp
from tests.data.datasets.raw_tfrecords import example, write_file, write_tfrecords

NAMES = ("maestro", "slakh", "cerberus4", "guitarset", "musicnet", "musicnet_em", "urmp")
PEDAL = [Pedal(0.2, 0, 100), Pedal(1.1, 0, 0), Pedal(1.2, 0, 127), Pedal(2.0, 0, 0)]
NOTE = Note(60, 100, 0, 0.1, 0.5)


@pytest.fixture(scope="module")
def pieces():
    """kind of ensemble -> (MIDI bytes, audio) of two seconds by the composer."""
    casts = {"piano": (0,), "guitar": (24,), "strings": (40, 41, 42), "band": (26, 0, 48, 33)}
    specs = [synthetic.PieceSpec(kind, kind, cast, kind, 2.0) for kind, cast in casts.items()]
    return {kind: made for kind, (_, *made) in zip(casts, synthetic.make_pieces(specs), strict=True)}


@pytest.fixture(scope="module")
def archives(pieces, tmp_path_factory):
    """data set -> the folder that its archive unpacks into. Pianists and the band use the pedal."""
    folder = tmp_path_factory.mktemp("archives")
    midi, audio = pieces["piano"]
    pedaled = midi_bytes([note._replace(instrument=0) for note in parse_midi(midi)[0]], PEDAL)
    assert read_midi(pedaled, as_published=True) != parse_midi(pedaled)[0]
    roots = {"maestro": raw_maestro.write_maestro(folder, [(midi, audio), (pedaled, audio)] * 2)}
    parts = {}
    for note in read_midi(pieces["band"][0], as_published=True):
        parts.setdefault((note.is_drum, note.program), []).append(note._replace(instrument=0))
    band = [(midi_bytes(notes, PEDAL), pieces["band"][1] * (0.5 + i)) for i, notes in enumerate(parts.values())]
    roots["slakh"] = roots["cerberus4"] = raw_slakh.write_slakh(folder, band)
    roots["guitarset"] = folder / "guitarset"
    raw_guitarset.write_guitarset(roots["guitarset"], [pieces["guitar"]] * 3)
    roots["urmp"] = folder / "urmp"
    roots["urmp"].mkdir()
    raw_urmp.write_urmp(roots["urmp"], [pieces["strings"]] * 3)
    strings = [note._replace(velocity=100) for note in read_midi(pieces["strings"][0], as_published=True)]
    ids = dict.fromkeys(("1727", "1759", "1733", "2118"), (strings, pieces["strings"][1]))
    roots["musicnet"] = raw_musicnet.write_musicnet(folder, ids)
    raw_musicnet.write_musicnet_em(folder, dict.fromkeys(ids, strings))
    roots["musicnet_em"] = folder
    return roots


@pytest.fixture(scope="module")
def recordings(archives):
    return {name: reading.corpus(name).recordings_in(root).recordings for name, root in archives.items()}


@pytest.fixture(scope="module")
def published(recordings, tmp_path_factory):
    """Folders of TFRecords side by side, as they are published."""
    root = tmp_path_factory.mktemp("datasets")
    for name, items in recordings.items():
        write_tfrecords(root / name, name, items)
    return root


@pytest.fixture
def maestro(published, tmp_path):
    """MAESTRO's, to be damaged."""
    return shutil.copytree(published / "maestro", tmp_path / "records")


def built(name, items, folder):
    """The records that a data set stores of recordings."""
    folder.mkdir()
    job = reading.Job(name, tuple(items), folder, False, False)
    kept = list(zip(items, job.files, strict=True))
    assert [reading.keep(name, *one) for one in kept] == [None] * len(items)
    return [builder.stored(number, *one)[1] for number, one in enumerate(kept)]


def shard(folder, split="train", number=0):
    (path,) = folder.glob(f"*_{split}.tfrecord-{number:05d}-of-*")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_records_equal_those_of_the_archive(name, published, recordings, tmp_path):
    found = reading.recordings_in(name, published)
    assert found.missing == [] and all(isinstance(item, tfrecords.Record) for item in found.recordings)
    raw = sorted(recordings[name], key=lambda item: SPLITS.index(item.split))
    assert [item.split for item in found.recordings] == [item.split for item in raw] and len(raw) > 2
    if name != "cerberus4":  # whose ids tell the stems
        assert [item.id for item in found.recordings] == [item.id for item in raw]
    assert len({item.id for item in found.recordings}) == len(raw)
    for one, two in zip(built(name, found.recordings, tmp_path / "1"), built(name, raw, tmp_path / "2"), strict=True):
        notes = parse_note_sequence(one["sequence"])
        assert notes == parse_note_sequence(two["sequence"]) and len(notes[0]) > 3
        assert list(one["programs"]) == list(two["programs"])
        # A mix of Slakh is resampled as one, not stem by stem; the others are the same samples.
        np.testing.assert_allclose(one["audio"], two["audio"], rtol=0, atol=name in ("slakh", "cerberus4"))
        assert np.abs(one["audio"]).max() > 500
    for item, other in zip(found.recordings, raw, strict=True):
        assert sorted(tfrecords.read_notes(item)) == sorted(reading.corpus(name).read_notes(other))
        assert reading.seconds(item) == pytest.approx(reading.seconds(other), abs=1e-4)


def test_what_the_pedal_and_the_drums_do_is_in_the_records(published):
    """The test above would be hollow without these."""
    pedaled = tfrecords.read_notes(reading.recordings_in("maestro", published).recordings[1])
    assert {2.0, 1.1} & {note.offset for note in pedaled}
    notes = [
        note for item in reading.recordings_in("slakh", published).recordings[:6] for note in tfrecords.read_notes(item)
    ]
    assert {(note.program, note.is_drum) for note in notes} == {(p, False) for p in (0, 33, 29, 48)} | {(0, True)}
    assert {note.instrument for note in notes} == {0, 1, 2, 3, 4}


def test_pieces_are_counted(recordings, published):
    """Not sub-mixes, not microphones; by edition of the download, where there is no list of what it holds."""
    raw = {name: reading.pieces(name, items) for name, items in recordings.items()}
    assert raw == {
        "maestro": (4, ()), "slakh": (4, (1710, 2100)), "cerberus4": (4, ()), "guitarset": (3, (360,)),
        "musicnet": (4, (330,)), "musicnet_em": (4, (323,)), "urmp": (3, (44,)),
    }  # fmt: skip
    of_records = {
        name: reading.pieces(name, reading.recordings_in(name, published).recordings) for name in ("guitarset", "slakh")
    }
    assert of_records == {"guitarset": (6, (716,)), "slakh": (14, ())}


def test_classes_of_slakh():
    classes = tfrecords.SLAKH
    assert len(classes) == 34 and {program for program, _ in classes.values()} == set(SLAKH_PROGRAMS)
    some = {"Electric Bass": 33, "Orchestral Harp": 46, "Soprano/Alto Sax": 64, "Clarinet": 71, "Synth Pad": 88}
    assert {name: classes[name] for name in some} == {name: (program, False) for name, program in some.items()}


def test_a_folder_of_its_own_or_of_splits(maestro, published):
    found = reading.recordings_in("maestro", maestro)
    assert [item.id for item in found.recordings] == [
        r.id for r in reading.recordings_in("maestro", published).recordings
    ]
    for path in list(maestro.iterdir()):
        split = path.name.split("_")[3].split(".")[0]
        (maestro / split).mkdir(exist_ok=True)
        path.rename(maestro / split / path.name.replace(f"_{split}", ""))
    moved = reading.recordings_in("maestro", maestro)
    assert [(r.id, r.split) for r in moved.recordings] == [(r.id, r.split) for r in found.recordings]
    assert not moved.missing


def test_the_archive_is_read_where_there_are_no_tfrecords_but_those_of_tfds(archives, tmp_path):
    root = shutil.copytree(archives["maestro"], tmp_path / "root")
    raw = reading.recordings_in("maestro", root)
    write_file(root / "built" / "maestro-train.tfrecord-00000-of-00001", [b""])
    (root / "built" / "dataset_info.json").write_text("{}")
    (root / "._a_train.tfrecord").write_bytes(b"")
    (root / "a_train.tfrecord-00000-of-00001_.gstmp").write_bytes(b"")  # of a download that goes on
    assert reading.recordings_in("maestro", root) == raw and not isinstance(raw.recordings[0], tfrecords.Record)


def test_listing_reads_no_audio_and_labels_neither(maestro):
    found = reading.recordings_in("maestro", maestro)
    item = found.recordings[0]
    notes = tfrecords.read_notes(item)
    data = bytearray(item.files[0].read_bytes())
    wav = data.index(b"data", data.index(b"WAVE"))
    data[wav + 100 : wav + 5000] = bytes(4900)
    item.files[0].write_bytes(data)
    assert reading.recordings_in("maestro", maestro) == found and tfrecords.read_notes(item) == notes
    assert reading.seconds(item) > 1.5


def test_in_another_process_without_tensorflow(published, recordings):
    item = reading.recordings_in("slakh", published).recordings[0]
    code = (
        "import pickle, sys\n"
        "from music_synth.data.datasets import reading\n"
        "item = pickle.loads(sys.stdin.buffer.read())\n"
        "loaded = reading.reader('slakh', item).read(item)\n"
        "print(len(loaded.notes), len(loaded.audio), 'tensorflow' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(item), capture_output=True, check=True)
    loaded = tfrecords.read(item)
    # The last line: where CI is set, pyfluidsynth prints one of its own.
    assert run.stdout.decode().splitlines()[-1].split() == [str(len(loaded.notes)), str(len(loaded.audio)), "False"]


# --- bad input ---


def test_missing_shards_and_splits(maestro, tmp_path):
    shard(maestro, "train", 0).unlink()
    shard(maestro, "test").unlink()
    found = reading.recordings_in("maestro", maestro)
    assert found.missing == [
        f"no maestro-v3.0.0_ns_wav_train.tfrecord-00000-of-00002 in {maestro}",
        f"no TFRecords of test in {maestro}",
    ]
    assert [item.id for item in found.recordings] == [raw_maestro.IDS[i] for i in (1, 2)]
    with pytest.raises(UserError, match=r"2 items of maestro are missing, the first: no maestro-v3.0.0_ns_wav_train"):
        builder.build("maestro", found, tmp_path)


def test_damaged_files(maestro):
    """What comes before the damage is found; the line says where it is."""
    one, two = features_of_maestro(maestro)
    shutil.rmtree(maestro)
    path = maestro / "a_train.tfrecord"
    whole = write_file(path, [example(one), example(two)]).read_bytes()
    second = 12 + len(example(one)) + 4

    def found(content):
        path.write_bytes(content)
        return reading.recordings_in("maestro", maestro)

    assert [item.id for item in found(whole).recordings] == ["first", "second"]
    for content, message in (
        (whole[:-1], "cut off in record 2"),
        (whole[: second + 5], "cut off in record 2"),
        (whole[:second] + b"\1" + whole[second + 1 :], "damaged where record 2 begins"),
    ):
        recordings, missing = found(content)
        assert [item.id for item in recordings] == ["first"]
        assert missing[0] == f"a_train.tfrecord: {message}; download the file again"
    for content, message in ((b"", "an empty file"), (b"id,audio\n" * 9, "damaged where record 1 begins")):
        recordings, missing = found(content)
        assert recordings == [] and missing[0] == f"a_train.tfrecord: {message}; download the file again"
    spoiled = bytearray(whole)
    spoiled[-2000] ^= 1
    last = found(spoiled).recordings[1]
    with pytest.raises(UserError, match=r"^second \(record 2 of a_train.tfrecord\): damaged: its checksum is wrong; d"):
        tfrecords.read(last)


def features_of_maestro(folder):
    """Of two records, called first and second."""
    item = reading.recordings_in("maestro", folder).recordings[0]
    content = tf_example.Example(tf_example.mapped(item.files[0]), item.start, item.end)
    features = {name: content.string(name) for name in content.names()}
    return features | {"id": "first"}, features | {"id": "second"}


WAV = {"PCM_16": 0.1 * np.ones(16000), "FLOAT": np.full(16000, np.nan)}


def a_wav(subtype):
    file = io.BytesIO()
    soundfile.write(file, WAV[subtype], 16000, subtype=subtype, format="WAV")
    return file.getvalue()


def sequence(*notes):
    return write_note_sequence("x", notes or [NOTE])


MAESTRO = {"id": "x", "audio": a_wav("PCM_16"), "sequence": sequence()}
MUSICNET = {"id": "x", "audio": np.zeros(32000), "sample_rate": 32000.0, "sequence": sequence()}
URMP = {
    "id": "x",
    "tracks": [1, 2],
    "inst_names": ["vn", "sax"],
    "audio": a_wav("PCM_16"),
    "sequence": sequence(),
    "instrument_sequences": [sequence(), sequence()],
}
SLAKH = {"track_id": "x", "mix": np.zeros(16000), "audio_sample_rate": 16000} | {
    "inst_names": ["Drums"],
    "note_sequences": [sequence()],
}


@pytest.mark.parametrize("name, content", [("maestro", MAESTRO), ("musicnet", MUSICNET), ("urmp", URMP)])
def test_what_is_spoiled_below_is_good_as_it_is(name, content, tmp_path):
    write_file(tmp_path / "train.tfrecord", [content])
    (item,) = reading.recordings_in(name, tmp_path).recordings
    notes, audio = tfrecords.read(item)
    assert len(audio) == 16000 and [note.program for note in notes] == ([40, 64] if name == "urmp" else [0])


@pytest.mark.parametrize(
    "name, content, change, message",
    [
        ("maestro", MAESTRO, {"sequence": None}, "no feature sequence"),
        ("maestro", MAESTRO, {"audio": None}, "no feature audio"),
        ("maestro", MAESTRO, {"audio": []}, "feature audio has 0 values, not one"),
        ("maestro", MAESTRO, {"audio": b"RIFF"}, "cannot read the audio"),
        ("maestro", MAESTRO, {"audio": a_wav("FLOAT")}, "NaN"),
        ("maestro", MAESTRO, {"sequence": b"\xff\xff"}, "not a NoteSequence"),
        ("maestro", MAESTRO, {"sequence": b""}, "no notes"),
        ("maestro", MAESTRO, {"sequence": sequence(NOTE._replace(offset=0.05))}, "does not end after it begins"),
        ("maestro", MAESTRO, {"sequence": sequence(NOTE._replace(velocity=0))}, "out of range"),
        ("maestro", MAESTRO, {"sequence": sequence(NOTE._replace(offset=2.5))}, "of audio for labels up to 2.50 s"),
        ("musicnet", MUSICNET, {"audio": np.full(9, np.nan)}, "NaN"),
        ("musicnet", MUSICNET, {"audio": np.zeros(0)}, "no samples"),
        ("musicnet", MUSICNET, {"audio": a_wav("PCM_16")}, "feature audio is of another type"),
        ("musicnet", MUSICNET, {"sample_rate": 0.0}, "sample_rate is 0"),
        ("musicnet", MUSICNET, {"sample_rate": []}, "sample_rate is nan"),
        ("musicnet", MUSICNET, {"sample_rate": None}, "no feature sample_rate"),
        ("urmp", URMP, {"inst_names": ["vn", "kazoo"]}, "unknown instrument 'kazoo': none of vn, va, "),
        ("urmp", URMP, {"inst_names": ["vn"]}, "1 inst_names for 2 instrument_sequences"),
        ("slakh", SLAKH, {"inst_names": ["bass"]}, "unknown instrument 'bass': none of Acoustic Piano, "),
        ("cerberus4", SLAKH, {}, "unknown instrument 'Drums': none of bass, drums, guitar, piano"),
    ],
)
def test_bad_records(name, content, change, message, tmp_path):
    """One line that says which record, of which file, and the way out."""
    spoiled = {key: value for key, value in (content | change).items() if value is not None}
    write_file(tmp_path / "a_train.tfrecord", [content | {"id": "good", "track_id": "good"}, spoiled])
    item = reading.recordings_in(name, tmp_path).recordings[1]
    with pytest.raises(UserError) as caught:
        tfrecords.read(item)
    told = str(caught.value)
    assert told.startswith("x (record 2 of a_train.tfrecord): ") and message in told and "\n" not in told
    assert told.endswith("with --skip_bad")


def test_records_that_do_not_say_who_they_are(tmp_path):
    nameless = {name: value for name, value in MAESTRO.items() if name != "id"}
    write_file(tmp_path / "train.tfrecord", [b"garbage", b"\xff" * 99, b"", nameless, MAESTRO])
    items = reading.recordings_in("maestro", tmp_path).recordings
    assert [item.id for item in items] == [f"train.tfrecord-{i}" for i in (1, 2, 3, 4)] + ["x"]
    for item, message in zip(items, ["not a tf.train.Example"] * 2 + ["no feature sequence"], strict=False):
        with pytest.raises(UserError, match=rf"{item.id} \(record {item.number} of train.tfrecord\): {message}"):
            tfrecords.read(item)


def test_records_of_another_data_set(published, tmp_path):
    for name, folder, message in (
        ("maestro", "urmp", "is of urmp by its name, not of MAESTRO v3.0.0"),
        ("musicnet", "musicnet_em", "is of musicnet_em by its name, not of MusicNet;"),
        ("musicnet_em", "musicnet", "is of musicnet by its name, not of MusicNet-EM;"),
        ("musicnet", "moved", "is of urmp, not of musicnet: it has audio, id, inst_names, "),
    ):
        shutil.copytree(published / "urmp", tmp_path / "moved", dirs_exist_ok=True)
        with pytest.raises(UserError, match=message):
            reading.recordings_in(name, tmp_path / "moved" if folder == "moved" else published / folder)
    for path in (published / "maestro").iterdir():
        shutil.copy(path, tmp_path / "moved" / path.name.replace("v3.0.0", "v1.0.0"))
    with pytest.raises(UserError, match=r"is of version v1.0.0 by its name, not of MAESTRO v3.0.0"):
        reading.recordings_in("maestro", tmp_path / "moved")


def test_names_that_do_not_do(maestro, published):
    with pytest.raises(UserError, match=r"holds TFRecords, but slakh_sounding_bass is made from slakh2100_flac_redux"):
        reading.recordings_in("slakh_sounding_bass", published / "slakh")
    shutil.copy(shard(maestro), maestro / "b_train.tfrecord")
    with pytest.raises(UserError, match=r"are of two sets of TFRecords for train; move one of them away"):
        reading.recordings_in("maestro", maestro)
    (maestro / "b_train.tfrecord").rename(maestro / "contest.tfrecord")
    with pytest.raises(UserError, match=r"contest.tfrecord: neither its name nor its folder's says train, validation"):
        reading.recordings_in("maestro", maestro)


def test_the_command(maestro, tmp_path, capsys):
    """Counts in a dry run; what is bad and may be left out is listed."""
    spoiled = shard(maestro, "test")
    spoiled.write_bytes(write_file(tmp_path / "x", [{**MAESTRO, "sequence": b""}]).read_bytes())
    shard(maestro, "train", 1).unlink()
    argv = ["maestro", "--source", str(maestro), "--data_dir", str(tmp_path / "data"), "--workers", "1"]
    prepare_data.main([*argv, "--dry_run"])
    told = capsys.readouterr().out
    assert "maestro: 3 recordings\n  train: 1, 0.00 hours, " in told
    assert "  pieces: 3 of the 1,276 of a whole download\n" in told
    assert "  missing: no maestro-v3.0.0_ns_wav_train.tfrecord-00001-of-00002 in " in told
    prepare_data.main([*argv, "--skip_bad"])
    told = capsys.readouterr().out
    assert "2 items of maestro were left out:\n  no maestro-v3.0.0_ns_wav_train" in told
    assert f"\n  x (record 1 of {spoiled.name}): no notes" in told
    splits = builder.open_built("maestro", tmp_path / "data").info.splits
    assert {split: splits[split].num_examples for split in splits} == {"train": 1, "validation": 1}
