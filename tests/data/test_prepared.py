"""The prepared folder and its feed: right content, pure batches, and damage that is named."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from music_synth.data.examples import cut_window
from music_synth.data.feed import Feed, open_feed
from music_synth.data.prepared import notes_from_array, notes_to_array, read_manifest, write_folder
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Events, Tokenizer
from tests.data.batches import assert_same, take

FLOAT16 = 0.004  # rounding of a log-mel between -11.6 and 6


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "made"
    write_folder(folder, made, "made", "1.0.0")
    return folder


def open_made(folder, **settings) -> Feed:
    settings = {"batch_size": 8, "seed": 5} | settings
    return open_feed(str(folder), settings.pop("tokenizer", Tokenizer()), **settings)


def test_notes_survive_storage_exactly(made):
    notes = made["train"][2].notes
    assert notes_from_array(notes_to_array(notes)) == notes
    assert notes_from_array(notes_to_array([])) == []


def test_pieces_come_back(folder, made):
    for split in made:
        stored = list(open_made(folder).pieces(split))
        assert [piece.id for piece in stored] == [piece.id for piece in made[split]]
        for piece, original in zip(stored, made[split], strict=True):
            assert piece.notes == original.notes
            assert piece.mel.dtype == np.float32
            np.testing.assert_allclose(piece.mel, original.mel, atol=FLOAT16)


@pytest.mark.parametrize("context", [True, False])
def test_batches_have_the_agreed_form(folder, context):
    batch = take(open_made(folder, context=context), 1)[0]
    expected = {
        "note_tokens": ((8, 2048), np.int32),
        "mel": ((8, 256, 128), np.float32),
        "mel_mask": ((8, 256), np.bool_),
    }
    if context:
        expected["context_mel"] = ((8, 256, 128), np.float32)
        expected["context_mask"] = ((8, 256), np.bool_)
    assert {name: (value.shape, value.dtype.type) for name, value in batch.items()} == expected


def test_every_training_row_is_a_window_of_a_piece(folder, made, find_window):
    """Tokens and mel of a row equal those cut directly from notes and audio, wherever it begins."""
    tokenizer = Tokenizer()
    pieces = [(piece.mel, Events.from_notes(piece.notes)) for piece in made["train"]]
    starts = []
    for batch in take(open_made(folder, empty_context=0.0), 6):
        for row in range(8):
            mel = batch["mel"][row]
            piece, start = find_window(mel, [mel for mel, _ in pieces])
            window = cut_window(pieces[piece][0], pieces[piece][1], tokenizer, start, 256)
            tokens = batch["note_tokens"][row]
            np.testing.assert_array_equal(tokens[: len(window.tokens)], window.tokens)
            assert not tokens[len(window.tokens) :].any()
            np.testing.assert_allclose(mel[: len(window.target)], window.target, atol=FLOAT16)
            context = batch["context_mel"][row][batch["context_mask"][row]]
            np.testing.assert_allclose(context, window.context, atol=FLOAT16)
            assert batch["mel_mask"][row].all()
            starts.append((piece, start))
    assert len(set(starts)) > 40
    assert {piece for piece, _ in starts} == set(range(5))


def test_an_epoch_covers_the_data_once(folder, made, find_window):
    """One window from each stretch of about a segment: their starts, in order, are about a segment apart."""
    feed = open_made(folder)
    frames = sum(len(piece.mel) for piece in made["train"])
    strata = round(frames / 256)
    ends = np.cumsum([len(piece.mel) for piece in made["train"]])
    mels = [piece.mel for piece in made["train"]]
    starts = []
    for batch in take(feed, -(-strata // 8)):
        for mel in batch["mel"]:
            piece, start = find_window(mel, mels)
            starts.append(start + (ends[piece - 1] if piece else 0))
    starts = np.sort(starts[:strata])
    bounds = np.arange(strata + 1) * frames // strata
    assert (bounds[:-1] <= starts).all() and (starts < bounds[1:]).all()


def test_batch_is_a_function_of_seed_and_number(folder):
    batches = take(open_made(folder), 30)
    for resumed, batch in zip(take(open_made(folder), 5, start_step=25), batches[25:], strict=True):
        assert_same(resumed, batch)
    with pytest.raises(AssertionError):
        assert_same(take(open_made(folder, seed=6), 1)[0], batches[0])
    with pytest.raises(AssertionError):
        assert_same(batches[0], batches[1])


def test_empty_context_share(folder):
    def share(empty_context):
        batches = take(open_made(folder, empty_context=empty_context), 40)
        return np.mean([~mask.any() for batch in batches for mask in batch["context_mask"]])

    assert share(1.0) == 1.0
    assert share(0.0) < 0.03
    assert abs(share(0.3) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 320) + 0.03


def test_evaluation_covers_every_frame_once(folder, made):
    batches = list(open_made(folder).eval_batches("train"))
    total = sum(batch["mel_mask"].sum() for batch in batches)
    assert total == sum(len(piece.mel) for piece in made["train"])
    assert_same(batches[-1], list(open_made(folder, seed=9).eval_batches("train"))[-1])


def test_windows_with_too_many_tokens_are_skipped_and_counted(folder):
    lengths = [(batch["note_tokens"] > 0).sum(axis=1) for batch in take(open_made(folder), 10)]
    limit = int(np.median(lengths))
    feed = open_made(folder, tokenizer=Tokenizer(max_tokens=limit))
    batches = take(feed, 10)
    assert feed.num_skipped > 10
    assert all(
        batch["note_tokens"].shape == (8, limit) and (batch["note_tokens"] == 1).any(1).all() for batch in batches
    )
    resumed = open_made(folder, tokenizer=Tokenizer(max_tokens=limit))
    assert_same(take(resumed, 1, start_step=9)[0], batches[9])
    with pytest.raises(UserError, match="max_tokens"):
        take(open_made(folder, tokenizer=Tokenizer(max_tokens=2)), 1)


def test_no_tensorflow_is_loaded(folder):
    script = (
        "import sys\n"
        "from music_synth.data.feed import open_feed\n"
        "from music_synth.midi.tokenizer import Tokenizer\n"
        f"next(open_feed({str(folder)!r}, Tokenizer(), 2).train_batches())\n"
        "print([name for name in ('tensorflow', 'seqio', 'note_seq', 'librosa') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- damage ---


@pytest.fixture
def copy(made, tmp_path):
    folder = tmp_path / "copy"
    write_folder(folder, {"train": made["validation"], "validation": made["test"]}, "made", "1.0.0")
    return folder


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged"),
        (lambda f: edit_manifest(f, splits={"train": [{}]}), "damaged"),
        (lambda f: edit_manifest(f, version=99), "version 99"),
        (lambda f: edit_manifest(f, format="other"), "'other'"),
        (lambda f: edit_manifest(f, mel={"num_mels": 80}), "num_mels"),
        (lambda f: (f / "train/00001.mel.npy").unlink(), "train/00001.mel.npy is missing"),
        (lambda f: (f / "train/00000.notes.npy").unlink(), "train/00000.notes.npy is missing"),
        (lambda f: os.truncate(f / "train/00000.mel.npy", 5000), "has 5000 bytes"),
        (lambda f: (f / "validation/00000.mel.npy").write_bytes(b""), "has 0 bytes"),
    ],
)
def test_damaged_folder_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as error:
        open_made(copy)
    assert "prepare_data" in str(error.value)


def test_damage_inside_an_array_is_named(copy):
    path = copy / "train/00000.mel.npy"
    path.write_bytes(b"not numpy" + path.read_bytes()[9:])
    with pytest.raises(UserError, match=r"train/00000.mel.npy .*damaged .it cannot be read: the magic string"):
        take(open_made(copy), 3)
    notes = np.load(copy / "validation/00000.notes.npy")
    notes[0, 0] = 200
    np.save(copy / "validation/00000.notes.npy", notes)
    with pytest.raises(UserError, match=r"pitch=200"):
        list(open_made(copy).eval_batches())
    np.save(copy / "validation/00000.notes.npy", notes.astype(np.int64))
    with pytest.raises(UserError, match=r"int64"):
        list(open_made(copy).eval_batches())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4])
def test_a_mel_that_is_none_is_named(copy, value):
    """Not the checkpoint is to blame when its loss is NaN."""
    for split, index in (("train", 1), ("validation", 0)):
        path = copy / f"{split}/{index:05d}.mel.npy"
        mel = np.load(path)
        mel[100, 7] = value
        np.save(path, mel)
    place = rf"{{}} \(piece {{}}\) is damaged \({np.float16(value)} in frame 100, at 2.00 s\): prepare the folder again"
    with pytest.raises(UserError, match=place.format("train/00001.mel.npy", "validation-1")):
        take(open_made(copy), 20)
    with pytest.raises(UserError, match=place.format("validation/00000.mel.npy", "test-0")):
        list(open_made(copy).eval_batches())
    with pytest.raises(UserError, match=place.format("validation/00000.mel.npy", "test-0")):
        list(open_made(copy).pieces("validation"))


def test_a_header_that_lies_is_named(copy):
    path = copy / "train/00000.mel.npy"
    mel = np.load(path)
    for array, what in ((mel[:-1], r"float16 \(549, 128\) instead of"), (np.asfortranarray(mel), "rows and columns")):
        size = path.stat().st_size
        np.save(path, array)
        os.truncate(path, size)  # the manifest's size
        with pytest.raises(UserError, match=rf"00000.mel.npy \(piece validation-0\) is damaged \({what}"):
            take(open_made(copy), 3)
        with pytest.raises(UserError, match=what):
            list(open_made(copy).eval_batches("train"))


def break_something(folder, rng):
    """Damages the manifest or an array: cut, flipped, exchanged, gone, something else in its place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, other = (files[i] for i in rng.permutation(len(files))[:2])
    if rng.random() < 0.4:
        path = folder / "manifest.json"
    content = bytearray(path.read_bytes())
    place = int(rng.integers(min(len(content), 400)) if rng.random() < 0.7 else rng.integers(len(content)))
    match rng.integers(8):
        case 0:
            path.write_bytes(content[:place])
        case 1:
            path.unlink()
        case 2:
            path.write_bytes(other.read_bytes())
        case 3:
            path.unlink()
            path.mkdir()
        case 4:  # a number of the manifest, or a byte
            digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()] or [place]
            content[digits[int(rng.integers(len(digits)))]] = ord(rng.choice(list("0123456789eE-.n")))
            path.write_bytes(content)
        case 5:
            path.write_bytes(content[:place] + rng.bytes(int(rng.integers(1, 9))) + content[place:])
        case _:
            content[place] ^= 1 << rng.integers(8)
            path.write_bytes(content)
    return path


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_whatever_is_damaged_is_told_in_one_line(made, tmp_path, count):
    pieces = [dataclasses.replace(piece, mel=piece.mel[:40], notes=piece.notes[:9]) for piece in made["train"][:2]]
    whole = tmp_path / "whole"
    write_folder(whole, {"train": pieces, "validation": pieces[:1]}, "made", "1.0.0", audio=True)
    told = 0
    for seed in range(count):
        folder = tmp_path / "broken"
        shutil.copytree(whole, folder)
        path = break_something(folder, np.random.default_rng(seed))
        try:
            feed = open_made(folder, batch_size=2)
            take(feed, 2)
            list(feed.eval_batches("train"))
            assert all(
                np.isfinite(piece.mel).all() for split in ("train", "validation") for piece in feed.pieces(split)
            )
        except UserError as error:
            told += 1
            assert str(folder) in str(error) and "\n" not in str(error), (seed, path)
        shutil.rmtree(folder)
    assert told > count // 2


@pytest.mark.parametrize("files", ["../train/00000", "/train/00000"])
def test_nothing_outside_the_folder_is_read(copy, files):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"][0]["files"] = files
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="lies outside"):
        open_made(copy)


def test_unknown_folder_and_split(folder, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        open_made(tmp_path / "nowhere")
    with pytest.raises(UserError, match="train, validation, test"):
        next(open_made(folder).pieces("holdout"))
    with pytest.raises(UserError, match="holdout"):
        next(open_made(folder).eval_batches("holdout"))


def test_settings_out_of_range(folder):
    with pytest.raises(UserError, match="empty_context = 2"):
        open_made(folder, empty_context=2)
    with pytest.raises(UserError, match="batch_size = 0"):
        open_made(folder, batch_size=0)


def test_existing_things_are_not_overwritten(copy, made, tmp_path):
    with pytest.raises(UserError, match="not empty"):
        write_folder(copy, made, "made", "1.0.0")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        write_folder(file, made, "made", "1.0.0")
    with pytest.raises(UserError, match="cannot write"):
        write_folder(file / "below", made, "made", "1.0.0")


def test_interrupted_writing_leaves_nothing(made, tmp_path):
    def pieces():
        yield from made["validation"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", {"train": pieces()}, "made", "1.0.0")
    assert list(tmp_path.iterdir()) == []


def test_manifest_lists_what_is_there(folder, made):
    splits = read_manifest(folder)
    assert {split: [(p.id, p.num_frames, p.num_notes) for p in pieces] for split, pieces in splits.items()} == {
        split: [(p.id, len(p.mel), len(p.notes)) for p in pieces] for split, pieces in made.items()
    }


def test_task_without_tensorflow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "music_synth.data.seqio_windows", None)  # importing it fails
    with pytest.raises(UserError, match=r"pip install 'music_synth\[data\]', or train on a folder"):
        open_feed("maestro", Tokenizer(), 8)


@pytest.fixture(scope="module")
def colored(made, tmp_path_factory):
    """The made pieces, every other one of a known timbre."""
    pieces = {
        split: [dataclasses.replace(piece, timbre=("hall", "")[index % 2]) for index, piece in enumerate(made[split])]
        for split in made
    }
    folder = tmp_path_factory.mktemp("prepared") / "colored"
    write_folder(folder, pieces, "made", "1.0.0")
    return folder


def test_windows_name_the_timbre_of_their_piece(folder, colored):
    tokenizer = Tokenizer(timbres=("room", "hall"))  # whose order is the tokenizer's, not the folder's
    token = tokenizer.vocabulary.end_id + 1
    assert [piece.timbre for piece in open_made(colored).pieces("train")] == ["hall", "", "hall", "", "hall"]
    plain, kept, dropped = (
        take(open_made(source, tokenizer=tokenizer, timbre_dropout=dropout), 20)
        for source, dropout in ((folder, 0.0), (colored, 0.0), (colored, 0.5))
    )
    first = {name: np.concatenate([batch["note_tokens"][:, 0] for batch in batches]) == token
             for name, batches in (("plain", plain), ("kept", kept), ("dropped", dropped))}  # fmt: skip
    assert not first["plain"].any()
    assert 0.35 < first["kept"].mean() < 0.9
    assert 0.35 < first["dropped"].sum() / first["kept"].sum() < 0.65
    for before, after in zip(plain, kept, strict=True):  # the same windows, but for what names the timbre
        np.testing.assert_array_equal(before["mel"], after["mel"])
        for one, other in zip(before["note_tokens"], after["note_tokens"], strict=True):
            named = other[0] == token
            np.testing.assert_array_equal(one[:-1] if named else one, other[1:] if named else other)
    strangers = take(open_made(colored, tokenizer=Tokenizer(timbres=("attic",))), 1)
    assert_same(strangers[0], take(open_made(folder), 1)[0])


def test_evaluation_names_the_timbre(colored):
    tokenizer = Tokenizer(timbres=("hall",))
    batch = next(open_made(colored, tokenizer=tokenizer).eval_batches("validation"))
    assert batch["note_tokens"][0, 0] == tokenizer.vocabulary.end_id
