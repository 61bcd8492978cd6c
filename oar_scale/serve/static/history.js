/**
 * Drawings that have ended, the newest first, with all that is needed to show them again or to draw on from them. They are kept in this
 * browser's own database (IndexedDB), so that they are still there after a reload; where it has none, in memory.
 */
import { byId, count, icon, make } from "./dom.js";

const MOST_DRAWINGS = 60;
const MOST_BYTES = 100e6;

export class History {
  #store;
  #drawings = [];
  #addresses = [];

  /** `onOpen(drawing)` is called when one is chosen. */
  constructor({ onOpen }) {
    this.onOpen = onOpen;
    byId("forget").addEventListener("click", () => this.#forget(() => false));
  }

  /** Read what is there. Drawings of another model are not shown, and stay. */
  async open(model) {
    this.model = model;
    this.#store = await openStore();
    this.#drawings = (await this.#store.all()).filter((drawing) => drawing.model === model).sort((one, other) => other.time - one.time);
    this.#show();
  }

  /** Remember a drawing: {request, images: [{blob, seed, number, order, scores, drawn}], grid, size, source, mask}. */
  async add(drawing) {
    const kept = { ...drawing, id: `${Date.now()}-${Math.random()}`, time: Date.now(), model: this.model };
    this.#drawings.unshift(kept);
    this.#show(kept.id);
    await this.#store.put(kept);
    let bytes = 0;
    await this.#forget((each, place) => {
      bytes += sizeOf(each);
      return place === 0 || (place < MOST_DRAWINGS && bytes <= MOST_BYTES);
    }, kept.id);
  }

  async #forget(keep, current = null) {
    const gone = this.#drawings.filter((drawing, place) => !keep(drawing, place));
    this.#drawings = this.#drawings.filter((drawing) => !gone.includes(drawing));
    if (gone.length) this.#show(current);
    for (const drawing of gone) await this.#store.remove(drawing.id);
  }

  #show(current = null) {
    for (const address of this.#addresses) URL.revokeObjectURL(address);
    this.#addresses = this.#drawings.map((drawing) => URL.createObjectURL(drawing.images[0].blob));
    byId("history").hidden = !this.#drawings.length;
    byId("drawings").replaceChildren(...this.#drawings.map((drawing, place) => this.#entry(drawing, this.#addresses[place], current)));
  }

  #entry(drawing, address, current) {
    const { images, request } = drawing;
    const what = request.kind === "edit" ? "Edit" : "Drawing";
    const open = make("button", { type: "button", class: "thumb", "aria-label": `${what}: ${request.prompt}, ${count(images.length, "picture")}` });
    open.title = request.prompt;
    open.append(make("img", { src: address, alt: "", class: drawing.size <= 160 ? "sharp" : "" }));
    if (images.length > 1) open.append(make("span", { class: "badge", "aria-hidden": "true" }, String(images.length)));
    if (drawing.id === current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      for (const each of byId("drawings").querySelectorAll("[aria-current]")) each.removeAttribute("aria-current");
      open.setAttribute("aria-current", "true");
      this.onOpen(drawing);
    });
    const remove = make("button", { type: "button", class: "remove", "aria-label": `Remove: ${request.prompt}` }, icon("close"));
    remove.addEventListener("click", () => this.#forget((each) => each !== drawing, current));
    return make("li", {}, open, remove);
  }
}

function sizeOf({ images, source, mask }) {
  return images.reduce((bytes, { blob }) => bytes + blob.size, 0) + (source?.size ?? 0) + (mask?.size ?? 0);
}

async function openStore() {
  try {
    return new Store(await settled(openDatabase()));
  } catch {
    return { all: async () => [], put: async () => {}, remove: async () => {} };
  }
}

/** One table of drawings, by their ids. What it cannot keep (the disk is full, say) lasts as long as the page. */
class Store {
  constructor(database) {
    this.database = database;
  }

  all() {
    return settled(this.#table("readonly").getAll()).catch(() => []);
  }

  put(drawing) {
    return settled(this.#table("readwrite").put(drawing)).catch(() => {});
  }

  remove(id) {
    return settled(this.#table("readwrite").delete(id)).catch(() => {});
  }

  #table(mode) {
    return this.database.transaction("drawings", mode).objectStore("drawings");
  }
}

function openDatabase() {
  const request = indexedDB.open("oar-serve", 1);
  request.addEventListener("upgradeneeded", () => request.result.createObjectStore("drawings", { keyPath: "id" }));
  return request;
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
  });
}
