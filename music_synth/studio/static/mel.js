// Spectrograms of the voices, in tiles of 256 frames of 20 ms.
import { drawCursor, prepare } from "./roll.js";

const TILE = 256;
const BINS = 128;
const STOPS = [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]];
const COLORS = Array.from({ length: 256 }, (_, level) => {
  const place = (level / 255) * (STOPS.length - 1);
  const i = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[i].map((from, channel) => Math.round(from + (place - i) * (STOPS[i + 1][channel] - from)));
});

export class MelPicture {
  constructor() {
    this.tiles = new Map();
  }

  // data: uint8 [count, 128], low bins first.
  add(position, data) {
    const count = data.length / BINS;
    for (let first = 0; first < count; ) {
      const number = Math.floor((position + first) / TILE);
      const column = position + first - number * TILE;
      const n = Math.min(count - first, TILE - column);
      const image = new ImageData(n, BINS);
      for (let t = 0; t < n; t++) {
        for (let bin = 0; bin < BINS; bin++) {
          const [r, g, b] = COLORS[data[(first + t) * BINS + bin]];
          const place = 4 * ((BINS - 1 - bin) * n + t);
          image.data.set([r, g, b, 255], place);
        }
      }
      if (!this.tiles.has(number)) this.tiles.set(number, new OffscreenCanvas(TILE, BINS));
      this.tiles.get(number).getContext("2d").putImageData(image, column, 0);
      first += n;
    }
  }

  draw(canvas, view, cursor) {
    const [context, width, height] = prepare(canvas);
    const seconds = TILE / 50;
    for (const [number, tile] of this.tiles) {
      const start = number * seconds;
      if (start > view.start + view.span || start + seconds < view.start) continue;
      context.drawImage(tile, ((start - view.start) / view.span) * width, 0, (seconds / view.span) * width + 0.5, height);
    }
    drawCursor(context, view, cursor, width, height);
  }
}
