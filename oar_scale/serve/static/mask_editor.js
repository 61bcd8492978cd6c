/**
 * The picture that is edited, and the mask on it: drawn with a mouse, a pen or a finger, with keys, or as boxes by numbers.
 *
 * The mask has the picture's own pixels (mask.js); what is seen of it is painted anew on a canvas over the picture, as large as on the screen.
 */
import { byId, loadPicture } from "./dom.js";
import { Mask } from "./mask.js";

const MARK = [31, 111, 178, 150];
const STRIPE = [255, 255, 255, 190];
const STRIPE_EVERY = 9;
/** The button of a pen that is turned round. */
const ERASER = 5;
/** Pictures with fewer pixels a side are shown with sharp pixels. */
const SMALL_PICTURE = 160;

export class MaskEditor {
  #mask = null;
  #box = null;
  #pointer = null;
  #last = null;
  #value = 1;
  #painting = 0;

  /** `onChange()` is called when a picture is opened or the mask changes. */
  constructor({ onChange }) {
    this.onChange = onChange;
    this.blob = null;
    this.overlay = byId("overlay");
    new ResizeObserver(() => this.#fit()).observe(byId("easel"));
    this.#listenToPointer();
    this.overlay.addEventListener("keydown", (event) => this.#key(event));
    this.overlay.addEventListener("blur", () => this.#hidePointer());
    byId("thickness").addEventListener("input", () => this.#sayThickness());
    for (const name of ["undo", "redo"]) byId(name).addEventListener("click", () => this.#do(() => this.#mask[name](), { undone: false }));
    for (const name of ["invert", "clear"]) byId(name).addEventListener("click", () => this.#do(() => this.#mask[name]()));
    byId("box-add").addEventListener("click", () => this.#boxByNumbers(1));
    byId("box-remove").addEventListener("click", () => this.#boxByNumbers(0));
  }

  get marked() {
    return this.#mask?.count ?? 0;
  }

  get everything() {
    return this.#mask !== null && this.marked === this.#mask.drawn.length;
  }

  get shape() {
    return [this.#mask.width, this.#mask.height];
  }

  /** Open a picture (a Blob). Rejects where this browser cannot read it, or `check(width, height)` throws. */
  async open(blob, { check = () => {}, mask = null } = {}) {
    const address = URL.createObjectURL(blob);
    try {
      const picture = await loadPicture(address);
      check(picture.naturalWidth, picture.naturalHeight);
      this.picture = picture;
    } catch (error) {
      URL.revokeObjectURL(address);
      throw error;
    }
    if (this.blob) URL.revokeObjectURL(byId("source").src);
    const { naturalWidth: width, naturalHeight: height } = this.picture;
    this.blob = blob;
    this.#mask = new Mask(width, height);
    if (mask) await this.#mask.unpack(mask);
    this.#box = this.#pointer = this.#last = null;
    byId("source").src = address;
    byId("sheet").classList.toggle("sharp", Math.max(width, height) <= SMALL_PICTURE);
    byId("thickness").max = String(Math.max(2, Math.round(Math.max(width, height) / 2)));
    byId("thickness").value = String(Math.max(1, Math.round(Math.max(width, height) / 8)));
    byId("box-right").value = String(width);
    byId("box-bottom").value = String(height);
    this.#sayThickness();
    this.#fit();
    this.#changed();
  }

  /** The mask as a Blob, for `open`. */
  pack() {
    return this.#mask.pack();
  }

  png() {
    return this.#mask.png();
  }

  undo() {
    byId("undo").click();
  }

  redo() {
    byId("redo").click();
  }

  // -- mouse, pen and finger ------------------------------------------------------------------------------------------------------

  #listenToPointer() {
    const { overlay } = this;
    overlay.addEventListener("pointerdown", (event) => {
      if (!event.isPrimary || ![0, ERASER].includes(event.button) || !this.#mask) return;
      overlay.setPointerCapture(event.pointerId);
      this.#start(this.#pixel(event), event.button === ERASER ? "erase" : tool());
    });
    overlay.addEventListener("pointermove", (event) => {
      if (!event.isPrimary || !this.#mask) return;
      const passed = event.getCoalescedEvents?.() ?? [];
      for (const each of passed.length ? passed : [event]) this.#move(this.#pixel(each));
    });
    overlay.addEventListener("pointerup", (event) => event.isPrimary && this.#end());
    overlay.addEventListener("pointercancel", (event) => {
      if (event.isPrimary && this.#last) this.#mask.undo(); // the browser took it for a gesture of its own
      this.#last = this.#box = null;
      this.#changed();
    });
    overlay.addEventListener("pointerleave", () => this.#last || this.#hidePointer());
  }

  #pixel(event) {
    const box = this.overlay.getBoundingClientRect();
    return [((event.clientX - box.left) / box.width) * this.#mask.width, ((event.clientY - box.top) / box.height) * this.#mask.height];
  }

  #start(at, how) {
    this.#mask.begin();
    this.#last = at;
    this.#pointer = at;
    this.#value = Number(how !== "erase");
    if (how === "box") this.#box = [...at, ...at];
    else this.#mask.line(...at, ...at, thickness(), this.#value);
    this.#later();
  }

  #move(at) {
    if (this.#last && this.#box) this.#box = [...this.#box.slice(0, 2), ...at];
    else if (this.#last) this.#mask.line(...this.#last, ...at, thickness(), this.#value);
    if (this.#last) this.#last = at;
    this.#pointer = at;
    this.#later();
  }

  #end() {
    if (!this.#last) return;
    if (this.#box) this.#mask.box(...sorted(this.#box), 1);
    this.#last = this.#box = null;
    this.#changed();
  }

  #hidePointer() {
    this.#pointer = this.#last ? this.#pointer : null;
    this.#later();
  }

  // -- keys and numbers -----------------------------------------------------------------------------------------------------------

  #key(event) {
    if (!this.#mask || event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = this.#mask;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in arrows) {
      const by = Math.max(1, Math.round(Math.max(width, height) / (event.shiftKey ? 8 : 64)));
      const [x, y] = this.#pointer ?? [width / 2, height / 2];
      const [right, down] = arrows[event.key];
      this.#pointer = [Math.min(Math.max(Math.floor(x) + right * by, 0), width - 1) + 0.5, Math.min(Math.max(Math.floor(y) + down * by, 0), height - 1) + 0.5];
      if (this.#box) this.#box = [...this.#box.slice(0, 2), ...this.#pointer];
      this.#say(`${Math.floor(this.#pointer[0])}, ${Math.floor(this.#pointer[1])}`);
      this.#later();
    } else if (event.key === " " || event.key === "Enter") {
      this.#press();
    } else {
      return;
    }
    event.preventDefault();
  }

  #press() {
    const at = (this.#pointer ??= [this.#mask.width / 2, this.#mask.height / 2]);
    if (tool() !== "box") this.#do(() => this.#mask.line(...at, ...at, thickness(), Number(tool() === "brush")));
    else if (this.#box) {
      const box = sorted(this.#box);
      this.#box = null;
      this.#do(() => this.#mask.box(...box, 1));
    } else {
      this.#box = [...at, ...at];
      this.#say(`Corner at ${Math.floor(at[0])}, ${Math.floor(at[1])}`);
      this.#later();
    }
  }

  #boxByNumbers(value) {
    const numbers = ["left", "top", "right", "bottom"].map((side) => byId(`box-${side}`).valueAsNumber);
    const [left, top, right, bottom] = numbers;
    const { width, height } = this.#mask;
    const fits = numbers.every(Number.isInteger) && 0 <= left && left < right && right <= width && 0 <= top && top < bottom && bottom <= height;
    byId("error-box").hidden = fits;
    if (fits) this.#do(() => this.#mask.box(left, top, right, bottom, value));
    else byId("error-box").textContent = `Whole numbers: left below right up to ${width}, top below bottom up to ${height}.`;
  }

  #do(change, { undone = true } = {}) {
    if (!this.#mask) return;
    if (undone) this.#mask.begin();
    change();
    this.#changed();
  }

  // -- what is seen ---------------------------------------------------------------------------------------------------------------

  #changed() {
    byId("undo").disabled = !this.#mask?.canUndo;
    byId("redo").disabled = !this.#mask?.canRedo;
    const share = this.#mask ? this.marked / this.#mask.drawn.length : 0;
    const percent = share > 0 && share < 0.01 ? "less than 1" : String(Math.round(100 * share));
    byId("mask-share").textContent = share ? `${percent} % of the picture is drawn anew` : "Mark what is to be drawn anew";
    this.#later();
    this.onChange();
  }

  #say(text) {
    byId("announcer").textContent = text;
  }

  #sayThickness() {
    byId("thickness-value").textContent = `${thickness()} px`;
  }

  /** As large as there is room; small pictures a whole number of times. */
  #fit() {
    const easel = byId("easel");
    if (!this.#mask || !easel.clientWidth) return;
    const [width, height] = this.shape;
    const scrolls = !matchMedia("(min-width: 900px) and (min-height: 620px)").matches;
    const scale = Math.min(easel.clientWidth / width, (scrolls ? window.innerHeight * 0.7 : easel.clientHeight) / height, 880 / Math.max(width, height));
    const whole = Math.max(width, height) <= SMALL_PICTURE ? Math.max(1, Math.floor(scale)) : scale;
    const sheet = byId("sheet");
    sheet.style.width = `${Math.floor(width * whole)}px`;
    sheet.style.height = `${Math.max(1, Math.floor(height * whole))}px`;
    const density = Math.min(window.devicePixelRatio || 1, 2);
    this.overlay.width = Math.max(1, Math.round(width * whole * density));
    this.overlay.height = Math.max(1, Math.round(height * whole * density));
    this.#later();
  }

  #later() {
    this.#painting ||= requestAnimationFrame(() => {
      this.#painting = 0;
      if (this.#mask) this.#paint();
    });
  }

  #paint() {
    const { overlay } = this;
    const context = overlay.getContext("2d");
    const { width, height, drawn } = this.#mask;
    const page = context.createImageData(overlay.width, overlay.height);
    const pixels = new Uint32Array(page.data.buffer);
    const [mark, stripe] = [MARK, STRIPE].map((colour) => new Uint32Array(Uint8Array.from(colour).buffer)[0]);
    const columns = Uint32Array.from({ length: overlay.width }, (_, x) => Math.floor((x * width) / overlay.width));
    for (let y = 0; y < overlay.height; y++) {
      const row = Math.floor((y * height) / overlay.height) * width;
      for (let x = 0; x < overlay.width; x++) {
        if (drawn[row + columns[x]]) pixels[y * overlay.width + x] = (x + y) % STRIPE_EVERY < 1.5 ? stripe : mark;
      }
    }
    context.putImageData(page, 0, 0);
    this.#paintPointer(context, overlay.width / width);
  }

  #paintPointer(context, scale) {
    const shape = new Path2D();
    if (this.#box) {
      const [left, top, right, bottom] = sorted(this.#box);
      shape.rect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
    } else if (this.#pointer) {
      const [x, y] = this.#pointer.map((at) => at * scale);
      if (tool() !== "box") shape.arc(x, y, Math.max(2, (thickness() / 2) * scale), 0, 2 * Math.PI);
      else for (const [right, down] of [[9, 0], [0, 9]]) shape.addPath(new Path2D(`M${x - right} ${y - down}L${x + right} ${y + down}`));
    }
    for (const [width, style] of [[4, "#000"], [1.75, "#fff"]]) {
      context.lineWidth = width;
      context.strokeStyle = style;
      context.stroke(shape);
    }
  }
}

function tool() {
  return document.querySelector('input[name="tool"]:checked').value;
}

function thickness() {
  return Number(byId("thickness").value);
}

/** Corners of a box as left, top, right, bottom, in whole pixels: each pixel that it touches. */
function sorted([x0, y0, x1, y1]) {
  return [Math.floor(Math.min(x0, x1)), Math.floor(Math.min(y0, y1)), Math.ceil(Math.max(x0, x1)), Math.ceil(Math.max(y0, y1))];
}
