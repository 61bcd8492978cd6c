/** Which pixels of a picture are drawn anew: one byte for each, 1 where it is drawn. Knows nothing of the page. */
import { greyPng } from "./png.js";

/** Memory for what can be undone. */
const UNDO_BYTES = 64e6;

export class Mask {
  #undone = [];
  #before = [];

  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.drawn = new Uint8Array(width * height);
    this.undoSteps = Math.max(1, Math.min(100, Math.floor(UNDO_BYTES / this.drawn.length)));
  }

  get count() {
    let count = 0;
    for (const drawn of this.drawn) count += drawn;
    return count;
  }

  get canUndo() {
    return this.#before.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** What changes until the next call is undone in one step. */
  begin() {
    this.#before.push(this.drawn.slice());
    this.#undone = [];
    if (this.#before.length > this.undoSteps) this.#before.shift();
  }

  undo() {
    this.#swap(this.#before, this.#undone);
  }

  redo() {
    this.#swap(this.#undone, this.#before);
  }

  #swap(from, to) {
    if (!from.length) return;
    to.push(this.drawn);
    this.drawn = from.pop();
  }

  /** A line with round ends, in pixels of the picture: those whose middle is at most half of `thickness` from it, and the one at its end. */
  line(x0, y0, x1, y1, thickness, value) {
    const reach = thickness / 2;
    const length2 = (x1 - x0) ** 2 + (y1 - y0) ** 2;
    const [left, right] = this.#span(Math.min(x0, x1) - reach, Math.max(x0, x1) + reach, this.width);
    const [top, bottom] = this.#span(Math.min(y0, y1) - reach, Math.max(y0, y1) + reach, this.height);
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const dx = x + 0.5 - x0;
        const dy = y + 0.5 - y0;
        const along = length2 ? Math.min(1, Math.max(0, (dx * (x1 - x0) + dy * (y1 - y0)) / length2)) : 0;
        if ((dx - along * (x1 - x0)) ** 2 + (dy - along * (y1 - y0)) ** 2 <= reach ** 2) this.drawn[y * this.width + x] = value;
      }
    }
    const [x, y] = [Math.floor(x1), Math.floor(y1)];
    if (x >= 0 && x < this.width && y >= 0 && y < this.height) this.drawn[y * this.width + x] = value;
  }

  /** The pixels from left and top up to, but without, right and bottom; what lies outside the picture is cut off. */
  box(left, top, right, bottom, value) {
    const [from, to] = this.#span(left, right, this.width);
    const [first, end] = this.#span(top, bottom, this.height);
    for (let y = first; y < end; y++) this.drawn.fill(value, y * this.width + from, y * this.width + Math.max(from, to));
  }

  invert() {
    for (let at = 0; at < this.drawn.length; at++) this.drawn[at] ^= 1;
  }

  clear() {
    this.drawn.fill(0);
  }

  /** A PNG, white where it is drawn and black where it is kept. */
  png() {
    return greyPng(this.width, this.height, (row, y) => {
      for (let x = 0; x < this.width; x++) row[x] = this.drawn[y * this.width + x] * 255;
    });
  }

  /** All of it in a small Blob, for `unpack`. */
  pack() {
    return new Response(new Blob([this.drawn]).stream().pipeThrough(new CompressionStream("deflate"))).blob();
  }

  async unpack(packed) {
    const drawn = new Uint8Array(await new Response(packed.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
    if (drawn.length === this.drawn.length) this.drawn = drawn;
  }

  #span(low, high, size) {
    return [Math.max(0, Math.floor(low)), Math.min(size, Math.ceil(high))];
  }
}
