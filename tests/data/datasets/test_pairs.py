"""Folders of audio and MIDI files: which belong together, whether they fit, and what becomes of odd ones."""

import itertools
import json
import re
import time
import unicodedata

import numpy as np
import pytest
import soundfile

from music_synth import prepare_data
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.data.alignment import fit, mel_of
from music_synth.data.datasets import builder, pairs, pairs_check
from music_synth.data.datasets.pairs import CORPUS, Instrument, find_pairs
from music_synth.data.datasets.pairs_check import ELSEWHERE, SHORT, SILENT, accepted, examine
from music_synth.data.prepared import read_manifest
from music_synth.errors import UserError
from music_synth.midi import smf
from music_synth.midi.notes import Note, midi_bytes, read_midi
from tests.data.datasets.builds import ANY_TIME, records, started

pytestmark = pytest.mark.filterwarnings("ignore::music_synth.midi.smf.MidiWarning")
SECONDS = 20


def tune(seed=0, seconds=SECONDS):
    """Notes at irregular times."""
    rng = np.random.default_rng(seed)
    onsets = np.cumsum(rng.uniform(0.15, 0.6, 200))
    onsets = np.round(onsets[onsets < seconds - 1.0], 3).tolist()
    return [Note(int(rng.integers(45, 85)), 90, 0, onset, round(onset + 0.4, 3)) for onset in onsets]


def played(notes, seconds=SECONDS, rate=SAMPLE_RATE, late=0.0, slower=1.0):
    """A plucked string for each note: harmonics that decay."""
    audio = np.zeros(round(seconds * rate))
    for note in notes:
        first = round((late + slower * note.onset) * rate)
        time = np.arange(max(0, min(round(0.6 * rate), len(audio) - first))) / rate
        hertz = 440 * 2 ** ((note.pitch - 69) / 12)
        tone = sum(np.sin(2 * np.pi * k * hertz * time) / k for k in (1, 2, 3) if k * hertz < rate / 2)
        audio[first : first + len(time)] += 0.1 * tone * np.exp(-5 * time)
    return audio.astype(np.float32)


def write_pair(folder, name, seed=0, audio=None, rate=SAMPLE_RATE, suffix=".wav", midi=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}"
    soundfile.write(path, played(tune(seed)) if audio is None else audio, rate)
    (folder / f"{name}.mid").write_bytes(midi_bytes(tune(seed)) if midi is None else midi)
    return path


def only(folder):
    (pair,) = find_pairs(folder).recordings
    return pair


# --- which files belong together ---------------------------------------------------------------------------------


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_names_tell_which_files_belong_together(tmp_path):
    touch(tmp_path, "a take.wav", "A TAKE.txt", "a take.mid", "set/audio/one.FLAC", "set/midi/one.midi", "alone.ogg")
    touch(tmp_path, "silent.mid", "twice.wav", "twice.flac", "twice.mid", "phone.m4a", "phone.mid", ".hidden.wav")
    touch(tmp_path, unicodedata.normalize("NFD", "Übung.wav"), unicodedata.normalize("NFC", "Übung.mid"))
    touch(
        tmp_path,
        "heard.wav",
        "heard.transcribed.mid",
        "set/audio/two.wav",
        "set/two.transcribed.mid",
        "set/midi/two.mid",
    )
    found = find_pairs(tmp_path)
    assert {pair.id: tuple(path.name for path in pair.files) for pair in found.recordings} == {
        "a_take": ("a take.wav", "a take.mid"),
        "heard.transcribed": ("heard.wav", "heard.transcribed.mid"),
        "set.one": ("one.FLAC", "one.midi"),
        "set.two": ("two.wav", "two.mid"),  # one that was written by hand comes first
        unicodedata.normalize("NFC", "Übung"): tuple(
            unicodedata.normalize(form, name) for form, name in (("NFD", "Übung.wav"), ("NFC", "Übung.mid"))
        ),
    }
    assert [line.partition(":")[0] for line in found.missing] == ["alone", "phone", "silent", "twice"]
    assert "no MIDI file" in found.missing[0] and "convert it" in found.missing[1]
    assert "no audio file" in found.missing[2] and "both there" in found.missing[3]
    assert [path.name for path in pairs.audio_without_midi(tmp_path)] == ["alone.ogg"]


def test_splits_by_folder_by_chance_and_within_a_recording(tmp_path):
    touch(
        tmp_path / "a",
        *(f"{split}/{n}.{kind}" for split in ("train", "test") for n in (1, 2) for kind in ("wav", "mid")),
    )
    touch(tmp_path / "a", "3.wav", "3.mid")
    splits = {pair.id: pair.split for pair in find_pairs(tmp_path / "a").recordings}
    assert splits == {"3": "train", "test.1": "test", "test.2": "test", "train.1": "train", "train.2": "train"}
    for count in (3, 60):
        folder = tmp_path / str(count)
        touch(folder, *(f"take {n}.{kind}" for n in range(count) for kind in ("wav", "mid")))
        first = [pair.split for pair in find_pairs(folder).recordings]
        assert [first.count(split) for split in ("train", "validation", "test")] == (
            [1, 1, 1] if count == 3 else [48, 6, 6]
        )
        assert first == [pair.split for pair in find_pairs(folder).recordings]
    assert first != [pair.split for pair in find_pairs(folder, seed=1).recordings]


def test_a_single_recording_is_cut_where_it_pauses(tmp_path):
    notes = [Note(60, 90, 0, second / 2, second / 2 + 0.48) for second in range(40)]
    (tmp_path / "long.mid").write_bytes(midi_bytes(notes))
    soundfile.write(tmp_path / "long.wav", played(notes), SAMPLE_RATE)
    (parts,) = [pairs.cut(check.pair) for check in [examine(only(tmp_path))]]
    assert [part.split for part in parts] == ["train", "validation", "test"]
    ends = [part.part for part in parts]
    assert ends[0][0] == 0 and ends[-1][1] == 20 and all(one[1] == other[0] for one, other in itertools.pairwise(ends))
    contents = [CORPUS.read(part) for part in parts]
    assert sum(len(content.audio) for content in contents) == SECONDS * SAMPLE_RATE
    assert sum(len(content.notes) for content in contents) == 40  # none is cut in two
    for content, (first, _) in zip(contents, ends, strict=True):
        assert all(note.offset <= len(content.audio) / SAMPLE_RATE + 1e-6 for note in content.notes)
        assert (content.notes[0].onset + first) % 0.5 == pytest.approx(0, abs=1e-6)


def test_a_manifest_tells_what_names_do_not(tmp_path):
    touch(tmp_path, "sound/a, b.wav", "notes/x.mid", "sound/c.wav", "notes/y.mid")
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        'audio,midi,split,program\n"sound/a, b.wav",notes/x.mid,test,24\nsound/c.wav,notes/y.mid,train,\n'
    )
    first, second = find_pairs(tmp_path).recordings
    assert (first.id, first.split, first.instrument) == ("sound.a_b", "test", Instrument(24, always=True))
    assert (second.id, second.split, second.instrument) == ("sound.c", "train", None)
    rows = [{"audio": "sound/c.wav", "midi": "notes/x.mid"}, {"audio": "sound/none.wav", "midi": "notes/y.mid"}]
    other = tmp_path / "list.jsonl"
    other.write_text("\n".join(map(json.dumps, rows)))
    found = find_pairs(tmp_path, other, Instrument(5))
    assert [(pair.id, pair.instrument) for pair in found.recordings] == [("sound.c", Instrument(5))]
    assert "none.wav" in found.missing[0] and "row 2" in found.missing[0]


@pytest.mark.parametrize(
    "text, message",
    [
        ("audio,mid\na.wav,b.mid\n", "row 1: it needs audio and midi"),
        ("audio,midi,split\na.wav,b.mid,dev\n", "split 'dev'"),
        ("audio,midi,program\na.wav,b.mid,200\n", "program 200: give a program"),
        ("audio,midi,tempo\na.wav,b.mid,3\n", "unknown column 'tempo'"),
        ("audio,midi\na.wav,b.mid,c\n", "unknown column 'None'"),
        ('audio,midi\n"a.wav,b.mid\n', "cannot be read as a manifest"),
    ],
)
def test_a_manifest_that_cannot_be(tmp_path, text, message):
    (tmp_path / "manifest.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        find_pairs(tmp_path)


def test_the_instrument_of_notes(tmp_path):
    """--program is for channels that name none; a manifest's is for all; drum channels stay."""
    on, off, change = smf.NOTE_ON, smf.NOTE_OFF, smf.PROGRAM_CHANGE
    events = [smf.Event(0, change, 1, 40, 0)]
    for channel in (0, 1, 9):
        events += [smf.Event(0, on, channel, 60, 90), smf.Event(100, off, channel, 60, 0)]
    (tmp_path / "a.mid").write_bytes(smf.build([sorted(events, key=lambda event: event.tick)], 100))

    def heard(instrument):
        return [(note.program, note.is_drum) for note in pairs.notes_of(tmp_path / "a.mid", instrument)]

    assert sorted(heard(None)) == [(0, False), (0, True), (40, False)]
    assert sorted(heard(Instrument(24))) == [(0, True), (24, False), (40, False)]
    assert sorted(heard(Instrument(24, always=True))) == [(0, True), (24, False), (24, False)]
    assert sorted(heard(Instrument.named("drums", ""))) == [(0, True), (0, True), (40, False)]


# --- whether they fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late, slower", [(0.0, 1.0), (0.3, 1.0), (-0.21, 1.0), (3.0, 1.0), (0.1, 1.013), (0.0, 0.98)])
def test_offset_and_stretch_are_measured(late, slower):
    notes = [note._replace(onset=note.onset + 1, offset=note.offset + 1) for note in tune(3, 40)]
    mel = mel_of(played(notes, 45, late=late, slower=slower))
    found = fit(notes, mel, stretches=slower != 1)
    assert found.is_clear
    assert found.offset == pytest.approx(late, abs=0.02)
    assert found.stretch == pytest.approx(slower, abs=0.0005)
    assert not fit(tune(4, 40), mel).is_clear and not fit(tune(4, 40), mel, stretches=True).is_clear


def test_a_late_pair_is_mended(tmp_path):
    path = write_pair(tmp_path, "late", audio=played(tune(), late=0.3))
    check = examine(only(tmp_path))
    assert not check.trouble and re.fullmatch(r"0\.(29|30|31) s late, mended", check.remark)
    assert check.pair.offset == pytest.approx(0.3, abs=0.02)
    notes, audio = CORPUS.read(check.pair)
    for note, written in zip(notes, tune(), strict=True):
        assert note.onset == pytest.approx(written.onset + 0.3, abs=0.02)
    assert len(audio) == SECONDS * SAMPLE_RATE
    assert examine(only(tmp_path), align="off").pair.offset == 0
    refused = examine(only(tmp_path), max_offset=0.2)
    assert refused.trouble == ELSEWHERE and "--max_offset 0.2" in refused.reason
    soundfile.write(path, played(tune()), SAMPLE_RATE)
    assert examine(only(tmp_path)).pair.offset == 0  # what is in place stays to the bit


def test_a_stretched_pair_is_mended_where_it_is_asked_for(tmp_path):
    write_pair(tmp_path, "slow", audio=played(tune(), slower=1.01))
    refused = examine(only(tmp_path))
    assert refused.trouble == ELSEWHERE and "slower than the notes: --align stretch" in refused.reason
    mended = examine(only(tmp_path), align="stretch")
    assert not mended.trouble and mended.pair.stretch == pytest.approx(1.01, abs=0.001)
    for note, written in zip(CORPUS.read_notes(mended.pair), tune(), strict=True):
        assert note.onset == pytest.approx(1.01 * written.onset, abs=0.03)


def test_the_wrong_midi_file_is_refused_by_name(tmp_path):
    write_pair(tmp_path, "mixed up", audio=played(tune(1)))
    check = examine(only(tmp_path))
    assert check.trouble == ELSEWHERE
    (line,) = accepted(find_pairs(tmp_path), [check]).missing
    assert line.startswith("mixed_up: the notes are nowhere in the audio")
    (picture,) = pairs_check.write_pictures(tmp_path / "pictures", [check])
    assert picture.read_bytes().startswith(b"\x89PNG")


# --- odd files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate, channels, subtype, suffix",
    [(44100, 2, "PCM_16", ".wav"), (8000, 1, "PCM_U8", ".wav"), (96000, 6, "PCM_24", ".flac"), (48000, 1, None, ".ogg"),
     (44100, 2, None, ".mp3"), (22050, 1, "FLOAT", ".aiff")],
)  # fmt: skip
def test_any_rate_channels_and_form(tmp_path, rate, channels, subtype, suffix):
    audio = played(tune(), rate=rate)
    soundfile.write(tmp_path / f"été 1{suffix}", np.repeat(audio[:, None], channels, axis=1), rate, subtype)
    (tmp_path / "été 1.mid").write_bytes(midi_bytes(tune()))
    check = examine(only(tmp_path))
    assert not check.trouble and (check.levels.rate, check.levels.channels) == (rate, channels)
    assert abs(check.pair.offset) < 0.02 or suffix == ".mp3"
    notes, read = CORPUS.read(check.pair)
    assert len(notes) == len(tune()) and len(read) / SAMPLE_RATE == pytest.approx(SECONDS, abs=0.15)
    count = min(len(read), SECONDS * SAMPLE_RATE)
    assert np.corrcoef(read[:count], played(tune())[:count])[0, 1] > 0.8 or suffix == ".mp3"


def test_silent_clipped_short_empty_and_long_files(tmp_path):
    write_pair(tmp_path / "silent", "a", audio=np.zeros(SECONDS * SAMPLE_RATE))
    both = played(tune())
    write_pair(tmp_path / "opposite", "a", audio=np.stack([both, -both], axis=1))
    write_pair(tmp_path / "short", "a", audio=played(tune())[:SAMPLE_RATE])
    write_pair(tmp_path / "cut", "a", audio=played(tune())[: 10 * SAMPLE_RATE])
    write_pair(tmp_path / "clipped", "a", audio=np.clip(20 * played(tune()), -1, 1))
    checks = {path.name: examine(only(path)) for path in tmp_path.iterdir()}
    assert checks["silent"].trouble == checks["opposite"].trouble == SILENT
    assert checks["short"].trouble == checks["cut"].trouble == SHORT
    assert "10.0 s of audio for notes up to" in checks["cut"].reason
    assert not checks["clipped"].trouble and "samples are clipped" in checks["clipped"].remark


def test_damaged_files(tmp_path):
    write_pair(tmp_path / "zero", "a").write_bytes(b"")
    write_pair(tmp_path / "text", "a").write_text("hello")
    write_pair(tmp_path / "nothing", "a", audio=np.zeros(0))
    write_pair(tmp_path / "midi", "a", midi=b"MThd")
    write_pair(tmp_path / "no notes", "a", midi=smf.build([[]], 100))
    audio = played(tune())
    audio[5] = np.nan
    soundfile.write(tmp_path / "nan.wav", audio, SAMPLE_RATE, "FLOAT")
    write_pair(tmp_path / "nan", "a").write_bytes((tmp_path / "nan.wav").read_bytes())
    (tmp_path / "nan.wav").unlink()
    for folder in sorted(tmp_path.iterdir()):
        check = examine(only(folder))
        assert check.trouble == "damaged" and check.reason and "\n" not in check.reason, folder


def test_a_recording_of_two_hours_is_refused_in_constant_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_check, "MAX_MINUTES", 0.2)
    blocks = []
    monkeypatch.setattr(pairs_check, "read_audio", blocks.append)
    write_pair(tmp_path, "long")
    check = examine(only(tmp_path))
    assert "lasts more than 0.2 minutes: cut it" in check.reason and not blocks


def test_transcripts_are_kept_beside_the_audio(tmp_path):
    soundfile.write(tmp_path / "heard.wav", played(tune()), SAMPLE_RATE)
    path = pairs.write_transcript(tmp_path / "heard.wav", lambda audio: tune())
    assert path == tmp_path / "heard.transcribed.mid" and only(tmp_path).id == "heard.transcribed"
    assert [note.pitch for note in read_midi(path)] == [note.pitch for note in tune()]
    assert pairs.write_transcript(tmp_path / "heard.wav", lambda audio: []) is None


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Twenty recordings, three of them bad: a wrong MIDI file, an empty audio file, silence; one audio file alone."""
    folder = tmp_path_factory.mktemp("twenty")
    for number in range(20):
        audio = played(tune(number, 8), 8, late=0.3 * (number == 7))
        write_pair(folder, f"take {number:02}", number, audio=audio, midi=midi_bytes(tune(number, 8)))
    (folder / "take 03.mid").write_bytes(midi_bytes(tune(99)))
    (folder / "take 05.wav").write_bytes(b"")
    soundfile.write(folder / "take 11.wav", np.zeros(8 * SAMPLE_RATE), SAMPLE_RATE)
    return folder


@pytest.mark.slow
def test_a_folder_with_bad_files(twenty, tmp_path, capsys):
    argv = ["pairs", f"--source={twenty}", f"--data_dir={tmp_path}", "--workers=1"]
    prepare_data.main([*argv, "--dry_run", f"--pictures={tmp_path / 'pictures'}"])
    told = capsys.readouterr().out
    assert "17 pairs, 2.3 minutes; left out: 1 damaged, 1 silent, 1 does not fit" in told
    assert re.search(r"take_07 .*0\.(29|30|31) s late, mended", told)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
    with pytest.raises(UserError, match=r"3 items of pairs are missing, the first: take_03: the notes are nowhere"):
        prepare_data.main(argv)
    prepare_data.main([*argv, "--skip_bad", f"--out={tmp_path / 'out'}"])
    told = capsys.readouterr().out
    assert all(f"  {name}: " in told for name in ("take_03", "take_05", "take_11"))
    splits = read_manifest(tmp_path / "out")
    assert sum(map(len, splits.values())) == 17 and all(splits.values())
    (late,) = [piece for pieces in splits.values() for piece in pieces if piece.id == "take_07"]
    assert late.read_notes()[0].onset == pytest.approx(tune(7)[0].onset + 0.3, abs=0.02)

    again = tmp_path / "again"
    argv = ["pairs", f"--source={twenty}", f"--data_dir={again}", "--workers=1", "--skip_bad"]
    killed = started(argv, start_new_session=True)
    deadline = time.monotonic() + ANY_TIME
    while len(done := list(again.glob(".pairs-*/[!.]*.npz"))) < 2:
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.01)
    killed.kill()
    killed.communicate(timeout=ANY_TIME)
    assert len(done) < 17 and not builder.is_built("pairs", again)
    prepare_data.main(argv)
    assert records("pairs", again) == records("pairs", tmp_path)


def test_flags_that_cannot_be(tmp_path):
    for argv, message in (
        (["pairs", "--source", str(tmp_path / "none")], "no folder .*none"),
        (["pairs", "--source", str(tmp_path), "--program", "128"], "--program 128: give a program"),
        (["pairs", "--source", str(tmp_path), "--max_offset", "0"], "--max_offset 0.0"),
        (["pairs", "--source", str(tmp_path), "--transcribe", "none"], "--transcribe none: give basic_pitch"),
        (["maestro", "--align", "off"], "--align is for pairs, not for maestro"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_data.main(argv)
