"""The listener's reading against the note-ons of FluidSynth's own player."""

import importlib.util
from pathlib import Path

import pytest

from music_synth.errors import UserError

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("compare_players", ROOT / "scripts" / "compare_players.py")
compare_players = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_players)
FREEDOOM = [Path("/usr/share/games/doom") / name for name in ("freedoom1.wad", "freedoom2.wad")]


def test_onsets_are_those_of_the_player(capsys):
    cases = [ROOT / "tests/midi/cases" / f"{name}.mid" for name in ("program_change_while_held", "tempo_second_track")]
    compare_players.main([*map(str, cases), str(ROOT / "tests/golden/midi/d_orchestra.mid")])
    assert "497 notes: 3 of 3 files agree" in capsys.readouterr().out


def test_a_difference_is_seen(capsys):
    with pytest.raises(UserError, match="1 of 1 files differ"):  # FluidSynth plays both patterns at the same time
        compare_players.main([str(ROOT / "tests/midi/cases/format2_two_tracks.mid")])


@pytest.mark.slow
@pytest.mark.skipif(not all(path.exists() for path in FREEDOOM), reason="apt-get install freedoom")
def test_onsets_of_the_pieces_of_freedoom_are_those_of_the_player(capsys):
    compare_players.main(list(map(str, FREEDOOM)))
    assert "66 of 67 files agree by the player's clock, 1 more by its ticks" in capsys.readouterr().out
