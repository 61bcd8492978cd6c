/**
 * The page of `oar serve`: what is shown when, and what the buttons do.
 *
 *     form.js ----request----> job.js ----events----> picture_view.js, on stage.js
 *     mask_editor.js --mask--^        `---pictures--> history.js
 */
import { ApiError, send, takeToken } from "./api.js";
import { announce, byId, count, make, motionWanted, toDataUrl } from "./dom.js";
import { FieldError, Form } from "./form.js";
import { History } from "./history.js";
import { Job, finishedViews } from "./job.js";
import { login } from "./login.js";
import { MaskEditor } from "./mask_editor.js";
import { smallerCopy } from "./smaller.js";
import { Stage } from "./stage.js";

const form = new Form();
const stage = new Stage({ onSelect: () => showAbout() });
const editor = new MaskEditor({ onChange: () => byId("error-mask").setAttribute("hidden", "") });
const history = new History({ onOpen: (drawing) => reopen(drawing) });

let model = null;
let job = null;
/** What each mode shows on the stage: {request, views, drawing}; no drawing while it is not finished. */
const shown = { sample: null, edit: null };

// -- what is shown ------------------------------------------------------------------------------------------------------------------

function mode() {
  return document.body.dataset.mode;
}

function view() {
  return document.querySelector('input[name="view"]:checked').value;
}

function setMode(name) {
  document.querySelector(`input[name="mode"][value="${name}"]`).checked = true;
  document.body.dataset.mode = name;
  setView(name === "edit" && !shown.edit ? "mask" : view() === "mask" ? "picture" : view());
  const { request, views } = shown[name] ?? {};
  if (views) stage.open(views, request.prompt, { live: job !== null });
}

function setView(name) {
  document.querySelector(`input[name="view"][value="${name}"]`).checked = true;
  stage.setView(name === "mask" ? "picture" : name);
  layOut();
}

/** Show the part of the stage that belongs to mode, view and what there is. */
function layOut() {
  const masking = mode() === "edit" && view() === "mask";
  const pictures = !masking && shown[mode()] !== null;
  byId("blank").hidden = mode() === "edit" || pictures;
  byId("drop").hidden = !masking || editor.blob !== null;
  byId("masking").hidden = !masking || editor.blob === null;
  byId("result").hidden = !pictures;
  byId("legend").hidden = !pictures || view() === "picture";
  for (const option of document.querySelectorAll('input[name="view"]')) option.disabled = option.value !== "mask" && shown[mode()] === null;
  byId("draw").firstChild.textContent = mode() === "edit" ? "Draw what is marked" : "Draw";
  showAbout();
}

/** What the selected picture was made of. */
function showAbout() {
  const { request, drawing } = shown[mode()] ?? {};
  for (const name of ["download", "edit-this", "use-seed"]) byId(name).disabled = !drawing;
  byId("edit-this").hidden = !model?.edits;
  if (!request) return;
  const images = drawing?.images ?? [];
  const image = images[stage.selected];
  byId("about-prompt").textContent = request.prompt;
  const facts = [
    ["Seed", image?.seed ?? request.seed ?? "new"],
    ["Picture", images.length > 1 ? `${stage.selected + 1} of ${images.length}` : null],
    ["Order", request.order],
    ["Guidance", request.guidance],
    ["Strength", request.kind === "edit" && request.strength < 1 ? request.strength : null],
    ["Temperature", request.temperature === 1 ? null : request.temperature],
    ["Top k", request.top_k || null],
    ["Top p", request.top_p === 1 ? null : request.top_p],
    ["Steps", request.steps],
    ["Drawn", request.kind === "edit" && image ? count(image.drawn.length, "cell") : null],
  ].filter(([, value]) => value !== null && value !== undefined);
  byId("about-facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

// -- drawing ------------------------------------------------------------------------------------------------------------------------

async function draw() {
  if (job || !model) return;
  form.clearErrors();
  let request;
  try {
    request = form.read();
    if (mode() === "edit") checkMask(request);
  } catch (error) {
    return refuse(error);
  }
  const editing = mode() === "edit";
  job = new Job(model, watcher(request), editing ? editor.picture : null);
  showRunning("Sending");
  try {
    const files = editing ? { source: editor.blob, mask: await editor.pack() } : {};
    const sent = editing ? { ...request, image: await toDataUrl(editor.blob), mask: await toDataUrl(await editor.png()) } : request;
    const images = await job.run(sent);
    const drawing = { request, images, grid: model.grid, size: model.image_size, ...files };
    const views = await finishedViews(drawing);
    job = null;
    shown[request.kind] = { request, views, drawing };
    open(request.kind);
    announce(`Finished: ${count(images.length, "picture")}, seed ${images[0].seed}`);
    history.add(drawing);
  } catch (error) {
    const { cancelled } = job ?? {};
    job = null;
    if (cancelled) announce("Cancelled");
    else await refuse(error);
    stage.update({ live: false });
  } finally {
    showRunning(null);
  }
}

function checkMask(request) {
  if (!editor.blob) throw new FieldError("image", "Choose the picture that is to be edited.");
  if (!editor.marked) throw new FieldError("mask", "Nothing is marked. Mark what is to be drawn anew.");
  if (editor.everything && request.strength === 1) {
    throw new FieldError("mask", "All of the picture is marked, so nothing of it would be known. Leave some of it, or take a strength below 1.");
  }
}

/** Say what is wrong; a server that wants a token is given one, and asked again. */
async function refuse(error) {
  if (error instanceof ApiError && error.status === 401) {
    await login();
    return draw();
  }
  const wrong = error instanceof ApiError || error instanceof FieldError;
  const param = { n: "count" }[error.param] ?? error.param ?? null;
  if (param === "mask" && mode() === "edit") setView("mask");
  form.showError(param, wrong ? sentence(error.message) : `The page failed: ${error.message}`);
  if (!wrong) throw error;
}

function watcher(request) {
  let quarter = 0;
  let before = "";
  const say = (text) => {
    before = text;
    byId("state").textContent = text;
  };
  return {
    queued: (position) => say(position > 0 ? `Waiting: ${count(position, "drawing")} before this one` : "Waiting"),
    started(views) {
      shown[request.kind] = { request, views, drawing: null };
      open(request.kind);
      say("Drawing");
      announce("Drawing has started");
      if (innerWidth < 900) byId("stage").scrollIntoView({ behavior: motionWanted() ? "smooth" : "auto" });
    },
    placed() {
      const placed = job?.views.reduce((sum, each) => sum + each.order.length, 0) ?? 0;
      const total = job?.views.reduce((sum, each) => sum + each.total, 0) ?? 1;
      byId("bar").value = placed / total;
      byId("placed").textContent = `${placed} of ${count(total, "cell")}`;
      if (Math.floor((4 * placed) / total) > quarter) announce(`${25 * ++quarter} % drawn`);
      stage.update({ live: job !== null });
    },
    lost() {
      byId("state").textContent = "Connection lost. Trying again";
      byId("progress").classList.add("lost");
      announce("Connection lost. Trying again");
    },
    back() {
      byId("state").textContent = before;
      byId("progress").classList.remove("lost");
    },
    loading: () => say("Fetching the pictures"),
  };
}

function open(kind) {
  const { request, views } = shown[kind];
  stage.open(views, request.prompt, { live: job !== null });
  setView(view() === "mask" ? "picture" : view());
}

function showRunning(state) {
  const running = state !== null;
  const focused = document.activeElement;
  byId("progress").hidden = !running;
  byId("progress").classList.remove("lost");
  byId("state").textContent = state ?? "";
  byId("placed").textContent = "";
  byId("bar").removeAttribute("value");
  byId("draw").hidden = running;
  byId("cancel").hidden = !running;
  byId("history").inert = running;
  byId("modes").disabled = running;
  if (running && focused === byId("draw")) byId("cancel").focus();
  if (!running && (focused === document.body || focused === byId("cancel"))) byId("draw").focus();
}

function cancel() {
  if (job && !job.cancelled) job.cancel();
}

// -- pictures to edit, history --------------------------------------------------------------------------------------------------------

/** Edit this file or finished picture. */
async function edit(blob, name) {
  if (job) return;
  form.clearErrors();
  setMode("edit");
  byId("smaller").hidden = true;
  try {
    if (blob.type && !blob.type.startsWith("image/")) throw new FieldError("image", `${name} is no picture. PNG, JPEG and WebP can be edited.`);
    await editor.open(blob, { check: (width, height) => checkSize(blob, name, width, height) });
  } catch (error) {
    const message = error instanceof FieldError ? error.message : `This browser cannot read ${name}. PNG, JPEG and WebP can be edited.`;
    return form.showError("image", message);
  }
  showSource(name);
  shown.edit = null;
  setView("mask");
}

function checkSize(blob, name, width, height) {
  const { pixels, upload_bytes: bytes } = model.limits;
  const million = (number) => (number / 1e6).toFixed(1);
  let wrong = null;
  if (blob.size > bytes) wrong = `${million(blob.size)} MB; at most ${million(bytes)} MB can be sent.`;
  if (width * height > pixels) wrong = `${width} x ${height} pixels, ${million(width * height)} million; at most ${million(pixels)} million can be sent.`;
  if (!wrong) return;
  byId("smaller").hidden = false;
  byId("smaller").onclick = async () => edit(await smallerCopy(blob, model.limits), `Smaller copy of ${name}`);
  throw new FieldError("image", `${name} has ${wrong}`);
}

function showSource(name) {
  const [width, height] = editor.shape;
  byId("source-thumb").src = byId("source").src;
  byId("source-thumb").hidden = false;
  byId("source-name").textContent = `${name}, ${width} x ${height}`;
  byId("choose").textContent = "Change";
}

async function reopen(drawing) {
  const { request } = drawing;
  form.clearErrors();
  if (request.kind === "edit" && drawing.source) {
    await editor.open(drawing.source, { mask: drawing.mask });
    showSource("Picture");
  }
  shown[request.kind] = { request, views: await finishedViews(drawing), drawing };
  setMode(request.kind);
  form.fill(request);
  setView(view() === "mask" ? "picture" : view());
  byId("stage").scrollIntoView({ block: "nearest" });
}

function download() {
  const { request, images } = shown[mode()].drawing;
  const { blob, seed, number } = images[stage.selected];
  const words = request.prompt.normalize("NFC").match(/[\p{L}\p{M}\p{N}]+/gu) ?? ["picture"];
  const link = make("a", { href: URL.createObjectURL(blob), download: `${[...words.join("-")].slice(0, 60).join("")}-${seed}-${number}.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function editThis() {
  const { images } = shown[mode()].drawing;
  edit(images[stage.selected].blob, "Drawing");
}

// -- start --------------------------------------------------------------------------------------------------------------------------

async function readModel() {
  while (true) {
    try {
      return await (await send("api/model")).json();
    } catch (error) {
      if (error.status === 401) await login();
      else {
        form.showError(null, `${sentence(error.message)} This page tries again.`);
        await new Promise((resolve) => setTimeout(resolve, 3000));
      }
    }
  }
}

async function start() {
  takeToken();
  byId("settings").open = innerWidth >= 900;
  byId("draw").disabled = true;
  const answer = await readModel();
  model = { ...answer, cells: answer.grid * answer.grid };
  form.clearErrors();
  form.describeModel(model);
  document.title = `${model.name} – oar serve`;
  byId("model").textContent = model.name;
  byId("facts").textContent = `${model.image_size} × ${model.image_size} pixels, ${model.grid} × ${model.grid} cells`;
  byId("draw").disabled = model.prompt_kind === "features";
  byId("modes").hidden = !model.edits;
  byId("blank-grid").style.setProperty("--grid", model.grid);
  listen();
  await history.open(model.name);
  document.body.dataset.ready = "true";
}

function listen() {
  byId("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  byId("cancel").addEventListener("click", cancel);
  byId("modes").addEventListener("change", (event) => setMode(event.target.value));
  byId("views").addEventListener("change", (event) => setView(event.target.value));
  byId("download").addEventListener("click", download);
  byId("edit-this").addEventListener("click", editThis);
  byId("use-seed").addEventListener("click", () => form.useSeed(shown[mode()].drawing.images[stage.selected].seed));
  for (const button of ["choose", "choose-too"]) byId(button).addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", () => {
    const [file] = byId("file").files;
    byId("file").value = "";
    if (file) edit(file, file.name);
  });
  addEventListener("keydown", keys);
  addEventListener("paste", (event) => takeFile(event.clipboardData, event));
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    byId("dropping").hidden = false;
  });
  addEventListener("dragleave", (event) => {
    byId("dropping").hidden ||= event.relatedTarget === null;
  });
  addEventListener("drop", (event) => {
    byId("dropping").hidden = true;
    takeFile(event.dataTransfer, event);
  });
  addEventListener("pagehide", () => job?.cancel({ keepalive: true }));
}

function keys(event) {
  if (byId("login").open || event.isComposing) return;
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key === "Enter") draw();
  else if (event.key === "Escape" && job) cancel();
  else if (control && event.key.toLowerCase() === "z" && !byId("masking").hidden && !event.target.matches("input[type=number], textarea")) {
    if (event.shiftKey) editor.redo();
    else editor.undo();
  } else return;
  event.preventDefault();
}

function takeFile(data, event) {
  const [file] = data?.files ?? [];
  if (!file) return;
  event.preventDefault();
  edit(file, file.name || "Picture");
}

/** The server's message as a sentence of the page. */
function sentence(text) {
  const full = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(full) ? full : `${full}.`;
}

start();
