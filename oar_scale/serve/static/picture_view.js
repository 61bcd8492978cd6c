/**
 * One picture on a canvas, as far as it is drawn: its cells as they are placed, the order in which they were, or how sure the model was.
 *
 *     cells of the square that the model draws          view "picture"      "order"          "confidence"
 *     . not placed yet: tinted   = known: as it was     [pixels] .  .       [ 1 ][ 3 ] .     [87 %][ 41 %] .
 *
 * A picture that is no square lies in the middle of the square; the rest of the square is not shown.
 */
import { colour, inkOn } from "./colours.js";

/** Pictures of at most so many pixels a side are shown with sharp pixels, and figures need cells of so many. */
const SMALL_PICTURE = 160;
const CELL_FOR_FIGURES = 30;

export class PictureView {
  /** `size` and `grid`: pixels and cells along a side of the square; `shape`: width and height of the picture on it. */
  constructor({ size, grid, shape = [size, size] }) {
    this.size = size;
    this.grid = grid;
    this.shape = shape;
    this.inner = innerBox(size, ...shape);
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.order = [];
    this.scores = new Float32Array(grid * grid);
    this.places = new Int32Array(grid * grid).fill(-1);
    this.known = new Uint8Array(grid * grid);
    this.total = grid * grid;
    this.base = null;
    this.square = null;
    this.final = null;
    this.decoded = 0;
  }

  get ratio() {
    return this.shape[0] / this.shape[1];
  }

  get sharp() {
    return Math.max(...this.shape, this.size) <= SMALL_PICTURE;
  }

  /** These cells are not drawn: they show `base`, the picture that is edited. */
  setKnown(cells) {
    for (const cell of cells) this.known[cell] = 1;
    this.total = this.grid * this.grid - cells.length;
  }

  /** Cells that have just been placed, with their scores (log probabilities). */
  place(cells, scores) {
    cells.forEach((cell, at) => {
      if (this.places[cell] >= 0 || this.known[cell]) return; // an event that came twice
      this.places[cell] = this.order.length;
      this.scores[cell] = scores[at];
      this.order.push(cell);
    });
  }

  /** The square so far, which shows the cells placed until now. */
  setSquare(picture, placed) {
    if (placed < this.decoded) return; // pictures are decoded in parallel: an older one came later
    this.square = picture;
    this.decoded = placed;
  }

  /** All that there is to know, at once: of a drawing that has ended. */
  finish(picture, { order, scores, drawn }) {
    const cells = this.grid * this.grid;
    const isDrawn = new Uint8Array(cells);
    for (const cell of drawn) isDrawn[cell] = 1;
    this.known.fill(0);
    this.places.fill(-1);
    this.order = [];
    this.setKnown(Array.from({ length: cells }, (_, cell) => cell).filter((cell) => !isDrawn[cell]));
    order.forEach((cell, step) => this.place([cell], [scores[step]]));
    this.final = picture;
  }

  /** What is known of the cell under a point of the canvas, given as shares of its width and height; null where nothing is. */
  cellAt(x, y) {
    const pixels = this.size / this.grid;
    const column = Math.floor((this.inner.left + x * this.inner.width) / pixels);
    const row = Math.floor((this.inner.top + y * this.inner.height) / pixels);
    return row >= 0 && row < this.grid && column >= 0 && column < this.grid ? row * this.grid + column : null;
  }

  /** Paint the first `steps` cells of the order, `width` CSS pixels wide. `marked`: outline the last one. */
  paint(view, steps, width, { marked, colours }) {
    const density = Math.min(window.devicePixelRatio || 1, 3);
    const height = width / this.ratio;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * density);
    this.canvas.height = Math.round(height * density);
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = !this.sharp;
    context.imageSmoothingQuality = "high";
    this.#paintPicture(context, steps, colours);
    if (view !== "picture") this.#paintHeat(context, view, steps, colours, density);
    if (marked && steps > 0 && steps <= this.order.length) this.#outline(context, this.order[steps - 1], colours, density);
  }

  #paintPicture(context, steps, colours) {
    const { width, height } = context.canvas;
    context.fillStyle = colours.empty;
    context.fillRect(0, 0, width, height);
    const whole = this.final ?? this.base;
    if (whole) context.drawImage(whole, 0, 0, width, height);
    for (let cell = 0; cell < this.places.length; cell++) {
      if (this.known[cell]) continue;
      const place = this.places[cell];
      if (place < 0 || place >= steps) this.#fill(context, cell, (this.#row(cell) + this.#column(cell)) % 2 ? colours.empty : colours.emptyToo);
      else if (!this.final && place < this.decoded) this.#copy(context, cell);
      else if (!this.final) this.#fill(context, cell, colours.placed);
    }
  }

  #paintHeat(context, view, steps, colours, density) {
    const { width, height } = context.canvas;
    context.globalAlpha = 0.72; // known cells stay visible, but step back
    context.fillStyle = colours.page;
    context.fillRect(0, 0, width, height);
    context.globalAlpha = 1;
    const side = (width / this.inner.width) * (this.size / this.grid);
    context.font = `${Math.round(Math.min(side * 0.36, 15 * density))}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const cell of this.order.slice(0, steps)) {
      const shade = colour(view, this.value(view, cell));
      this.#fill(context, cell, `rgb(${shade})`);
      if (side < CELL_FOR_FIGURES * density) continue;
      const [x, y, cellWidth, cellHeight] = this.#box(context, cell);
      context.fillStyle = inkOn(shade);
      const figure = view === "order" ? this.places[cell] + 1 : Math.round(100 * this.probability(cell));
      context.fillText(String(figure), x + cellWidth / 2, y + cellHeight / 2);
    }
  }

  /** The place of a cell on a colour map, 0 to 1. */
  value(view, cell) {
    return view === "order" ? this.places[cell] / Math.max(1, this.total - 1) : this.probability(cell);
  }

  /** How likely the model held its best guess for a cell to be. */
  probability(cell) {
    return Math.min(1, Math.exp(this.scores[cell]));
  }

  #outline(context, cell, colours, density) {
    const [x, y, width, height] = this.#box(context, cell);
    for (const [line, inset, style] of [[4 * density, 2, colours.page], [2 * density, 2, colours.accent]]) {
      context.lineWidth = line;
      context.strokeStyle = style;
      context.strokeRect(x + inset * density, y + inset * density, width - 2 * inset * density, height - 2 * inset * density);
    }
  }

  #fill(context, cell, style) {
    context.fillStyle = style;
    context.fillRect(...this.#box(context, cell));
  }

  #copy(context, cell) {
    const { naturalWidth } = this.square;
    const side = naturalWidth / this.grid;
    context.drawImage(this.square, this.#column(cell) * side, this.#row(cell) * side, side, side, ...this.#box(context, cell));
  }

  /** Where a cell lies on the canvas, on whole pixels: left, top, width, height. */
  #box(context, cell) {
    const pixels = this.size / this.grid;
    const across = (column) => Math.round(((column * pixels - this.inner.left) / this.inner.width) * context.canvas.width);
    const down = (row) => Math.round(((row * pixels - this.inner.top) / this.inner.height) * context.canvas.height);
    const [row, column] = [this.#row(cell), this.#column(cell)];
    return [across(column), down(row), across(column + 1) - across(column), down(row + 1) - down(row)];
  }

  #row(cell) {
    return Math.floor(cell / this.grid);
  }

  #column(cell) {
    return cell % this.grid;
  }
}

/** Where a picture lies on the model's square, as the server scales it: fitted, in the middle. */
function innerBox(size, width, height) {
  const scaled = [width, height].map((side) => Math.max(1, roundHalfEven((side * size) / Math.max(width, height))));
  return { left: Math.floor((size - scaled[0]) / 2), top: Math.floor((size - scaled[1]) / 2), width: scaled[0], height: scaled[1] };
}

/** As Python rounds. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 ? below + 1 : below;
}
