"""The page in a real browser: what is heard, seen, changed, compared, played on keys and saved.

`listen` collects the samples that the AudioWorklet puts out.
"""

import contextlib
import os
import shutil
import statistics
import time

import numpy as np
import pytest
import soundfile

from music_synth.audio.io import audio_from_int16, audio_to_int16, audio_writer
from music_synth.midi.notes import read_midi, write_midi
from tests.studio import tiny

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium and chromedriver: scripts/setup.sh --browser"),
]
COLLECT = """
const [done] = arguments;
const parts = studio.state.tap, whole = new Float32Array(parts.reduce((n, part) => n + part.length, 0));
let at = 0;
for (const part of parts) { whole.set(part, at); at += part.length; }
const bytes = new Uint8Array(whole.buffer);
let text = "";
for (let i = 0; i < bytes.length; i += 30000) text += String.fromCharCode(...bytes.subarray(i, i + 30000));
return btoa(text);
"""


def waiting() -> float:
    """How many processes want each core, at least 1: so much longer takes what is timed here."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


class Page:
    """The studio in a browser."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def until(self, condition, seconds=30.0):
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(f"return {condition}")):
            assert time.monotonic() < deadline, f"{condition}; the page says {self.find('header').text}"
            time.sleep(0.05)
        return value

    def open(self, query=""):
        self.driver.get(f"http://{self.address}/{query}")
        self.until("window.studio && studio.state.ready && studio.state.piece && studio.state.job")

    def click(self, id):
        self.driver.find_element("id", id).click()

    def choose(self, element, value):
        self.js("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", element, value)

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def upload(self, path):
        self.driver.find_element("id", "file").send_keys(str(path))
        self.until(f"studio.state.piece.name === '{path.name}'")

    def play_to_the_end(self):
        """All samples that are heard from the cursor on, float32."""
        import base64

        self.js("studio.listen(true)")
        self.click("play")
        self.until("studio.state.playing")
        self.until("!studio.state.playing", 90)
        self.js("studio.listen(false)")
        return np.frombuffer(base64.b64decode(self.js(COLLECT)), np.float32)


@pytest.fixture(scope="module")
def studio():
    """Compiled as for users, not quickly: time is measured here."""
    with tiny.running() as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "autoplay-policy=no-user-gesture-required"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    folder = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 1000)
    driver.downloads = folder
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, studio):
    page = Page(browser, studio[1])
    page.open()
    yield page
    said = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not said
    browser.get("about:blank")


def test_what_is_heard_of_an_upload_is_what_synthesize_writes(page, studio, tmp_path):
    write_midi(tiny.notes(5.0), tmp_path / "mine.mid")
    page.upload(tmp_path / "mine.mid")
    heard = page.play_to_the_end()
    decoder, notes = studio[0].voices.decoders[0][1], read_midi(tmp_path / "mine.mid")
    parts = decoder.play([notes], studio[0].voices.inverter, seed=0)
    whole = np.concatenate([part.audio for part in parts])
    assert np.abs(heard).max() > 0.01
    np.testing.assert_array_equal(heard, audio_from_int16(audio_to_int16(whole)))
    assert page.js("return studio.state.underruns") == 0


def test_a_change_is_heard_within_a_second(page):
    page.click("play")
    page.until("studio.state.at > 8000")
    program = page.find("#parts select")
    for number in range(20):
        page.choose(program, str(8 + number))
        page.until(f"studio.state.changes.length > {number}")
        if page.js("return studio.state.at > 150000"):
            page.js("studio.seek(8000)")
            page.until("studio.state.at > 12000 && studio.state.at < 100000")
    after = page.js("return studio.state.changes")
    print(
        f"a change is heard after {statistics.median(after):.0f} ms (median of {len(after)}), at most {max(after):.0f}"
    )
    assert len(after) == 20 and statistics.median(after) < 1000 * waiting()


def test_a_seek_is_heard_from_there(page):
    from selenium.webdriver import ActionChains

    page.js("studio.view.fit(14)")
    roll = page.find("#roll")
    ActionChains(page.driver).move_to_element_with_offset(roll, 0, 0).click().perform()  # its middle
    middle = page.js("return studio.state.at") / 16000
    assert middle == pytest.approx(7.0, abs=0.1)
    page.click("play")
    page.until(f"studio.state.at > {(middle + 0.3) * 16000}")
    roll.send_keys("\ue014")  # the right arrow: a second on
    assert page.js("return studio.state.at") / 16000 > middle + 1
    page.until("studio.state.playing && document.getElementById('buffered').textContent !== '0.0 s'")
    assert f"piece=scale&t={middle + 1:.0f}"[:15] in page.driver.current_url


def test_voices_are_compared_while_they_play(page):
    page.click("add-voice")
    page.choose(page.find(".voice:nth-child(2) select"), "soundfont")
    page.click("add-voice")
    page.choose(page.find(".voice:nth-child(3) select"), "decoder:1")
    page.until("studio.state.mels.filter((mel) => mel && mel.tiles.size > 1).length === 3")
    page.click("play")
    page.until("studio.state.at > 16000")
    before = page.js("return studio.state.at")
    page.find(".voice:nth-child(2) button").click()
    page.until(f"studio.state.selected === 1 && studio.state.at > {before + 8000}")
    seen = page.js(
        "return [...document.querySelectorAll('.mel canvas')].map((c) => {"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;"
        "for (let i = 0; i < d.length; i += 400) n += d[i]; return n / d.length; })"
    )
    assert len(seen) == 3 and min(seen) > 0.01
    link = page.driver.current_url
    page.open(link[link.index("?") :])  # a moment can be shared
    kinds = page.js("return studio.state.voices.map((voice) => voice.kind + (voice.checkpoint ?? ''))")
    assert kinds == ["decoder0", "soundfont", "decoder1"] and page.js("return studio.state.selected") == 1
    assert page.js("return studio.state.at") > before


def test_a_phrase_from_the_keys_comes_back(page):
    from selenium.webdriver import ActionChains

    for letter in "adg":
        ActionChains(page.driver).key_down(letter).pause(0.15).key_up(letter).perform()
    page.click("hear")
    page.until("studio.state.piece.name === 'a phrase from the keys' && studio.state.playing")
    notes = page.js("return studio.state.piece.notes")
    assert [note[1] for note in notes] == [60, 64, 67]
    assert notes[1][3] - notes[0][3] > 0.1
    page.until("studio.state.at > 4000")


def test_live_keys_are_heard(page):
    page.choose(page.find("#keys-mode"), "live")
    page.until("document.getElementById('latency').textContent === 'play a key'", 240)
    for number in range(12):
        page.js("studio.keys.press(60 + arguments[0], 100)", number)
        page.until(f"studio.keys.latencies.length > {number}")
        page.js("studio.keys.up(60 + arguments[0])", number)
        time.sleep(0.15)
    took = sorted(page.js("return studio.keys.latencies"))
    print(f"key to sound: median {took[6]:.0f} ms, 95 % {took[11]:.0f} ms")
    assert took[6] < 500 * waiting()
    page.choose(page.find("#keys-mode"), "phrase")


@pytest.mark.parametrize("format", ["wav", "mid"])
def test_what_is_edited_is_saved(page, studio, format, tmp_path):
    page.find("#parts tr:nth-child(2) button").click()  # mutes the drums
    page.choose(page.find("#format"), format)
    page.click("save")
    page.until("document.getElementById('state').textContent.startsWith('saved')")
    target = page.driver.downloads / f"a scale.{format}"
    deadline = time.monotonic() + 10
    while not target.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if format == "mid":
        assert not any(note.is_drum for note in read_midi(target))
    else:
        notes = [note for note in studio[0].library.get("scale").notes if not note.is_drum]
        parts = studio[0].voices.decoders[0][1].play([notes], studio[0].voices.inverter, 0)
        with audio_writer(tmp_path / "a.wav") as write:
            write(np.concatenate([part.audio for part in parts]).clip(-1, 1))
        np.testing.assert_array_equal(soundfile.read(target)[0], soundfile.read(tmp_path / "a.wav")[0])


def test_two_clients_play_at_once(page):
    page.click("play")
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        page.open()
        page.click("play")
        page.until("studio.state.at > 16000")
        assert page.js("return studio.state.underruns") == 0
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)
    page.until("studio.state.at > 32000")
    assert page.js("return studio.state.underruns") == 0


def test_the_page_comes_back_when_its_server_does(browser):
    with tiny.running() as (_, address):
        page = Page(browser, address)
        page.open()
        page.click("play")
        page.until("studio.state.at > 8000")
    page.until("!studio.state.connected")
    assert "waiting" in page.find("#state").text
    at = page.js("return studio.state.at")
    with tiny.running(port=int(address.rpartition(":")[2])):
        page.until("studio.state.ready", 60)
        page.until(f"studio.state.at > {at} + 16000")
        browser.get("about:blank")
    with contextlib.suppress(Exception):
        browser.get_log("browser")  # what it says of the lost connection


def test_it_can_be_used_by_keys_and_on_a_phone(page):
    names = page.js(
        "return [...document.querySelectorAll('button, select, input, canvas')].filter((e) => !("
        "e.textContent.trim() && e.tagName === 'BUTTON') && !e.getAttribute('aria-label') && !e.title &&"
        "!(e.labels && [...e.labels].some((l) => l.textContent.trim()))).map((e) => e.outerHTML)"
    )
    assert names == []
    page.driver.set_window_size(500, 900)  # the least that headless Chromium takes
    try:
        page.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        )
        assert page.js("return document.scrollingElement.scrollWidth") <= 390
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.set_window_size(1280, 1000)
