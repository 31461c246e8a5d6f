"""Measures the studio in a browser, as a user has it: python scripts/measure_studio.py [--checkpoint RUN]

Starts `music_synth studio` and headless Chromium (scripts/setup.sh --browser), and prints: seconds from the command to
sound, with nothing compiled yet and again; underruns over a piece of some minutes; from a change of an instrument to
its sound; from a key to its sound in live mode. docs/studio.md has the numbers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from music_synth import errors, runs
from music_synth.midi.notes import read_midi, write_midi

PORT = 8799


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    with tempfile.TemporaryDirectory() as folder:
        long_piece(flags.piece, Path(folder) / "long.mid", 60 * flags.minutes)
        env = {**os.environ, "XDG_CACHE_HOME": folder}
        for said in ("nothing compiled before", "compiled before"):
            browser = open_browser()
            try:
                begin = time.monotonic()
                server = start(flags.checkpoint, Path(folder) / "long.mid", env)
                wait_for_sound(browser)
                print(f"sound {time.monotonic() - begin:.1f} s after the command, {said}", flush=True)
                if said == "compiled before":
                    measure(browser, flags)
            finally:
                browser.quit()
                server.send_signal(signal.SIGTERM)
                status = server.wait(20)
            print(f"SIGTERM: status {status}")


def measure(browser: Any, flags: argparse.Namespace) -> None:
    changes(browser)
    live(browser)
    browser.execute_script("studio.seek(0)")
    time.sleep(1)
    browser.execute_script("studio.audio.post({type: 'reset'})")
    until(browser, "!studio.state.playing", 60 * flags.minutes + 60)
    underruns = browser.execute_script("return studio.state.underruns")
    print(f"{flags.minutes:g} minutes: {underruns} underruns")


def changes(browser: Any) -> None:
    for number in range(20):
        browser.execute_script(
            "const s = document.querySelector('#parts select'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('change'))",
            str(8 + number),
        )
        until(browser, f"studio.state.changes.length > {number}")
        time.sleep(0.3)
    tell("a change is heard after", browser.execute_script("return studio.state.changes"))


def live(browser: Any) -> None:
    browser.execute_script(
        "const m = document.getElementById('keys-mode'); m.value = 'live'; m.dispatchEvent(new Event('change'));"
        "studio.play(false)"
    )
    until(browser, "document.getElementById('latency').textContent === 'play a key'", 60)
    for number in range(40):
        browser.execute_script("studio.keys.press(60 + arguments[0] % 12, 100)", number)
        until(browser, f"studio.keys.latencies.length > {number}")
        browser.execute_script("studio.keys.up(60 + arguments[0] % 12)", number)
        time.sleep(0.2 + 0.01 * (number % 7))
    tell("a key is heard after", browser.execute_script("return studio.keys.latencies"))
    browser.execute_script(
        "const m = document.getElementById('keys-mode'); m.value = 'phrase'; m.dispatchEvent(new Event('change'));"
        "studio.play(true)"
    )


def tell(what: str, milliseconds: list[float]) -> None:
    median, high = np.percentile(milliseconds, [50, 95])
    print(f"{what} {median:.0f} ms, 95 %: {high:.0f} ms (of {len(milliseconds)})", flush=True)


def long_piece(source: Path, target: Path, seconds: float) -> None:
    """Repeats a piece until it is so long."""
    notes = read_midi(source)
    length = max(note.offset for note in notes)
    repeated = [
        note._replace(onset=note.onset + k * length, offset=note.offset + k * length)
        for k in range(int(seconds / length) + 1)
        for note in notes
    ]
    write_midi([note for note in repeated if note.offset < seconds], target)


def start(checkpoint: str, piece: Path, env: dict[str, str]) -> subprocess.Popen:
    """Starts the studio, and returns when it has said its address."""
    command = [sys.executable, "-m", "music_synth", "studio", str(piece), "--port", str(PORT)]
    server = subprocess.Popen([*command, "--checkpoint", checkpoint], env=env, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    server.stdout.readline()  # which says where the page is
    return server


def open_browser() -> Any:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "autoplay-policy=no-user-gesture-required"):
        options.add_argument(f"--{argument}")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def wait_for_sound(browser: Any) -> None:
    """Opens the page and plays."""
    browser.get(f"http://127.0.0.1:{PORT}/")
    until(browser, "window.studio && !document.getElementById('play').disabled", 300)
    browser.execute_script("studio.play(true)")
    until(browser, "studio.state.at > 0", 300)


def until(browser: Any, condition: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not browser.execute_script(f"return {condition}"):
        if time.monotonic() > deadline:
            raise errors.UserError(f"{condition}: not within {seconds:.0f} s")
        time.sleep(0.02)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python scripts/measure_studio.py", __doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", default=runs.SHIPPED, help="of the decoder (default: the one that ships)")
    parser.add_argument("--piece", type=Path, default=Path("data/band_with_drums.mid"), help="MIDI file, repeated")
    parser.add_argument("--minutes", type=float, default=3.0, help="that it is played (default: 3)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.run(main)
