"""From a download to records and batches, on a small MAESTRO in its real format."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from music_synth import prepare_data
from music_synth.audio.mel import MIN_LOG_MEL, log_mel
from music_synth.data import tasks
from music_synth.data.datasets import builder, reading
from music_synth.data.datasets.corpus import Found
from music_synth.data.feed import open_feed
from music_synth.errors import UserError
from music_synth.midi.notes import Note, midi_bytes
from music_synth.midi.tokenizer import Events, Tokenizer
from tests.data.datasets.raw_maestro import write_maestro
from tests.data.datasets.raw_musicnet import write_musicnet, write_musicnet_em
from tests.data.datasets.raw_tfrecords import write_tfrecords

SECONDS = 13


def a_piece(seed):
    """Notes over 12 seconds, some across the borders of segments, and noise that swells with them."""
    rng = np.random.default_rng(seed)
    notes = [Note(int(rng.integers(40, 80)), 80, 0, 0.3 * i, 0.3 * i + 1.0) for i in range(36)]
    audio = 0.1 * rng.normal(size=16000 * SECONDS) * np.linspace(0.1, 1.0, 16000 * SECONDS)
    return midi_bytes(notes), audio.astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The archive as it is downloaded: two pieces for training, one each for validation and test."""
    folder = tmp_path_factory.mktemp("download")
    root = write_maestro(folder, [a_piece(seed) for seed in range(4)])
    return Path(shutil.make_archive(str(folder / root.name), "zip", folder, root.name))


@pytest.fixture(scope="module", params=["archive", "TFRecords"])
def built(request, source, data_dir, tmp_path_factory):
    """The folder of data sets, with MAESTRO of the archive, or of what was published of it."""
    if request.param == "archive":
        return data_dir
    folder = tmp_path_factory.mktemp("published")
    write_tfrecords(folder / "records", "maestro", scanned(source, folder).recordings)
    command = ["maestro", "--source", str(folder / "records"), "--data_dir", str(folder / "data"), "--workers", "1"]
    prepare_data.main(command)
    return folder / "data"


@pytest.fixture(scope="module")
def data_dir(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["maestro", "--source", str(source), "--data_dir", str(folder), "--workers", "1"])
    return folder


def scanned(source, folder):
    return reading.scan("maestro", source, folder / "extracted")


def records(made):
    """id -> (audio, NoteSequence) of each split of a tfds data set."""
    splits = {split: made.as_dataset(split=split).as_numpy_iterator() for split in made.info.splits}
    return {split: {r["id"]: (r["audio"].tobytes(), r["sequence"]) for r in found} for split, found in splits.items()}


def test_records_are_what_the_reader_loads(source, built, tmp_path):
    made = builder.open_built("maestro", built)
    found = scanned(source, tmp_path)
    assert {s: made.info.splits[s].num_examples for s in made.info.splits} == {"train": 2, "validation": 1, "test": 1}
    tasks.register_tasks(names=["maestro"], data_dir=built)
    pieces = {piece.id: piece for split in tasks.SPLITS for piece in tasks.pieces(tasks.registered("maestro"), split)}
    assert set(pieces) == {item.id for item in found.recordings}
    for item in found.recordings:
        notes, audio = reading.corpus("maestro").read(item)
        assert pieces[item.id].notes == notes
        np.testing.assert_allclose(pieces[item.id].audio, audio, atol=0.6 / 32768)
    assert not list(built.glob(".maestro*"))  # nothing is left of the work


def test_batches_hold_the_tokens_and_mel_of_the_piece(source, built, tmp_path):
    """Each window, with its context, is found in the piece and equals what its notes and audio give there."""
    tokenizer = Tokenizer()
    loaded = [reading.corpus("maestro").read(item) for item in scanned(source, tmp_path).recordings[:2]]
    # In training what follows the end of a piece is silence.
    mels = [np.pad(log_mel(np.round(a * 32768) / 32768, np), ((0, 256), (0, 0)), constant_values=MIN_LOG_MEL)
            for _, a in loaded]  # fmt: skip
    events = [Events.from_notes(notes) for notes, _ in loaded]
    batch = next(open_feed("maestro", tokenizer, 8, data_dir=str(built), empty_context=0.0).train_batches())
    checked = 0
    for tokens, mel, context, context_mask in zip(
        *(batch[name] for name in ("note_tokens", "mel", "context_mel", "context_mask")), strict=True
    ):
        if not context_mask.all():
            continue
        distance = [[np.abs(whole[start] - mel[0]).max() for start in range(256, len(whole) - 256)] for whole in mels]
        which = int(np.argmin([min(d) for d in distance]))
        start = 256 + int(np.argmin(distance[which]))
        np.testing.assert_allclose(mel, mels[which][start : start + 256], atol=4e-3)
        np.testing.assert_allclose(context, mels[which][start - 256 : start], atol=4e-3)
        np.testing.assert_array_equal(tokens[tokens > 0], tokenizer.encode_window(events[which], start, 256))
        checked += 1
    assert checked


def test_a_second_run_builds_nothing(data_dir, capsys):
    prepare_data.main(["maestro", "--source", "/nowhere", "--data_dir", str(data_dir)])
    told = capsys.readouterr().out
    assert "maestro is built: train on it with --gin.TASK=maestro" in told
    assert f"built before, in {data_dir / 'maestro'}: --source is not read; remove that folder to build it anew" in told


def test_dry_run_only_lists(source, tmp_path, capsys):
    found = scanned(source, tmp_path)
    folder = found.recordings[0].files[0].parents[1]
    found.recordings[0].files[1].unlink()
    prepare_data.main(["maestro", "--source", str(folder), "--data_dir", str(tmp_path / "data"), "--dry_run"])
    told = capsys.readouterr().out
    assert "maestro: 3 recordings" in told and "missing: " in told
    assert "train: 1, 0.00 hours, 36 notes" in told and "pieces: " not in told
    assert not (tmp_path / "data" / "maestro").exists()


def test_beam_gives_the_same_records(source, data_dir, tmp_path):
    made = builder.build("maestro", scanned(source, tmp_path), tmp_path, beam_options=["--runner=DirectRunner"])
    assert records(made) == records(builder.open_built("maestro", data_dir))


def spoil(found):
    """Cuts the audio of the first recording to half a file."""
    wav = next(path for path in found.recordings[0].files if path.suffix == ".wav")
    wav.write_bytes(wav.read_bytes()[:100])


def test_a_bad_recording_stops_the_build_and_the_next_run_goes_on(source, data_dir, tmp_path):
    found = scanned(source, tmp_path)
    whole = next(path for path in found.recordings[0].files if path.suffix == ".wav")
    kept = whole.read_bytes()
    # Same size, so that the next try is about the same download.
    whole.write_bytes(b"RIFF" + b"\0" * (len(kept) - 4))
    with pytest.raises(UserError, match=f"{found.recordings[0].id}.*--skip_bad"):
        builder.build("maestro", found, tmp_path, workers=1)
    assert not (tmp_path / "maestro").exists()
    (work,) = tmp_path.glob(".maestro-*")
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("*.npz")}
    whole.write_bytes(kept)
    job = reading.Job("maestro", tuple(found.recordings), work, False, False)
    reading.load_all(job, 1)
    assert len(list(work.glob("*.npz"))) == 4
    assert all((work / name).stat().st_mtime_ns == time for name, time in done.items())  # not read again
    made = builder.build("maestro", found, tmp_path, workers=1)
    assert records(made) == records(builder.open_built("maestro", data_dir))


def test_a_recording_mended_at_equal_length_is_read_again(source, tmp_path):
    found = scanned(source, tmp_path)
    job = reading.Job("maestro", tuple(found.recordings), tmp_path, False, False)
    assert reading.keep("maestro", found.recordings[0], job.files[0]) is None
    wav = next(path for path in found.recordings[0].files if path.suffix == ".wav")
    content = bytearray(wav.read_bytes())
    content[2000:3000] = bytes(1000)
    wav.write_bytes(content)
    mended = reading.Job("maestro", tuple(found.recordings), tmp_path, False, False)
    assert mended.files[0] != job.files[0] and mended.files[1:] == job.files[1:]
    assert reading.keep("maestro", found.recordings[0], mended.files[0]) is None
    before, after = (reading.read_kept(path).audio for path in (job.files[0], mended.files[0]))
    assert len(before) == len(after) and (before != after).any()


@pytest.mark.parametrize("beam_options", [None, ["--runner=DirectRunner"]])
def test_skip_bad_goes_on_and_lists_what_it_left_out(source, tmp_path, beam_options, capsys):
    found = scanned(source, tmp_path)
    spoil(found)
    made = builder.build("maestro", found, tmp_path, skip_bad=True, workers=1, beam_options=beam_options)
    assert made.info.splits["train"].num_examples == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 items of maestro were left out:" and found.recordings[0].id in said[1]


def test_nothing_that_can_be_read(source, tmp_path):
    found = scanned(source, tmp_path)
    spoil(found)
    with pytest.raises(
        UserError, match=f"no recording of maestro can be read; the first of 1: {found.recordings[0].id}"
    ):
        builder.build("maestro", Found(found.recordings[:1], []), tmp_path, skip_bad=True, workers=1)
    assert not (tmp_path / "maestro").exists()


def test_beam_reports_a_bad_recording_in_one_line(source, tmp_path):
    found = scanned(source, tmp_path)
    spoil(found)
    with pytest.raises(UserError) as told:
        builder.build("maestro", found, tmp_path, beam_options=["--runner=DirectRunner"])
    assert found.recordings[0].id in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "maestro").exists()


def test_missing_recordings_stop_the_build(source, tmp_path):
    found = scanned(source, tmp_path)
    with pytest.raises(UserError, match="1 items of maestro are missing, the first: a piece"):
        builder.build("maestro", found._replace(missing=["a piece"]), tmp_path)


def test_variants_stand_beside_each_other(tmp_path, capsys):
    """By name: the same download, split otherwise."""
    piece = [Note(60, 100, 40, 0.1, 0.5)], np.zeros(16000, np.float32)
    root = write_musicnet(tmp_path, {"1727": piece, "1733": piece, "1759": piece})
    argv = ["--source", str(root), "--data_dir", str(tmp_path / "data")]
    prepare_data.main(["musicnet", *argv, "--dry_run"])
    assert "  train: 2, 0.00 hours, 2 notes\n  validation: 1, " in capsys.readouterr().out
    prepare_data.main(["musicnet_official", *argv, "--skip_bad", "--workers", "1"])
    told = capsys.readouterr().out
    assert "  train: 2\n  test: 1\n  pieces: 3 of the 330 of a whole download\n" in told
    assert "musicnet_official is built: train on it with --gin.TASK=musicnet_official" in told
    assert sorted(builder.open_built("musicnet_official", tmp_path / "data").info.splits) == ["test", "train"]
    with pytest.raises(UserError, match=r"choose from .*slakh_sounding_bass, .*musicnet_official, "):
        tasks.build("musicnet_authors", tmp_path)


def test_two_archives_in_one_folder(tmp_path):
    """MusicNet-EM's labels and MusicNet's audio, as they are downloaded."""
    notes, download = [Note(60, 100, 40, 0.1, 0.5)], tmp_path / "download"
    for kind, root in (
        ("gztar", write_musicnet(tmp_path, {"1727": (notes, np.zeros(16000, np.float32))})),
        ("zip", write_musicnet_em(tmp_path, {"1727": notes})),
    ):
        shutil.make_archive(str(download / root.name), kind, tmp_path, root.name)
    found = reading.scan("musicnet_em", download, tmp_path / "extracted")
    assert [item.id for item in found.recordings] == ["1727"]


def test_what_was_not_built_is_named(tmp_path):
    tasks.register_tasks(names=["guitarset"], data_dir=tmp_path)
    with pytest.raises(UserError, match=r"guitarset is not in .*prepare_data guitarset --source PATH"):
        open_feed("guitarset", Tokenizer(), 2, data_dir=str(tmp_path))
