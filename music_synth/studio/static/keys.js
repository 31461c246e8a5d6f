// Keys on the screen, of the computer and of MIDI devices: phrases, and live mode.
import { fillInstruments } from "./parts.js";

const WHITE = "asdfghjkl;'";
const BLACK = { 1: "w", 3: "e", 6: "t", 8: "y", 10: "u", 13: "o", 15: "p" };
const WHITE_STEPS = [0, 2, 4, 5, 7, 9, 11];
const OCTAVES = 2;

export class Keys {
  constructor({ state, audio, connection, upload, play, $ }) {
    Object.assign(this, { state, audio, connection, upload, play, $ });
    this.down = new Map(); // pitch -> what began it: {number, onset, velocity}
    this.phrase = [];
    this.recording = false;
    this.number = 0;
    this.pressed = new Map(); // key number -> when it went down
    this.latencies = [];
    this.blocks = [];
  }

  show(instruments) {
    const { $ } = this;
    fillInstruments($("keys-program"), instruments, 0);
    $("octave").onchange = () => this.build();
    $("record").onclick = () => (this.recording ? this.stop() : this.record());
    $("hear").onclick = () => this.hear();
    $("keys-mode").onchange = () => this.again();
    $("keys-program").onchange = () => this.again();
    this.build();
    document.addEventListener("keydown", (event) => this.letter(event, true));
    document.addEventListener("keyup", (event) => this.letter(event, false));
    window.addEventListener("blur", () => [...this.down.keys()].forEach((pitch) => this.up(pitch)));
    if (navigator.requestMIDIAccess) $("midi").textContent = "press a key";
  }

  get base() {
    return 12 * (Number(this.$("octave").value) + 1);
  }

  get live() {
    return this.$("keys-mode").value === "live";
  }

  get instrument() {
    const value = this.$("keys-program").value;
    return value === "drums" ? { program: 0, drum: true } : { program: Number(value), drum: false };
  }

  build() {
    const box = this.$("keyboard");
    box.replaceChildren();
    const whites = 7 * OCTAVES + 1;
    const width = 100 / whites;
    let white = 0;
    this.buttons = new Map();
    for (let step = 0; step <= 12 * OCTAVES; step++) {
      const pitch = this.base + step;
      if (pitch > 127) break;
      const isWhite = WHITE_STEPS.includes(step % 12);
      const key = document.createElement("button");
      key.className = isWhite ? "white" : "black";
      key.style.left = `${isWhite ? white * width : white * width - 0.3 * width}%`;
      key.style.width = `${isWhite ? width : 0.6 * width}%`;
      key.textContent = isWhite ? (WHITE[white] ?? "").toUpperCase() : (BLACK[step] ?? "").toUpperCase();
      key.setAttribute("aria-label", `${["C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B"][pitch % 12]}${Math.floor(pitch / 12) - 1}`);
      key.tabIndex = step ? -1 : 0;
      key.onpointerdown = (event) => {
        key.setPointerCapture(event.pointerId);
        this.press(pitch, 90, event.timeStamp);
      };
      key.onpointerup = key.onpointercancel = () => this.up(pitch);
      key.onkeydown = (event) => {
        if (event.key === "Enter" && !event.repeat) this.press(pitch, 90, event.timeStamp);
        const next = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (next) this.buttons.get(pitch + next)?.focus();
      };
      key.onkeyup = (event) => event.key === "Enter" && this.up(pitch);
      box.append(key);
      this.buttons.set(pitch, key);
      if (isWhite) white++;
    }
  }

  letter(event, on) {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const key = event.key.toLowerCase();
    const white = WHITE.indexOf(key);
    const black = Object.entries(BLACK).find(([, letter]) => letter === key);
    if (white < 0 && !black) return;
    const step = black ? Number(black[0]) : 12 * Math.floor(white / 7) + WHITE_STEPS[white % 7];
    if (on) this.press(this.base + step, 90, event.timeStamp);
    else this.up(this.base + step);
  }

  async openMidi() {
    if (this.midi || !navigator.requestMIDIAccess) return;
    this.midi = true;
    try {
      const access = await navigator.requestMIDIAccess();
      const attach = () => {
        for (const input of access.inputs.values()) {
          input.onmidimessage = ({ data: [status, pitch, velocity], timeStamp }) => {
            if ((status & 0xf0) === 0x90 && velocity) this.press(pitch, velocity, timeStamp);
            else if ((status & 0xe0) === 0x80) this.up(pitch);
          };
        }
        this.$("midi").textContent = access.inputs.size ? `${access.inputs.size} in` : "none";
      };
      access.onstatechange = attach;
      attach();
    } catch {
      this.$("midi").textContent = "not allowed";
    }
  }

  async press(pitch, velocity, time = performance.now()) {
    if (this.down.has(pitch)) this.up(pitch);
    const number = ++this.number;
    this.down.set(pitch, { number, onset: time, velocity });
    this.buttons.get(pitch)?.classList.add("down");
    if (this.live) {
      this.pressed.set(number, time);
      this.connection.send({ type: "key", pitch, velocity, at: this.audio.livePosition(), number });
    } else if (!this.recording) {
      this.record();
    }
    await this.audio.open();
    this.openMidi();
  }

  up(pitch) {
    const key = this.down.get(pitch);
    if (!key) return;
    this.down.delete(pitch);
    this.buttons.get(pitch)?.classList.remove("down");
    if (this.recording) this.phrase.push([pitch, key.velocity, key.onset, performance.now()]);
    if (this.live) this.connection.send({ type: "key", pitch, velocity: 0, at: this.audio.livePosition() });
  }

  // --- a phrase ---

  record() {
    this.recording = true;
    this.phrase = [];
    this.$("record").textContent = "■ Stop";
    this.$("record").setAttribute("aria-pressed", "true");
    this.$("hear").disabled = false;
  }

  stop() {
    [...this.down.keys()].forEach((pitch) => this.up(pitch));
    this.recording = false;
    this.$("record").textContent = "● Record";
    this.$("record").setAttribute("aria-pressed", "false");
  }

  // The phrase becomes a piece like any other, and is played.
  async hear() {
    this.stop();
    if (!this.phrase.length) return;
    const first = Math.min(...this.phrase.map((note) => note[2]));
    const notes = this.phrase.map(([pitch, velocity, onset, offset]) => [pitch, velocity, (onset - first) / 1000, (offset - first) / 1000]);
    const body = JSON.stringify({ name: "a phrase from the keys", notes, ...this.instrument });
    if (await this.upload(body, "phrase", "application/json")) await this.play(true);
  }

  // --- live ---

  // Tells the server what the page is set to: after a change, and when it has come back.
  async again() {
    const on = this.live;
    this.blocks = [];
    if (on) await this.audio.open();
    if (on || this.wasLive) {
      this.audio.post({ type: "liveOn", on });
      const voice = on ? this.state.voices.find((one) => one.kind === "decoder") ?? { kind: "decoder" } : null;
      this.connection.send({ type: "live", voice, ...this.instrument });
      this.$("latency").textContent = on ? "warming up…" : "–";
    }
    this.wasLive = on;
  }

  message(message) {
    if (message.type === "live") {
      this.$("latency").textContent = message.ready ? "play a key" : message.message;
    } else if (message.type === "live-keys") {
      this.blocks = message.keys;
    }
  }

  frame(frame) {
    const samples = frame.data.slice();
    this.audio.post({ type: "liveBlock", position: frame.position, samples, keys: this.blocks }, [samples.buffer]);
    this.blocks = [];
  }

  sounded({ number, frame }) {
    const pressed = this.pressed.get(number);
    if (pressed === undefined) return;
    this.pressed.delete(number);
    this.latencies.push(this.audio.timeOf(frame) - pressed);
    const last = this.latencies.slice(-50).sort((a, b) => a - b);
    const at = (share) => Math.round(last[Math.min(last.length - 1, Math.floor(share * last.length))]);
    this.$("latency").textContent = `${at(0.5)} ms (95 %: ${at(0.95)} ms)`;
  }
}
