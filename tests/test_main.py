"""The command `music_synth`: its sub-commands, and what it says of others."""

import importlib
import subprocess
import sys

import pytest

from music_synth import __main__ as entry
from music_synth import __version__, synthesize
from music_synth.errors import UserError


def test_every_command_is_that_of_a_module(capsys):
    entry.main([])
    listed = capsys.readouterr().out
    for name, (module, about) in entry.COMMANDS.items():
        assert callable(importlib.import_module(f"music_synth.{module}").main)
        assert f"\n  {name} " in listed and about in listed


def test_arguments_reach_the_command(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(synthesize, "main", seen.append)
    entry.main(["play", "in.mid", "--seed=1"])
    assert seen == [["in.mid", "--seed=1"]]
    entry.main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"
    with pytest.raises(UserError, match="no command 'sing': choose from play, studio, train"):
        entry.main(["sing"])


def test_it_starts_as_a_module_without_importing_jax():
    code = "import sys; from music_synth.__main__ import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
