import collections
import dataclasses
import hashlib
import itertools
import random
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from music_synth.audio import io
from music_synth.audio.mel import SAMPLE_RATE, log_mel
from music_synth.data import synthetic
from music_synth.data.composer import ensembles, lines, score, theory, wide
from music_synth.data.composer.instruments import pitch_range
from music_synth.data.synthetic import KINDS, SPLITS, PieceSpec, compose, plan_split, render
from music_synth.errors import UserError
from music_synth.midi import players, smf
from music_synth.midi.notes import parse_midi, read_midi
from music_synth.midi.tokenizer import Tokenizer

MINUTES = 40


@pytest.fixture(scope="module")
def specs():
    return {split: plan_split(split, MINUTES) for split in SPLITS}


@pytest.fixture(scope="module")
def pieces(specs):
    """id -> (spec, MIDI bytes) of the whole default data set; under two seconds."""
    return {spec.id: (spec, compose(spec)) for split in SPLITS for spec in specs[split]}


@pytest.fixture(scope="module")
def notes(pieces):
    return {name: read_midi(midi, as_published=True) for name, (_, midi) in pieces.items()}


def test_plan_is_as_long_as_asked(specs, notes):
    seconds = {split: sum(max(n.offset for n in notes[spec.id]) for spec in specs[split]) for split in SPLITS}
    assert seconds["train"] / 60 == pytest.approx(40, abs=2)
    assert seconds["validation"] / 60 == pytest.approx(5, abs=0.7)
    assert seconds["test"] / 60 == pytest.approx(5, abs=0.7)
    assert len(plan_split("train", 400)) == pytest.approx(10 * len(specs["train"]), abs=5)
    assert [spec.kind for spec in plan_split("test", 0.01)] == ["piano"]


def test_same_seed_same_bytes(pieces):
    for spec in plan_split("validation", MINUTES):
        assert compose(spec) == pieces[spec.id][1]
    other = plan_split("validation", MINUTES, seed=1)[0]
    assert compose(other) != pieces[other.id][1]


def test_same_bytes_in_another_process(pieces):
    """Neither hash randomization nor what ran before has a say."""
    code = (
        "import hashlib; from music_synth.data.synthetic import *\n"
        f"for s in plan_split('test', {MINUTES}): print(s.id, hashlib.sha256(compose(s)).hexdigest())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines_ = dict(line.split() for line in result.stdout.splitlines())
    assert len(lines_) >= 6
    for name, digest in lines_.items():
        assert hashlib.sha256(pieces[name][1]).hexdigest() == digest


def test_no_piece_in_two_splits(pieces, notes):
    assert len({midi for _, midi in pieces.values()}) == len(pieces)
    # Nor the same music played differently: pitches in order of onset.
    tunes = {
        tuple(n.pitch for n in sorted(ns, key=lambda n: (round(n.onset, 1), n.pitch)) if not n.is_drum)[:60]
        for ns in notes.values()
    }
    assert len(tunes) == len(pieces)


def test_balance_and_casts(specs, notes):
    kinds = collections.Counter(spec.kind for spec in specs["train"])
    assert set(kinds) == set(KINDS) and max(kinds.values()) - min(kinds.values()) <= 1
    heard = {n.program for spec in specs["train"] for n in notes[spec.id] if not n.is_drum}
    assert len(heard) >= 100 and {p // 8 for p in heard} == set(range(16))
    for split in ("validation", "test"):
        assert {spec.kind for spec in specs[split]} == set(KINDS)
        held_out = {n.program for spec in specs[split] for n in notes[spec.id] if not n.is_drum}
        assert len(held_out) >= 20 and held_out <= heard
        drums = [any(n.is_drum for n in notes[spec.id]) for spec in specs[split] if spec.kind == "band"]
        assert drums and all(drums)


def test_half_of_the_pieces_may_be_dry():
    specs = plan_split("train", 20, half_dry=True)
    for kind in KINDS:
        reverbs = [spec.reverb for spec in specs if spec.kind == kind]
        assert reverbs == [i % 2 == 0 for i in range(len(reverbs))] and len(reverbs) > 2
    assert [dataclasses.replace(spec, reverb=True) for spec in specs] == plan_split("train", 20)
    midi = compose(PieceSpec("piano", "piano", (0,), "seed", 4.0))
    wet, dry = render(midi), render(midi, reverb=False)
    assert len(dry) < len(wet) and np.abs(wet[: len(dry)] - dry).max() > 1e-3


def test_pieces_are_of_a_size_to_learn_from(pieces, notes):
    lengths = []
    for name, (spec, _) in pieces.items():
        seconds = max(n.offset for n in notes[name])
        assert 30 <= seconds <= 62 and len(notes[name]) > 60, name
        counts = [len(tokens) for tokens in Tokenizer().encode(notes[name])]
        assert max(counts) < 1000, "far from the limit of 2047"
        lengths += counts
        assert 1 <= len({n.program for n in notes[name]}) <= len(spec.programs) + 1
    assert 80 < np.median(lengths) < 300


def test_notes_fit_their_instruments_and_never_overlap(notes, pieces):
    for name, (_, midi) in pieces.items():
        keys = collections.defaultdict(list)
        for n in parse_midi(midi)[0]:  # as the keys were held, without pedal
            assert 25 <= n.velocity <= 120 and n.offset - n.onset > 0.03
            if n.is_drum:
                assert 35 <= n.pitch <= 81
            else:
                low, high = pitch_range(n.program)
                assert low - 8 <= n.pitch <= high + 12, (name, n)
            keys[n.is_drum, n.program, n.pitch].append((n.onset, n.offset))
        for spans in keys.values():
            spans.sort()
            assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))


def test_pieces_breathe(notes):
    """There are moments without an onset for a while, and timing is not a grid."""
    for name, ns in notes.items():
        onsets = np.unique([n.onset for n in ns])
        assert np.diff(onsets).max() > 0.25, name
        beats = np.mod(onsets * 1000, 1)
        assert len(np.unique(beats.round(2))) > 10, name


def test_pedal(specs, pieces):
    piano = [pieces[spec.id][1] for spec in specs["train"] if spec.kind == "piano"]
    pedals = [parse_midi(midi)[1] for midi in piano]
    assert sum(len(p) > 10 for p in pedals) > len(piano) / 2
    for pedal in pedals:
        assert not pedal or pedal[-1].value == 0, "the pedal is up at the end"


def test_music_is_tonal(notes, specs):
    """Pitches of a piece mostly belong to one key and its relative: seven or eight of twelve pitch classes."""
    for spec in specs["train"]:
        classes = np.zeros(12)
        for n in notes[spec.id]:
            if not n.is_drum:
                classes[n.pitch % 12] += min(2.0, n.offset - n.onset)
        assert np.sort(classes)[-8:].sum() > 0.97 * classes.sum(), spec.id


class Heard(NamedTuple):
    """What there is in pieces, of all of them together."""

    velocities: list[int]
    programs: set[int]
    strokes: set[int]  # of drums
    volumes: set[int]
    swells: int  # pieces with expression
    silences: list[float]  # the longest in each piece, seconds
    densities: list[float]  # notes a second of each piece
    tempi: list[float]
    changing: int  # pieces with a change of tempo by a fifth and more

    @classmethod
    def of(cls, specs):
        heard = cls([], set(), set(), set(), 0, [], [], [], 0)
        for spec in specs:
            midi = compose(spec)
            notes = read_midi(midi)
            events = [event for track in smf.parse(midi).tracks for event in track]
            controls = [event for event in events if event.kind == smf.CONTROL_CHANGE]
            ends = np.maximum.accumulate([note.offset for note in notes])
            heard.velocities.extend(note.velocity for note in notes)
            heard.programs.update(note.program for note in notes if not note.is_drum)
            heard.strokes.update(note.pitch for note in notes if note.is_drum)
            heard.volumes.update(event.b for event in controls if event.a == players.VOLUME)
            heard.silences.append(max(np.array([note.onset for note in notes[1:]]) - ends[:-1]))
            heard.densities.append(len(notes) / ends[-1])
            tempi = [60e6 / event.a for event in events if event.kind == smf.TEMPO]
            heard.tempi.extend(tempi)
            heard = heard._replace(
                swells=heard.swells + any(event.a == players.EXPRESSION for event in controls),
                changing=heard.changing + any(not 5 / 6 < b / a < 1.2 for a, b in itertools.pairwise(tempi)),
            )
        return heard


def test_the_wider_composer_is_wider():
    specs, wide_specs = (plan_split("train", 9, wide=wider) for wider in (False, True))
    assert [dataclasses.replace(spec, wide=False) for spec in wide_specs] == specs and len(specs) == 12
    plain, wider = Heard.of(specs), Heard.of(wide_specs)
    assert np.std(wider.velocities) > 1.8 * np.std(plain.velocities)
    assert min(wider.velocities) < 20 and max(wider.velocities) > 115
    assert len(wider.volumes) > 3 * len(plain.volumes) and wider.swells >= 6 > plain.swells
    assert np.median(wider.silences) > 3 > max(plain.silences)
    assert min(wider.densities) < 0.9 * min(plain.densities) and max(wider.densities) > 1.1 * max(plain.densities)
    assert len(wider.strokes) > 2 * len(plain.strokes)
    assert max(wider.tempi) > 1.2 * max(plain.tempi) and wider.changing >= 3 > plain.changing


def test_the_wider_composer_uses_all_meters_and_programs():
    meters = {ensembles.make_plan(random.Random(seed), 30, (60, 90), wider=True).meter for seed in range(60)}
    assert meters == {2, 3, 4, 5, 6, 7}
    programs = set()
    for seed in range(5000):
        part = score.Part(40, tones=[score.Tone(0.0, 1.0, 60)])
        wide._recast(part, random.Random(seed))
        programs.add(part.program)
    assert programs == set(range(128))


def test_the_wider_composer_repeats_itself_byte_for_byte():
    """As in the version that data sets are named after: another composer needs another version."""
    composed = {spec.id: compose(spec) for spec in plan_split("test", MINUTES, wide=True)}
    digest = hashlib.sha256(b"".join(composed.values())).hexdigest()
    assert synthetic.VERSION == "1.0.0" and digest.startswith("e5b7e7cbf2da51dc")
    for name, midi in composed.items():
        for note in parse_midi(midi)[0]:
            low, high = (35, 81) if note.is_drum else pitch_range(note.program)
            assert low - 8 <= note.pitch <= high, (name, note)


def test_editions_by_the_wider_composer_have_names_of_their_own():
    edition = synthetic.Edition.named("0.5min_seed1_wide")
    assert edition == synthetic.Edition(0.5, 1, wide=True) and edition.name == "0.5min-seed1-wide"
    assert all(spec.wide for spec in edition.plan("train"))


@pytest.mark.parametrize("kind", KINDS)
def test_render_short_piece(kind):
    spec = next(spec for spec in plan_split("train", MINUTES) if spec.kind == kind)
    short = PieceSpec(spec.id, kind, spec.programs, "short", 6.0)
    midi = compose(short)
    audio = render(midi)
    assert audio.dtype == np.float32 and 0.05 < np.abs(audio).max() <= io.MAX_PEAK
    end = max(n.offset for n in read_midi(midi, as_published=True))
    assert end < len(audio) / SAMPLE_RATE < end + 8 and end < 25
    assert np.abs(audio[-800:]).max() < 0.001, "everything has rung out"


def test_notes_sound_where_they_are_written():
    """At an onset of the piano the mel channel of its pitch grows; between onsets it does not."""
    spec = PieceSpec("p", "piano", (0,), "where", 12.0)
    midi = compose(spec)
    mel = log_mel(render(midi), np)
    growth = {"on": [], "off": []}
    rng = random.Random(0)
    for n in read_midi(midi, as_published=True):
        hz = 440 * 2 ** ((n.pitch - 69) / 12)
        channel = round(np.log1p(hz / 700) / np.log1p(8000 / 700) * 129) - 1
        band = slice(max(0, channel - 1), channel + 2)
        for key, time in (("on", n.onset), ("off", rng.uniform(0.5, n.onset + 0.5))):
            k = int(time * 50)  # the frame that begins just before
            growth[key].append(mel[k + 1 : k + 4, band].max() - mel[max(0, k - 3) : k - 1, band].max(initial=-12))
    assert np.median(growth["on"]) > 1.0 and np.mean(np.array(growth["on"]) > 0.2) > 0.85
    assert abs(np.median(growth["off"])) < 0.5


def test_unknown_choices():
    with pytest.raises(UserError, match=r"'polka'.*piano, guitar"):
        PieceSpec("x", "polka", (0,), "s", 30.0)
    with pytest.raises(UserError, match="seconds"):
        PieceSpec("x", "piano", (0,), "s", 0.0)
    with pytest.raises(UserError, match=r"'dev'.*validation"):
        plan_split("dev", 40)
    for minutes in (0, -1, float("nan")):
        with pytest.raises(UserError, match="minutes"):
            plan_split("train", minutes)


def test_command_writes_a_piece(tmp_path):
    arguments = ["--kind", "winds", "--seed", "5", "--seconds", "12", "--out"]
    for name in ("a.mid", "b.mid"):
        synthetic.main([*arguments, str(tmp_path / name)])
    assert (tmp_path / "a.mid").read_bytes() == (tmp_path / "b.mid").read_bytes()
    assert len(read_midi(tmp_path / "a.mid", as_published=True)) > 10
    with pytest.raises(UserError, match="polka"):
        synthetic.main(["--kind", "polka", "--out", str(tmp_path / "c.mid")])
    with pytest.raises(UserError, match="no folder"):
        synthetic.main(["--kind", "band", "--out", str(tmp_path / "none" / "c.mid")])


# --- theory, lines, score ---


def test_chords():
    c_major, a_minor = theory.Key(0, "major"), theory.Key(9, "minor")
    assert c_major.chord(0, 0, 4).classes == (0, 4, 7)
    assert c_major.chord(4, 0, 4, seventh=True).classes == (7, 11, 2, 5)
    assert a_minor.chord(4, 0, 4).classes == (4, 8, 11), "the dominant of a minor key is major"
    assert c_major.relative() == a_minor and a_minor.relative() == c_major


def test_voicings_move_little_and_hold_every_tone():
    key = theory.Key(2, "major")
    chords = [key.chord(d, 4.0 * i, 4.0) for i, d in enumerate((0, 4, 5, 3, 1, 4, 0))]
    voicings = theory.voicings(chords, 50, 70, 3)
    for chord, pitches in zip(chords, voicings, strict=True):
        assert {p % 12 for p in pitches} == set(chord.classes)
        assert sorted(pitches) == list(pitches) and 50 <= pitches[0] and pitches[-1] <= 70
    steps = [abs(a - b) for one, two in itertools.pairwise(voicings) for a, b in zip(one, two, strict=True)]
    assert max(steps) <= 5 and np.mean(steps) < 3


def test_closed_phrase_ends_on_the_tonic():
    for seed in range(20):
        rng = random.Random(seed)
        key = theory.Key(seed % 12, ("major", "minor")[seed % 2])
        phrase = theory.harmonize(rng, key, "A", 0.0, 4, closed=True, sevenths=0.5)
        assert phrase.chords[-1].classes[0] == key.tonic and phrase.end == 16
        tune = lines.melody(rng, phrase, 60, 77, "flowing")
        assert tune[-1].pitch % 12 == key.tonic
        assert all(60 <= t.pitch <= 77 and 0 <= t.beat < 16 for t in tune)
        assert all(t.pitch % 12 in phrase.chord_at(t.beat).scale for t in tune)


def test_bars_are_full():
    for meter, moods in lines.RHYTHMS.items():
        for bar in [*(bar for bars in moods.values() for bar in bars), *lines.LAST_BARS[meter]]:
            assert sum(map(abs, bar)) == meter
    for line in (line for groove in lines.GROOVES.values() for line in groove.values()):
        assert len(line) in (8, 12, 16, 20, 24, 28) and set(line) <= set("xX.")


def test_unison_of_one_program_is_one_note():
    tones = [score.Tone(0.0, 1.0, 60)]
    both = [score.Part(40, tones=tones, spread=0.0), score.Part(40, tones=tones, spread=0.0)]
    played = score.perform(score.Score([(0.0, 120.0)], [(0.0, 80.0)], both), random.Random(0))
    assert len(played) == 1 and played[0].start == 0 and played[0].end == score.TICKS_PER_BEAT


def test_tempo_and_program_reach_the_file():
    part = score.Part(33, volume=77, spread=0.0, tones=[score.Tone(2.0, 1.0, 40)], pedals=[(2.5, 127), (3.5, 0)])
    midi = score.to_midi(score.Score([(0.0, 60.0), (2.0, 120.0)], [(0.0, 80.0)], [part]), random.Random(0))
    (note,), pedals = parse_midi(midi)
    assert (note.program, note.pitch) == (33, 40)
    assert (note.onset, note.offset) == pytest.approx((2.0, 2.5))
    assert [(p.time, p.value) for p in pedals] == [pytest.approx((2.25, 127)), pytest.approx((2.75, 0))]
    kinds = {(e.kind, e.a): e.b for track in smf.parse(midi).tracks for e in track}
    assert kinds[smf.CONTROL_CHANGE, players.VOLUME] == 77
