// The studio's page: what is played, by whom and from when; the parts of the page are in modules of their own.
import { Audio, RATE } from "./audio.js";
import { Connection, LIVE, MEL, PCM } from "./connection.js";
import { Keys } from "./keys.js";
import { MelPicture } from "./mel.js";
import { Parts } from "./parts.js";
import { clock, drawRoll, View } from "./roll.js";
import { readLink, writeLink } from "./link.js";
import { VoiceList } from "./voices.js";

const $ = (id) => document.getElementById(id);
const HOP = 320;
const RING_OUT_SECONDS = 1;

const view = new View();
const state = {
  about: null,
  piece: null,
  edit: { parts: {}, transpose: 0, tempo: 1 },
  voices: [{ kind: "decoder", checkpoint: 0, seed: 0 }],
  selected: 0,
  job: 0,
  at: 0, // sample; the worklet's word counts while it plays
  playing: false,
  connected: false,
  ready: false,
  asked: new Map(), // job -> when the change was made, performance.now()
  changes: [], // milliseconds from a change to its sound
  mels: [],
  errors: [],
};

const audio = new Audio(heard);
let dirty = true; // whether the pictures have to be drawn anew

// --- what is played ---------------------------------------------------------------------------------------------

const total = () => Math.ceil((state.piece.last / state.edit.tempo + RING_OUT_SECONDS) * 50) * HOP;
const seconds = () => state.at / RATE;

// Asks for audio from sample `at` on. change: what is heard goes on until the new audio is there.
function request(at, { change = false, keep = change } = {}) {
  $("play").disabled = !(state.piece && state.ready);
  if (!state.piece) return;
  state.at = Math.min(Math.max(0, Math.round(at)), total());
  if (!state.ready) return;
  state.job += 1;
  if (change) state.asked.set(state.job, performance.now());
  for (let i = 0; i < state.voices.length; i++) state.mels[i] ||= new MelPicture();
  audio.post({ type: "job", job: state.job, at: state.at, keep, voices: state.voices.length });
  audio.post({ type: "select", voice: state.selected });
  connection.send({
    type: "play", job: state.job, piece: state.piece.id, edit: state.edit, voices: state.voices,
    selected: state.selected, at: state.at, change,
  });
  state.errors = [];
  voiceList.say(state.errors);
  writeLink(state);
  dirty = true;
}

function seek(at) {
  request(at);
  if (state.playing) audio.post({ type: "play", on: true, total: total() });
}

async function play(on) {
  if (!state.piece) return;
  await audio.open();
  if (on && state.at >= total() - 1) seek(0);
  state.playing = on;
  audio.post({ type: "play", on, total: total() });
  $("play").textContent = on ? "❚❚ Pause" : "▶ Play";
  if (!on) writeLink(state);
}

async function open(id, at = 0) {
  const response = await fetch(`api/piece?id=${encodeURIComponent(id)}`);
  if (!response.ok) return say(await response.text(), true);
  if (state.playing) await play(false);
  const piece = await response.json();
  const pitches = piece.notes.map((note) => note[1]);
  piece.low = Math.min(...pitches);
  piece.high = Math.max(...pitches);
  piece.last = Math.max(...piece.notes.map((note) => note[4]));
  state.piece = piece;
  state.edit = { parts: {}, transpose: 0, tempo: 1 };
  state.voices = state.voices.filter((voice) => voice.kind !== "recording" || piece.recording);
  if (!state.voices.length) state.voices = [{ kind: "decoder", checkpoint: 0, seed: 0 }];
  state.selected = Math.min(state.selected, state.voices.length - 1);
  state.mels = [];
  $("tempo").value = 100;
  $("tempo-out").textContent = "100 %";
  $("transpose").value = 0;
  view.fit(total() / RATE);
  parts.show(piece, state.edit);
  voiceList.show();
  listPiece(piece);
  request(at * RATE);
  view.follow(seconds());
}

const send = (body, name, type) =>
  fetch(`api/pieces?name=${encodeURIComponent(name)}`, { method: "POST", body, headers: { "content-type": type } });

async function upload(body, name, type = "application/octet-stream") {
  const response = await send(body, name, type);
  if (!response.ok) return say(await response.text(), true);
  const head = await response.json();
  state.uploaded = { id: head.id, body, name, type };
  await open(head.id);
  return head;
}

function changed({ tempo } = {}) {
  if (tempo) {
    const before = state.edit.tempo;
    state.edit.tempo = tempo;
    state.mels = [];
    view.total = total() / RATE;
    view.clamp();
    const playing = state.playing;
    request((state.at * before) / tempo);
    if (playing) audio.post({ type: "play", on: true, total: total() });
  } else {
    request(state.at, { change: true });
  }
}

// --- what comes in ----------------------------------------------------------------------------------------------

function heard(message) {
  if (message.type === "report") {
    if (state.playing && message.job === state.job) state.at = message.head; // else it was sent before a seek
    state.underruns = message.underruns;
    $("buffered").textContent = `${(message.buffered / RATE).toFixed(1)} s`;
    $("underruns").textContent = message.underruns;
    if (state.playing) dirty = true;
  } else if (message.type === "finished" && message.job === state.job) {
    state.at = total();
    play(false);
  } else if (message.type === "heard") {
    const asked = state.asked.get(message.job);
    if (asked !== undefined) {
      const after = audio.timeOf(message.frame) - asked;
      state.changes.push(after);
      $("change").textContent = `${Math.round(after)} ms`;
    }
    state.asked.clear();
  } else if (message.type === "sounded") {
    keys.sounded(message);
  } else if (message.type === "tapped" && state.tap) {
    state.tap.push(message.samples);
  }
}

const connection = new Connection({
  open() {
    state.connected = true;
    start();
  },
  closed() {
    state.connected = false;
    state.ready = false;
    say("the server is not there: waiting for it", true);
  },
  message(message) {
    if (message.type === "state") {
      state.ready = message.ready;
      if (message.ready) ready();
      else say("warming up…");
    } else if (message.type === "made" && message.job === state.job) {
      const decoded = message.voice === state.selected && state.voices[message.voice]?.kind === "decoder";
      if (decoded && message.took > 0) $("speed").textContent = (message.seconds / message.took).toFixed(1);
    } else if (message.type === "end" && message.job === state.job) {
      audio.post({ type: "end", job: message.job, voice: message.voice, at: message.at });
    } else if (message.type === "error") {
      if (message.job === undefined) say(message.message, true);
      else if (message.job === state.job) {
        state.errors[message.voice] = message.message;
        voiceList.say(state.errors);
      }
    } else if (message.type.startsWith("live")) {
      keys.message(message);
    }
  },
  frame(frame) {
    if (frame.kind === LIVE) return keys.frame(frame);
    if (frame.job !== state.job) return;
    if (frame.kind === PCM) {
      const samples = frame.data.slice();
      audio.post({ type: "pcm", job: frame.job, voice: frame.voice, position: frame.position, samples }, [samples.buffer]);
    } else if (frame.kind === MEL) {
      (state.mels[frame.voice] ||= new MelPicture()).add(frame.position, frame.data);
      dirty = true;
    }
  },
});

async function start() {
  if (state.about) return;
  const response = await fetch("api/about");
  if (!response.ok) return say(await response.text(), true);
  state.about = await response.json();
  const link = readLink();
  for (const piece of state.about.pieces) listPiece(piece, false);
  if (link.voices.length) state.voices = link.voices;
  state.selected = Math.min(link.selected, state.voices.length - 1);
  keys.show(state.about.instruments);
  const first = link.piece || state.about.pieces[0]?.id;
  if (first) await open(first, link.at);
}

// Everything is compiled, or the server has come back: goes on from where the page is.
async function ready() {
  say("ready");
  if (!state.piece) return;
  const { uploaded } = state;
  if (uploaded?.id === state.piece.id) await send(uploaded.body, uploaded.name, uploaded.type); // a new server has not got it
  const playing = state.playing;
  request(state.at, { keep: playing });
  keys.again();
}

function say(text, bad = false) {
  $("state").textContent = text;
  $("state").className = bad ? "bad" : "";
}

function listPiece(piece, select = true) {
  let option = [...$("piece").options].find((other) => other.value === piece.id);
  if (!option) {
    option = new Option(piece.name, piece.id);
    $("piece").add(option);
  }
  if (select) $("piece").value = piece.id;
}

// --- parts of the page ------------------------------------------------------------------------------------------

const parts = new Parts($("parts").tBodies[0], state, () => changed());
const voiceList = new VoiceList($("voices"), state, {
  changed() {
    state.mels = [];
    voiceList.show();
    request(state.at, { keep: true });
  },
  selected(number) {
    state.selected = number;
    audio.post({ type: "select", voice: number });
    connection.send({ type: "cursor", job: state.job, at: state.at, selected: number });
    voiceList.show();
    writeLink(state);
  },
  canvases: $("mels"),
});
const keys = new Keys({ state, audio, connection, upload, play, $ });

$("play").onclick = () => play(!state.playing);
$("start").onclick = () => seek(0);
$("piece").onchange = () => open($("piece").value);
$("file").onchange = () => {
  const [file] = $("file").files;
  if (file) upload(file, file.name);
  $("file").value = "";
};
$("tempo").oninput = () => ($("tempo-out").textContent = `${$("tempo").value} %`);
$("tempo").onchange = () => changed({ tempo: $("tempo").value / 100 });
$("transpose").onchange = () => {
  state.edit.transpose = Math.min(24, Math.max(-24, Math.round(Number($("transpose").value) || 0)));
  $("transpose").value = state.edit.transpose;
  changed();
};
$("volume").oninput = async () => {
  await audio.open();
  audio.gain.gain.value = $("volume").value / 100;
};
$("zoom-in").onclick = () => zoom(0.6);
$("zoom-out").onclick = () => zoom(1 / 0.6);
$("link").onclick = async () => {
  writeLink(state);
  try {
    await navigator.clipboard.writeText(location.href);
    say("the link is in the clipboard");
  } catch {
    say(location.href);
  }
};
$("save").onclick = save;

async function save() {
  const format = $("format").value;
  $("save").disabled = true;
  say("making the file…");
  try {
    const body = JSON.stringify({ piece: state.piece.id, edit: state.edit, voice: state.voices[state.selected], format });
    const response = await fetch("api/save", { method: "POST", body, headers: { "content-type": "application/json" } });
    if (!response.ok) return say(await response.text(), true);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = `${state.piece.name.replace(/[^\w. -]+/g, "_")}${format === "stems" ? ".zip" : "." + format}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`saved ${link.download}`);
  } finally {
    $("save").disabled = false;
  }
}

function zoom(factor, around = seconds()) {
  view.zoom(factor, Math.min(Math.max(around, view.start), view.start + view.span));
  dirty = true;
}

function place(event, canvas) {
  const box = canvas.getBoundingClientRect();
  return view.start + ((event.clientX - box.left) / box.width) * view.span;
}

for (const area of [$("roll"), $("mels")]) {
  area.addEventListener("click", (event) => {
    if (event.target.tagName === "CANVAS") seek(place(event, event.target) * RATE);
  });
  area.addEventListener(
    "wheel",
    (event) => {
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
        view.start += (event.deltaX / 600) * view.span;
        view.clamp();
        dirty = true;
      } else if (event.ctrlKey || event.altKey) {
        zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, place(event, $("roll")));
      } else return;
      event.preventDefault();
    },
    { passive: false },
  );
}
$("roll").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10 }[event.key];
  if (step) seek(state.at + step * RATE);
  else if (event.key === "Home") seek(0);
  else if (event.key === "+") zoom(0.6);
  else if (event.key === "-") zoom(1 / 0.6);
  else return;
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === " " && !/^(BUTTON|INPUT|SELECT)$/.test(event.target.tagName)) {
    play(!state.playing);
    event.preventDefault();
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file) upload(file, file.name);
});
new ResizeObserver(() => (dirty = true)).observe(document.body);

function draw() {
  requestAnimationFrame(draw);
  if (!dirty || !state.piece) return;
  dirty = false;
  if (state.playing) view.follow(seconds());
  const now = seconds();
  drawRoll($("roll"), view, state.piece, state.edit.tempo, parts.isSilent, parts.isDrum, now);
  voiceList.draw(view, now);
  $("time").textContent = `${clock(now, true)} / ${clock(total() / RATE)}`;
  $("roll").setAttribute("aria-valuenow", now.toFixed(1));
  $("roll").setAttribute("aria-valuemax", (total() / RATE).toFixed(1));
}
requestAnimationFrame(draw);

setInterval(() => {
  if (state.connected && state.job) {
    connection.send({ type: "cursor", job: state.job, at: Math.round(state.at), selected: state.selected });
  }
  if (state.playing) writeLink(state);
}, 500);

// For tests, and for those who want to see what is heard: `studio.listen(true)` collects what is put out.
window.studio = {
  state, audio, request, seek, play, open, upload, keys, connection, view,
  listen(on) {
    if (on) state.tap = [];
    audio.post({ type: "tapping", on });
  },
};
