"""A track from the beginning is what `synthesize` plays; from elsewhere it goes on from what came before."""

import itertools

import numpy as np
import pytest

from music_synth import runs
from music_synth.studio.tracks import Memory, decoded, recorded
from tests.studio import tiny
from tests.studio.tiny import SEGMENT

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Watched:
    """A decoder that tells which segments it samples, and after what."""

    def __init__(self, decoder):
        self.decoder, self.model, self.calls = decoder, decoder.model, []
        self.tokenizer, self.tokenize = decoder.tokenizer, decoder.tokenize

    def sample_one(self, tokens, seed, number, before=None):
        self.calls.append((number, before))
        return self.decoder.sample_one(tokens, seed, number, before)


@pytest.fixture(scope="module")
def voice(quick_compilation):
    return tiny.decoder(), runs.load_inverter()


def play(decoder, inverter, notes, at=0, memory=None, change=False):
    """(first sample, audio, first frame, mel), and the parts must follow each other."""
    audio, mels = [], []
    for stretch in decoded(decoder, inverter, notes, 3, at, memory or Memory(), change):
        (audio if stretch.mel is None else mels).append(stretch)
    for parts, of in ((audio, "audio"), (mels, "mel")):
        for one, after in itertools.pairwise(parts):
            assert after.start == one.start + len(getattr(one, of))
    return (
        audio[0].start,
        np.concatenate([part.audio for part in audio]),
        mels[0].start,
        np.concatenate([part.mel for part in mels]),
    )


def test_from_the_beginning_it_is_what_synthesize_plays(voice):
    notes = tiny.notes()
    start, audio, first, mel = play(*voice, notes)
    whole = np.concatenate([part.audio for part in voice[0].play([notes], voice[1], seed=3)])
    assert start == first == 0 and len(mel) * 320 == len(audio)
    np.testing.assert_array_equal(audio, whole)


def test_a_seek_goes_on_from_what_was_made_before(voice):
    notes, memory, watched = tiny.notes(), Memory(), Watched(voice[0])
    _, _, _, whole = play(watched, voice[1], notes, memory=memory)
    assert [number for number, _ in watched.calls] == [0, 1, 2]
    start, audio, first, mel = play(watched, voice[1], notes, SEGMENT + 5, memory)
    assert len(watched.calls) == 3  # nothing is sampled again
    assert start == SEGMENT and first == 256
    np.testing.assert_array_equal(mel, whole[256:])
    assert len(audio) == len(mel) * 320


def test_a_seek_to_where_nothing_was_made_begins_a_segment_early(voice):
    watched = Watched(voice[0])
    start, _, first, _ = play(watched, voice[1], tiny.notes(), 2 * SEGMENT)
    assert (start, first) == (2 * SEGMENT, 512)
    assert [(number, before is None) for number, before in watched.calls] == [(1, True), (2, False)]


def test_a_change_makes_anew_only_what_follows(voice):
    notes, memory, watched = tiny.notes(), Memory(), Watched(voice[0])
    play(watched, voice[1], notes, memory=memory)
    before = memory.made[0].mel
    watched.calls.clear()
    other = [note._replace(program=40) for note in notes]
    play(watched, voice[1], other, SEGMENT + 100, memory, change=True)
    assert [number for number, _ in watched.calls] == [1, 2]
    assert watched.calls[0][1] is before  # goes on from what is heard
    watched.calls.clear()
    play(watched, voice[1], other, SEGMENT, memory)  # a seek instead: what came before has changed, too
    assert [(number, context is None) for number, context in watched.calls] == [(0, True), (1, False), (2, False)]


def test_only_the_newest_segments_are_kept(voice, monkeypatch):
    monkeypatch.setattr("music_synth.studio.limits.MAX_MADE", 2)
    memory = Memory()
    play(*voice, tiny.notes(), memory=memory)
    assert list(memory.made) == [1, 2]


def test_a_recording_is_played_as_it_is():
    samples = np.random.default_rng(0).integers(-9000, 9000, 100_001).astype(np.int16)
    parts = list(recorded(samples, 700))
    audio = [part for part in parts if part.mel is None]
    assert audio[0].start == 640
    np.testing.assert_array_equal(np.concatenate([part.audio for part in audio]), samples[640:])
    assert sum(len(part.mel) for part in parts if part.mel is not None) == -(-(100_001 - 640) // 320)
