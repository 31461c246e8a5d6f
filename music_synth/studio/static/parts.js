// The parts of the piece: instrument, gain, mute and solo.
import { color } from "./roll.js";

export class Parts {
  constructor(body, state, changed) {
    this.body = body;
    this.state = state;
    this.changed = changed;
    this.isSilent = (part) => {
      const edits = Object.entries(state.edit.parts);
      const edit = state.edit.parts[part] || {};
      return Boolean(edit.mute || (edits.some(([, other]) => other.solo) && !edit.solo));
    };
    this.isDrum = (part) => state.edit.parts[part]?.drum ?? this.drums?.get(part) ?? false;
  }

  show(piece) {
    this.drums = new Map(piece.parts.map((part) => [part.part, part.drum]));
    this.body.replaceChildren(...piece.parts.map((part) => this.row(part)));
  }

  edit(part, change) {
    const edit = { ...this.state.edit.parts[part], ...change };
    for (const [name, value] of Object.entries(edit)) if (value === false && name !== "drum") delete edit[name];
    if (Object.keys(edit).length) this.state.edit.parts[part] = edit;
    else delete this.state.edit.parts[part];
    this.changed();
  }

  row(part) {
    const row = document.createElement("tr");
    const name = `part ${part.part + 1}`;
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = color(part.part, part.drum);
    const title = cell(swatch, document.createTextNode(`${part.part + 1}`));
    title.title = `${part.notes} notes`;
    const program = instruments(this.state.about.instruments, part.drum ? "drums" : part.program);
    program.setAttribute("aria-label", `Instrument of ${name}`);
    program.onchange = () => {
      const drum = program.value === "drums";
      this.edit(part.part, drum ? { drum } : { drum: false, program: Number(program.value) });
    };
    const gain = document.createElement("input");
    Object.assign(gain, { type: "range", min: -24, max: 12, step: 1, value: 0 });
    gain.setAttribute("aria-label", `Gain of ${name} in dB`);
    gain.onchange = () => this.edit(part.part, { gain: Number(gain.value) });
    const toggles = ["mute", "solo"].map((what) => {
      const button = document.createElement("button");
      button.textContent = what[0].toUpperCase();
      button.setAttribute("aria-label", `${what} ${name}`);
      button.setAttribute("aria-pressed", "false");
      button.onclick = () => {
        const on = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(on));
        this.edit(part.part, { [what]: on });
      };
      return button;
    });
    row.append(title, cell(program), cell(gain), ...toggles.map((button) => cell(button)));
    return row;
  }
}

function cell(...content) {
  const td = document.createElement("td");
  td.append(...content);
  return td;
}

// A choice of General MIDI's instruments and drums.
export function instruments(names, chosen) {
  const select = document.createElement("select");
  fillInstruments(select, names, chosen);
  return select;
}

export function fillInstruments(select, names, chosen) {
  select.add(new Option("Drums", "drums"));
  names.forEach((name, number) => select.add(new Option(`${number} ${name}`, number)));
  select.value = String(chosen);
}
