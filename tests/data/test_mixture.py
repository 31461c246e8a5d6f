"""Mixtures of prepared folders: each has its share, and a batch depends on seed and number alone."""

import dataclasses
import itertools

import numpy as np
import pytest

from music_synth.data.feed import Feed
from music_synth.data.mixture import members_of
from music_synth.data.prepared import write_folder
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer

TOKENIZER = Tokenizer(timbres=("first", "second"))


@pytest.fixture(scope="module")
def folders(made, tmp_path_factory):
    """The same pieces twice, told apart by their timbres; the second folder has two of five training pieces."""
    parent = tmp_path_factory.mktemp("mixture")
    for name, count in (("first", 5), ("second", 2)):
        pieces = {
            split: [dataclasses.replace(piece, timbre=name) for piece in made[split][:count]] for split in made
        }  # fmt: skip
        write_folder(parent / name, pieces, "made", "1.0.0")
    return parent / "first", parent / "second"


def open_mixture(task, **settings):
    return Feed(task=task, tokenizer=TOKENIZER, batch_size=20, timbre_dropout=0.0, **settings)


def take(feed, count, start_step=0):
    return list(itertools.islice(feed.train_batches(start_step), count))


def share_of_second(feed, num_batches=100):
    first = np.concatenate([batch["note_tokens"][:, 0] for batch in take(feed, num_batches)])
    return float((first == TOKENIZER.vocabulary.end_id + 1).mean())


def test_each_folder_has_its_share(folders, made):
    first, second = folders
    assert share_of_second(open_mixture(f"{first}=3,{second}=1"), 50) == pytest.approx(0.25, abs=0.002)
    frames = [sum(len(piece.mel) for piece in made["train"][:count]) for count in (5, 2)]
    expected = frames[1] / sum(frames)
    assert share_of_second(open_mixture(f"{first}, {second}"), 50) == pytest.approx(expected, abs=0.002)


def test_batches_depend_on_seed_and_number_alone(folders):
    task = ",".join(map(str, folders))
    batches = take(open_mixture(task), 55)
    for name, value in take(open_mixture(task), 1, start_step=54)[0].items():  # in the second round of 1,000
        np.testing.assert_array_equal(value, batches[54][name])
    other = take(open_mixture(task, seed=1), 1)[0]
    assert not np.array_equal(other["note_tokens"], batches[0]["note_tokens"])


def test_a_folders_own_examples_come_in_their_own_order(folders):
    """Those of the first folder, among the mixture's, are the first ones of that folder alone, in order."""
    first, second = folders
    mixed = take(open_mixture(f"{first}=1,{second}=1"), 5)
    alone = np.concatenate([batch["mel"] for batch in take(open_mixture(str(first)), 5)])
    tokens = np.concatenate([batch["note_tokens"][:, 0] for batch in mixed])
    found = np.concatenate([batch["mel"] for batch in mixed])[tokens == TOKENIZER.vocabulary.end_id]
    assert 30 < len(found) < 70
    np.testing.assert_array_equal(found, alone[: len(found)])


def test_held_out_pieces_are_those_of_all(folders, made):
    pieces = list(open_mixture(",".join(map(str, folders))).pieces("validation"))
    ids = [piece.id for piece in made["validation"]]
    assert [piece.id for piece in pieces] == 2 * ids
    assert [piece.timbre for piece in pieces] == ["first"] * 2 + ["second"] * 2


@pytest.mark.parametrize(
    "task, said",
    [
        ("a=1,b", "all members a weight, or none"),
        ("a=1,b=x", "b=x .*FOLDER=WEIGHT"),
        ("a=1,b=-2", "b=-2 .*positive"),
        ("a=1,b=nan", "b=nan .*positive"),
        ("maestro,urmp", "maestro .*prepared folders"),
        ("/nowhere/a,/nowhere/b", "no folder /nowhere/a"),
    ],
)
def test_refuses(task, said):
    with pytest.raises(UserError, match=said):
        open_mixture(task)


def test_a_folder_with_a_comma_is_one(tmp_path):
    path = tmp_path / "a,b=2"
    path.mkdir()
    assert members_of(str(path)) == {str(path): None}


def test_what_is_rehearsed_is_a_share_of_training_and_is_not_held_out(folders, made):
    first, second = folders
    feed = open_mixture(str(first), rehearsal=str(second), rehearsal_share=0.3)
    assert share_of_second(feed, 50) == pytest.approx(0.3, abs=0.002)
    assert [piece.timbre for piece in feed.pieces("validation")] == ["first"] * len(made["validation"][:5])
    three = open_mixture(f"{first}=1,{second}=1", rehearsal=f"{first}, {second}", rehearsal_share=0.5)
    later = take(three, 2, start_step=3)
    for batch, again in zip(take(three, 5)[3:], later, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
    with pytest.raises(UserError, match=r"Feed\.rehearsal mixes prepared folders, and 'maestro' is none"):
        open_mixture(str(first), rehearsal="maestro")
    with pytest.raises(UserError, match=r"Feed\.rehearsal_share = 1\.0"):
        open_mixture(str(first), rehearsal=str(second), rehearsal_share=1.0)
