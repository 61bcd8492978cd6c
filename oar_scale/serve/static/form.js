/** The fields on the left: their limits and defaults from the server, what they say, and what is wrong with it, next to each field. */
import { byId, count, make } from "./dom.js";

/** What each field takes. Limits that depend on the model are added by `describeModel`. */
const NUMBERS = {
  count: { name: "Pictures", whole: true, min: 1, max: 1 },
  seed: { name: "Seed", whole: true, min: 0, max: Number.MAX_SAFE_INTEGER, optional: true },
  guidance: { name: "Guidance", min: 0 },
  temperature: { name: "Temperature", above: 0 },
  top_k: { name: "Top k", whole: true, min: 0 },
  top_p: { name: "Top p", above: 0, max: 1 },
  steps: { name: "Steps", whole: true, min: 1, max: 1, optional: true },
  strength: { name: "Strength", above: 0, max: 1 },
};
const SETTINGS = ["guidance", "temperature", "top_k", "top_p", "steps"];

const ORDERS = {
  confidence: "The model decides: always the cell it is most sure of.",
  random: "Another order for each picture.",
  raster: "Row by row.",
  spiral: "From the middle outwards, always to a neighbour.",
  "centre-out": "By distance from the middle.",
  halton: "Evenly over the picture, wherever one stops.",
  checkerboard: "Coarse to fine.",
  locality: "Beside what is there; the cells of one step apart.",
  mean: "By the mean order of the training pictures.",
  "order-head": "As a small network expects the model's own order.",
};

/** A field that is wrong: `param` says which. */
export class FieldError extends Error {
  constructor(param, message) {
    super(message);
    this.param = param;
  }
}

export class Form {
  #model = null;
  #limits = structuredClone(NUMBERS);

  constructor() {
    byId("dice").addEventListener("click", () => {
      byId("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]);
      this.#changed("seed");
    });
    byId("reset").addEventListener("click", () => this.reset());
    byId("order").addEventListener("change", () => this.#sayOrder());
    for (const name of ["guidance", "strength"]) this.#join(byId(name), byId(`${name}-range`));
    byId("form").addEventListener("input", (event) => {
      const field = event.target.closest("[data-param]");
      if (field) this.#changed(field.dataset.param);
    });
  }

  get kind() {
    return document.body.dataset.mode;
  }

  /** Fill in what the model can do. */
  describeModel(model) {
    this.#model = model;
    const { limits } = model;
    this.#limits.count.max = limits.images_per_request;
    this.#limits.steps.max = model.cells;
    byId("steps").placeholder = String(model.cells);
    for (const [param, { min, max }] of Object.entries(this.#limits)) {
      if (min !== undefined) byId(param).min = String(min);
      if (max !== undefined) byId(param).max = String(max);
    }
    byId("order").replaceChildren(...model.orders.map((order) => make("option", { value: order }, order)));
    this.#describePrompts(model);
    this.reset();
  }

  #describePrompts({ prompt_kind: kind, classes }) {
    const byClass = kind === "classes";
    byId("prompt").hidden = byClass;
    byId("class").hidden = !byClass;
    if (byClass) {
      byId("class").placeholder = `0 to ${classes - 1}`;
      byId("class").max = String(classes - 1);
      byId("prompt-label").textContent = "Class";
      byId("prompt-label").htmlFor = "class";
    }
    if (kind === "features") this.showError(null, "This model is conditioned on arrays of features, which cannot be written here. Use oar_scale.load in Python.");
  }

  /** The model's defaults, for what is not the prompt. */
  reset() {
    const { defaults } = this.#model;
    for (const name of SETTINGS) byId(name).value = defaults[name] ?? "";
    byId("order").value = defaults.order ?? (this.#model.orders.includes("confidence") ? "confidence" : this.#model.orders[0]);
    byId("strength").value = "1";
    this.#follow();
  }

  /** The settings of an earlier drawing. */
  fill(request) {
    byId("prompt").value = request.prompt;
    byId("class").value = request.prompt;
    for (const name of ["count", ...SETTINGS]) byId(name).value = request[name] ?? "";
    byId("seed").value = request.seed ?? "";
    if (request.order) byId("order").value = request.order;
    byId("strength").value = request.strength ?? 1;
    this.#follow();
  }

  useSeed(seed) {
    byId("seed").value = String(seed);
    this.#changed("seed");
  }

  /** What is asked for, as the server takes it, without picture and mask. Raises FieldError. */
  read() {
    const numbers = Object.keys(this.#limits).filter((name) => name !== "strength" || this.kind === "edit");
    const values = Object.fromEntries(numbers.map((name) => [name, this.#number(name)]));
    return { kind: this.kind, prompt: this.#prompt(), order: byId("order").value, ...values };
  }

  #prompt() {
    if (this.#model.prompt_kind === "classes") {
      return String(this.#number("prompt", { name: "Class", whole: true, min: 0, max: this.#model.classes - 1 }));
    }
    const prompt = byId("prompt").value.trim();
    const most = this.#model.limits.prompt_characters;
    if (!prompt) throw new FieldError("prompt", "Write what is to be drawn.");
    if ([...prompt].length > most) throw new FieldError("prompt", `The prompt has ${count([...prompt].length, "character")}; at most ${most.toLocaleString("en")}.`);
    return prompt;
  }

  #number(param, limits = this.#limits[param]) {
    const { name, whole, min, above, max = Infinity, optional } = limits;
    const input = this.#input(param);
    if (input.value.trim() === "" && !input.validity.badInput) {
      if (optional) return null;
      throw new FieldError(param, `${name}: a number is missing.`);
    }
    const value = Number(input.value);
    const fits = Number.isFinite(value) && (!whole || Number.isSafeInteger(value)) && (above === undefined ? value >= min : value > above) && value <= max;
    if (fits && !input.validity.badInput) return value;
    const low = above === undefined ? `from ${min}` : `above ${above}`;
    const high = max === Infinity ? "" : above === undefined ? ` to ${max}` : ` and at most ${max}`;
    throw new FieldError(param, `${name}: ${whole ? "a whole number" : "a number"} ${low}${high}.`);
  }

  /** Show what is wrong, next to the field where one is named, and go there. */
  showError(param, message) {
    const place = document.getElementById(`error-${param}`) ?? byId("error");
    place.textContent = message;
    place.hidden = false;
    const input = this.#input(param);
    if (!input) return;
    for (let fold = input.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    input.setAttribute("aria-invalid", "true");
    input.focus();
    place.scrollIntoView({ block: "nearest" });
  }

  clearErrors() {
    for (const error of document.querySelectorAll("#form .error, #error-mask")) error.hidden = true;
    for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }

  #input(param) {
    if (param === "prompt" && this.#model?.prompt_kind === "classes") return byId("class");
    if (param === "mask") return byId("overlay");
    if (param === "image") return byId("choose");
    return param === "prompt" || param === "order" || param in this.#limits ? byId(param) : null;
  }

  #changed(param) {
    const error = document.getElementById(`error-${param}`);
    if (error) error.hidden = true;
    this.#input(param)?.removeAttribute("aria-invalid");
    byId("error").hidden = true;
    this.#follow();
  }

  /** What is said about the fields follows them. */
  #follow() {
    this.#sayOrder();
    for (const name of ["guidance", "strength"]) byId(`${name}-range`).value = byId(name).value;
    const pictures = Number(byId("count").value) || 1;
    const seed = byId("seed").value;
    byId("settings-summary").textContent = [count(pictures, "picture"), seed ? `seed ${seed}` : "new seed", byId("order").value].join(" · ");
    const length = [...byId("prompt").value.trim()].length;
    const most = this.#model?.limits.prompt_characters ?? Infinity;
    byId("prompt-count").textContent = length > 0.8 * most ? `${length.toLocaleString("en")} of ${most.toLocaleString("en")}` : "";
  }

  #sayOrder() {
    byId("about-order").textContent = ORDERS[byId("order").value] ?? "";
  }

  #join(number, range) {
    range.addEventListener("input", () => {
      number.value = range.value;
    });
  }
}
