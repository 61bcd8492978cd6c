/** One request to draw: sent, followed event by event, and its pictures fetched at the end. Knows the views, not the page around them. */
import { ApiError, send } from "./api.js";
import { loadPicture } from "./dom.js";
import { readEvents } from "./events.js";
import { PictureView } from "./picture_view.js";

const STOPPED = "The server stopped this drawing, as nobody watched it for a while. Draw it again.";

export class Job {
  #id = null;
  #stop = new AbortController();

  /**
   * `base` is the picture that is edited, with its shape; null where none is. `watch` has a function for each thing that happens:
   * queued(position), started(views), placed(), lost(), back(), loading().
   */
  constructor(model, watch, base = null) {
    this.model = model;
    this.watch = watch;
    this.base = base;
    this.views = [];
  }

  get cancelled() {
    return this.#stop.signal.aborted;
  }

  /** Draw. Returns the images: {blob, picture, seed, number, order, scores, drawn}. Raises ApiError, or AbortError once it is cancelled. */
  async run(request) {
    const { signal } = this.#stop;
    const response = await send("api/jobs", { method: "POST", json: request, signal });
    const { id, position } = await response.json();
    this.#id = id;
    this.watch.queued(position);
    const options = { signal, last: ["done", "error"], onLost: () => this.watch.lost(), onBack: () => this.watch.back() };
    for await (const { name, data } of readEvents(`api/jobs/${id}/events`, options)) {
      if (name === "queued") this.watch.queued(data.position);
      if (name === "start") this.#start(data);
      if (name === "step") this.#step(data);
      if (name === "preview") this.#preview(data);
      if (name === "error") throw new ApiError(data.code === "cancelled" ? STOPPED : data.message, { status: 400, ...data });
      if (name === "done") return await this.#fetchImages(data.images);
    }
    throw new ApiError("The drawing ended without pictures.");
  }

  /** Stop it, here and on the server; with `keepalive` also while the page is being left. */
  cancel({ keepalive = false } = {}) {
    this.#stop.abort();
    if (this.#id) send(`api/jobs/${this.#id}`, { method: "DELETE", keepalive }).catch(() => {}); // unwatched, it ends by itself
  }

  #start({ known }) {
    this.views = known.map((cells) => {
      const view = newView(this.model, this.base);
      view.setKnown(cells);
      return view;
    });
    this.watch.started(this.views);
  }

  #step({ image, cells, scores }) {
    this.views[image].place(cells, scores);
    this.watch.placed();
  }

  async #preview({ image, url }) {
    const view = this.views[image];
    const placed = view.order.length;
    view.setSquare(await loadPicture(url), placed);
    this.watch.placed();
  }

  async #fetchImages(images) {
    this.watch.loading();
    return Promise.all(
      images.map(async (image) => {
        const response = await send(image.url, { signal: this.#stop.signal });
        return { ...image, blob: await response.blob() };
      }),
    );
  }
}

/** Views of a drawing that has ended. */
export async function finishedViews({ images, grid, size }) {
  return Promise.all(
    images.map(async (image) => {
      const address = URL.createObjectURL(image.blob);
      const picture = await loadPicture(address).finally(() => URL.revokeObjectURL(address));
      const view = new PictureView({ grid, size, shape: [picture.naturalWidth, picture.naturalHeight] });
      view.finish(picture, image);
      return view;
    }),
  );
}

function newView({ grid, image_size: size }, base) {
  const view = new PictureView({ grid, size, shape: base ? [base.naturalWidth, base.naturalHeight] : undefined });
  view.base = base;
  return view;
}
