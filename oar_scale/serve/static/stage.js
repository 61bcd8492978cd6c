/**
 * The pictures of one drawing: while they are drawn, and afterwards. They share a view (picture, order, confidence) and a slider that goes
 * through their steps; one of them is selected, and is what the buttons below are about.
 */
import { byId, count, icon, make } from "./dom.js";
import { paintRamp } from "./colours.js";

const GAP = 12;
/** A replay of any length takes about so long, in milliseconds. */
const REPLAY_TIME = 4000;

export class Stage {
  #views = [];
  #tiles = [];
  #drawing = null;
  #steps = 0;
  #selected = 0;
  #enlarged = false;
  #live = false;
  #painting = 0;
  #player = 0;

  /** `onSelect(index)` is called when another picture is selected. */
  constructor({ onSelect }) {
    this.onSelect = onSelect;
    this.box = byId("pictures");
    this.slider = byId("step");
    this.view = "picture";
    new ResizeObserver(() => this.#later()).observe(this.box);
    document.addEventListener("themechange", () => this.#later());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#later());
    this.slider.addEventListener("input", () => {
      this.#stopPlaying();
      this.#show(Number(this.slider.value));
    });
    byId("play").addEventListener("click", () => (this.#player ? this.#stopPlaying() : this.#play()));
    byId("enlarge").addEventListener("click", () => this.#enlarge(!this.#enlarged));
  }

  get selected() {
    return this.#selected;
  }

  /** The views of a drawing; `live` while it is drawn. */
  open(views, prompt, { live }) {
    this.#stopPlaying();
    this.#views = views;
    this.#drawing = prompt;
    this.#enlarged = false;
    this.#selected = 0;
    this.#tiles = views.map((view, index) => this.#tile(view, index));
    this.box.replaceChildren(...this.#tiles);
    this.update({ live });
  }

  /** Something was placed, or it has ended: show all that is there. */
  update({ live }) {
    this.#live = live;
    this.slider.max = String(this.#length);
    byId("play").disabled = this.slider.disabled = live || !this.#length;
    byId("enlarge").hidden = this.#views.length < 2;
    this.#show(this.#length);
  }

  setView(view) {
    this.view = view;
    if (view !== "picture") {
      paintRamp(byId("ramp"), view);
      byId("ramp-low").textContent = view === "order" ? "first" : "0 %";
      byId("ramp-high").textContent = view === "order" ? "last" : "100 % sure";
    }
    this.#later();
  }

  get #length() {
    return Math.max(0, ...this.#views.map((view) => view.order.length));
  }

  #tile(view, index) {
    const several = this.#views.length > 1;
    const tile = several ? make("button", { type: "button", class: "tile" }, view.canvas) : make("div", { class: "tile" }, view.canvas);
    if (several) {
      tile.setAttribute("aria-label", `Picture ${index + 1} of ${this.#views.length}`);
      tile.addEventListener("click", () => this.#select(index));
      tile.addEventListener("dblclick", () => this.#enlarge(!this.#enlarged));
    }
    tile.addEventListener("pointermove", (event) => this.#point(view, event));
    tile.addEventListener("pointerleave", () => this.#sayStep());
    return tile;
  }

  #select(index) {
    this.#selected = index;
    this.onSelect(index);
    this.#later();
    this.#sayStep();
  }

  #enlarge(enlarged) {
    this.#enlarged = enlarged;
    this.#later();
  }

  #show(steps) {
    this.#steps = steps;
    this.slider.value = String(steps);
    this.slider.setAttribute("aria-valuetext", `step ${steps} of ${this.#length}`);
    this.#sayStep();
    this.#later();
  }

  #play() {
    const length = this.#length;
    let started = performance.now();
    let from = this.#steps < length ? this.#steps : 0;
    const next = (now) => {
      const steps = Math.min(length, from + Math.floor(((now - started) / REPLAY_TIME) * length));
      if (steps !== this.#steps) this.#show(steps);
      if (steps < length) this.#player = requestAnimationFrame(next);
      else this.#stopPlaying();
    };
    this.#show(from);
    this.#player = requestAnimationFrame(next);
    this.#showPlayer();
  }

  #stopPlaying() {
    cancelAnimationFrame(this.#player);
    this.#player = 0;
    this.#showPlayer();
  }

  #showPlayer() {
    const label = this.#player ? "Pause" : "Replay the drawing";
    byId("play").replaceChildren(icon(this.#player ? "pause" : "play"));
    byId("play").setAttribute("aria-label", label);
    byId("play").title = label;
  }

  /** What the slider stands at, of the selected picture: the last cell that is placed, and how sure the model was of it. */
  #sayStep() {
    const view = this.#views[this.#selected];
    if (!view || this.#live) return this.#read("");
    const steps = Math.min(this.#steps, view.order.length);
    this.#read(steps ? describe(view, view.order[steps - 1]) : "Nothing is placed yet");
  }

  #point(view, event) {
    const box = view.canvas.getBoundingClientRect();
    const cell = view.cellAt((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    if (cell !== null) this.#read(describe(view, cell));
  }

  #read(text) {
    byId("cell").textContent = text;
  }

  /** Paint with the next frame, once, however much has changed. */
  #later() {
    this.#painting ||= requestAnimationFrame(() => {
      this.#painting = 0;
      this.#paint();
    });
  }

  #paint() {
    if (!this.#views.length || !this.box.clientWidth) return;
    const shown = this.#enlarged ? [this.#selected] : [...this.#views.keys()];
    const { width, columns } = this.#fit(shown.length);
    this.box.style.gridTemplateColumns = `repeat(${columns}, max-content)`;
    const colours = readColours(this.box);
    byId("enlarge").textContent = this.#enlarged ? "Show all" : "Enlarge";
    this.#views.forEach((view, index) => {
      const tile = this.#tiles[index];
      tile.hidden = !shown.includes(index);
      if (this.#views.length > 1) tile.setAttribute("aria-pressed", String(index === this.#selected));
      view.canvas.setAttribute("aria-label", this.#label(view));
      const marked = this.#live || this.#steps < this.#length;
      if (!tile.hidden) view.paint(this.view, Math.min(this.#steps, view.order.length), width, { marked, colours });
    });
  }

  #label(view) {
    const placed = Math.min(this.#steps, view.order.length);
    const what = { picture: "", order: ", order of its cells", confidence: ", confidence of its cells" }[this.view];
    return `${this.#drawing}${what}: ${placed} of ${count(view.total, "cell")} placed`;
  }

  /** The largest width that all shown pictures can have beside and below each other; whole multiples of small pictures' pixels. */
  #fit(pictures) {
    const { sharp, ratio, shape } = this.#views[0];
    const room = this.box.clientWidth;
    const tall = matchMedia("(min-width: 900px) and (min-height: 620px)").matches ? this.box.clientHeight : Infinity;
    let best = { width: 0, columns: 1 };
    const most = tall === Infinity ? Math.min(pictures, room < 560 ? 2 : 3) : pictures;
    for (let columns = tall === Infinity ? most : 1; columns <= most; columns++) {
      const rows = Math.ceil(pictures / columns);
      const wide = (room - GAP * (columns - 1)) / columns;
      const width = Math.min(wide, ((tall - GAP * (rows - 1)) / rows) * ratio, 880);
      if (width > best.width) best = { width, columns };
    }
    const whole = sharp ? Math.floor(best.width / shape[0]) * shape[0] : 0;
    return { columns: best.columns, width: Math.max(whole || Math.floor(best.width), 24) };
  }
}

/** A cell in words: where it is, when it was placed and how sure the model was. */
function describe(view, cell) {
  const where = `Row ${Math.floor(cell / view.grid) + 1}, column ${(cell % view.grid) + 1}`;
  if (view.known[cell]) return `${where}: known, not drawn`;
  if (view.places[cell] < 0) return `${where}: not placed yet`;
  return `${where}: step ${view.places[cell] + 1} of ${view.total}, ${(100 * view.probability(cell)).toFixed(1)} % sure`;
}

function readColours(element) {
  const style = getComputedStyle(element);
  const names = { empty: "--cell", emptyToo: "--cell-too", placed: "--cell-placed", page: "--canvas-page", accent: "--canvas-accent" };
  return Object.fromEntries(Object.entries(names).map(([name, property]) => [name, style.getPropertyValue(property)]));
}
