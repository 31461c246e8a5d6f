// The address names piece, voices and time, so that a moment can be shared:
// ?piece=ID&t=12.5&selected=1&voice=decoder:0,seed=3,temperature=0.5&voice=soundfont
const NUMBERS = ["seed", "temperature", "steps"];

export function readLink() {
  const query = new URLSearchParams(location.search);
  return {
    piece: query.get("piece"),
    at: Math.max(0, Number(query.get("t")) || 0),
    selected: Math.max(0, Math.round(Number(query.get("selected")) || 0)),
    voices: query.getAll("voice").slice(0, 4).map(readVoice).filter(Boolean),
  };
}

function readVoice(text) {
  const [head, ...settings] = text.split(",");
  const [kind, checkpoint] = head.split(":");
  if (kind === "soundfont" || kind === "recording") return { kind };
  if (kind !== "decoder") return null;
  const voice = { kind, checkpoint: Math.max(0, Math.round(Number(checkpoint) || 0)), seed: 0 };
  for (const setting of settings) {
    const [name, value] = setting.split("=");
    if (name === "timbre" && value) voice.timbre = value;
    if (NUMBERS.includes(name) && Number.isFinite(Number(value))) voice[name] = Number(value);
  }
  return voice;
}

export function writeVoice(voice) {
  if (voice.kind !== "decoder") return voice.kind;
  const settings = NUMBERS.filter((name) => voice[name] !== undefined && voice[name] !== null);
  const timbre = voice.timbre ? [`timbre=${voice.timbre}`] : [];
  return [`decoder:${voice.checkpoint}`, ...settings.map((name) => `${name}=${voice[name]}`), ...timbre].join(",");
}

export function writeLink(state) {
  const query = new URLSearchParams({ piece: state.piece.id, t: (state.at / 16000).toFixed(2), selected: state.selected });
  for (const voice of state.voices) query.append("voice", writeVoice(voice));
  const address = `?${query}`;
  if (address !== location.search) history.replaceState(null, "", address);
}
