"""The command: flags, the port, and an end in order."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from music_synth.errors import UserError
from music_synth.midi.notes import write_midi
from music_synth.studio.__main__ import listen, parse_flags
from tests import tiny_runs
from tests.studio import tiny


def test_flags_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(UserError, match="--port 70000"):
        parse_flags(["--port", "70000"])
    with pytest.raises(UserError, match="there is no such file"):
        parse_flags(["--soundfont", str(tmp_path / "none.sf2")])


def test_a_port_that_is_taken_is_said_at_once():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {port} .*--port"):
            listen("127.0.0.1", port)


@pytest.mark.slow
def test_sigterm_ends_it_in_order(tmp_path, quick_compilation):
    run = tiny_runs.start(tmp_path / "run", "diffusion.gin", tiny_runs.prepare(tmp_path / "prepared"))
    write_midi(tiny.notes(), tmp_path / "a.mid")
    command = [sys.executable, "-m", "music_synth", "studio", str(tmp_path / "a.mid"), "--port", "0"]
    with subprocess.Popen([*command, "--checkpoint", str(run)], stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().removeprefix("studio: http://").rstrip("/\n")
        about = json.load(urllib.request.urlopen(f"http://{address}/api/about", timeout=60))
        assert [decoder["name"] for decoder in about["decoders"]] == ["run"]
        assert [piece["id"] for piece in about["pieces"]] == ["a"]
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
        # Where CI is set, pyfluidsynth prints a line of its own.
        assert process.stdout.read().endswith("studio: ended\n")
