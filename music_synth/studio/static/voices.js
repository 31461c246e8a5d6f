// The voices that are compared, and their spectrograms.
const MOST = 4;

export class VoiceList {
  constructor(box, state, { changed, selected, canvases }) {
    Object.assign(this, { box, state, changed, selected, canvases });
    document.getElementById("add-voice").onclick = () => {
      if (state.voices.length < MOST) {
        const seeds = state.voices.filter((voice) => voice.kind === "decoder").map((voice) => voice.seed);
        state.voices.push({ kind: "decoder", checkpoint: 0, seed: Math.max(-1, ...seeds) + 1 });
        this.changed();
      }
    };
  }

  show() {
    const { voices, about } = this.state;
    if (!about) return;
    this.box.replaceChildren(...voices.map((voice, number) => this.row(voice, number)));
    document.getElementById("add-voice").disabled = voices.length >= MOST;
    this.canvases.replaceChildren(
      ...voices.map((voice, number) => {
        const box = document.createElement("div");
        box.className = number === this.state.selected ? "mel selected" : "mel";
        const canvas = document.createElement("canvas");
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `Spectrogram of voice ${number + 1}`);
        const label = document.createElement("span");
        label.textContent = `${number + 1}: ${this.name(voice)}`;
        box.append(canvas, label);
        return box;
      }),
    );
    this.drawn = null;
  }

  name(voice) {
    if (voice.kind === "soundfont") return "SoundFont";
    if (voice.kind === "recording") return "recording";
    const settings = [`seed ${voice.seed}`];
    if (voice.temperature !== undefined) settings.push(`temperature ${voice.temperature}`);
    if (voice.timbre) settings.push(voice.timbre);
    if (voice.steps !== undefined) settings.push(`${voice.steps} steps`);
    return `${this.state.about.decoders[voice.checkpoint]?.name ?? "?"}, ${settings.join(", ")}`;
  }

  row(voice, number) {
    const row = document.createElement("div");
    row.className = "voice";
    const hear = document.createElement("button");
    hear.textContent = `Hear ${number + 1}`;
    hear.setAttribute("aria-pressed", String(number === this.state.selected));
    hear.onclick = () => this.selected(number);
    row.append(hear, this.choice(voice, number));
    if (voice.kind === "decoder") {
      const can = this.state.about.decoders[voice.checkpoint] || {};
      row.append(this.number(voice, number, "seed", { min: 0, max: 4294967295, step: 1 }));
      if (can.temperature) row.append(this.number(voice, number, "temperature", { min: 0, max: 2, step: 0.1 }));
      if (can.timbres?.length) row.append(this.timbre(voice, number, can.timbres));
      if (can.steps) row.append(this.number(voice, number, "steps", { min: 1, max: 64, step: 1 }));
    }
    if (this.state.voices.length > 1) {
      const remove = document.createElement("button");
      remove.textContent = "✕";
      remove.setAttribute("aria-label", `Remove voice ${number + 1}`);
      remove.onclick = () => {
        this.state.voices.splice(number, 1);
        this.state.selected = Math.min(this.state.selected, this.state.voices.length - 1);
        this.changed();
      };
      row.append(remove);
    }
    const said = document.createElement("span");
    said.className = "said";
    said.setAttribute("role", "alert");
    row.append(said);
    return row;
  }

  choice(voice, number) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", `What plays voice ${number + 1}`);
    this.state.about.decoders.forEach((decoder, index) => select.add(new Option(decoder.name, `decoder:${index}`)));
    select.add(new Option("SoundFont", "soundfont"));
    if (this.state.piece?.recording) select.add(new Option("recording", "recording"));
    select.value = voice.kind === "decoder" ? `decoder:${voice.checkpoint}` : voice.kind;
    select.onchange = () => {
      const [kind, index] = select.value.split(":");
      const seed = voice.seed ?? 0;
      this.state.voices[number] = kind === "decoder" ? { kind, checkpoint: Number(index), seed } : { kind };
      this.changed();
    };
    return select;
  }

  number(voice, number, name, limits) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "number", ...limits, value: voice[name] ?? "", placeholder: "auto" });
    input.setAttribute("aria-label", `${name} of voice ${number + 1}`);
    input.onchange = () => {
      const value = Number(input.value);
      if (input.value === "" && name !== "seed") delete voice[name];
      else if (input.checkValidity()) voice[name] = name === "temperature" ? value : Math.round(value);
      else input.value = voice[name] ?? "";
      this.changed();
    };
    label.append(name, input);
    return label;
  }

  timbre(voice, number, names) {
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.setAttribute("aria-label", `Timbre of voice ${number + 1}`);
    select.add(new Option("mixture", ""));
    for (const name of names) select.add(new Option(name, name));
    select.value = voice.timbre ?? "";
    select.onchange = () => {
      if (select.value) voice.timbre = select.value;
      else delete voice.timbre;
      this.changed();
    };
    label.append("timbre", select);
    return label;
  }

  say(errors) {
    [...this.box.children].forEach((row, number) => (row.lastChild.textContent = errors[number] ?? ""));
  }

  draw(view, now) {
    [...this.canvases.children].forEach((box, number) => {
      const mel = this.state.mels[number];
      if (mel) mel.draw(box.firstChild, view, now);
    });
  }
}
