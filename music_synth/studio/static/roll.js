// The piano roll, and the time axis that it shares with the spectrograms.
export const color = (part, drum) => (drum ? "#8a93a3" : `hsl(${(part * 137 + 205) % 360} 62% 52%)`);

export class View {
  constructor() {
    this.start = 0; // seconds at the left edge
    this.span = 20; // seconds from edge to edge
    this.total = 1;
  }

  fit(total) {
    this.total = total;
    this.start = 0;
    this.span = Math.min(total, 20);
  }

  zoom(factor, around) {
    const span = Math.min(Math.max(this.span * factor, 1), Math.max(this.total, 1));
    this.start = around - ((around - this.start) / this.span) * span;
    this.span = span;
    this.clamp();
  }

  clamp() {
    this.start = Math.min(Math.max(this.start, 0), Math.max(0, this.total - this.span));
  }

  follow(seconds) {
    if (seconds < this.start || seconds > this.start + 0.9 * this.span) {
      this.start = seconds - 0.1 * this.span;
      this.clamp();
      return true;
    }
    return false;
  }
}

// Prepares a canvas for drawing in CSS pixels; returns [context, width, height].
export function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

export function drawCursor(context, view, seconds, width, height) {
  const x = ((seconds - view.start) / view.span) * width;
  context.fillStyle = "#ff4d4d";
  context.fillRect(x - 1, 0, 2, height);
}

// notes: [part, pitch, velocity, onset, offset], times at the tempo of the file.
export function drawRoll(canvas, view, piece, tempo, isSilent, isDrum, cursor) {
  const [context, width, height] = prepare(canvas);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const step = [0.5, 1, 2, 5, 10, 30, 60, 120].find((s) => (s / view.span) * width > 55) || 300;
  context.font = "11px system-ui";
  context.fillStyle = dark ? "#a5b0c2" : "#535d6e";
  context.strokeStyle = dark ? "#2a3342" : "#d3d9e2";
  for (let t = Math.ceil(view.start / step) * step; t < view.start + view.span; t += step) {
    const x = ((t - view.start) / view.span) * width;
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, height);
    context.stroke();
    context.fillText(clock(t, step < 1), x + 3, 11);
  }
  if (piece) {
    const low = piece.low - 2;
    const row = (height - 16) / (piece.high - low + 3);
    const first = view.start * tempo;
    const last = (view.start + view.span) * tempo;
    for (const [part, pitch, velocity, onset, offset] of piece.notes) {
      if (offset < first || onset > last) continue;
      const x = ((onset / tempo - view.start) / view.span) * width;
      const w = Math.max(2, ((offset - onset) / tempo / view.span) * width - 0.5);
      context.globalAlpha = isSilent(part) ? 0.12 : 0.45 + (0.55 * velocity) / 127;
      context.fillStyle = color(part, isDrum(part));
      context.fillRect(x, height - (pitch - low + 1) * row, isDrum(part) ? Math.min(w, 4) : w, Math.max(2, row - 0.5));
    }
    context.globalAlpha = 1;
  }
  drawCursor(context, view, cursor, width, height);
}

export function clock(seconds, tenths = false) {
  const whole = Math.floor(seconds / 60);
  const rest = seconds - 60 * whole;
  return `${whole}:${tenths ? rest.toFixed(1).padStart(4, "0") : String(Math.floor(rest)).padStart(2, "0")}`;
}
