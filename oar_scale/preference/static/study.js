/**
 * The page of a study: shows two pictures, sends the answer, and shows the next two, which are there already.
 *
 *     intro --Begin--> comparing --answer--> comparing ... --> finished
 *                        `--- trouble (no answer from the server; nothing is lost) --- Try again
 *
 * The server knows where this rater is; the page keeps nothing but a random number, under a name of the study's own.
 */
import { ApiError, send, takeToken } from "../api.js";
import { announce, byId, count } from "../dom.js";
import { login } from "../login.js";

/** No answer is taken sooner, since nobody has looked at both pictures by then: a second click was meant for the pair before. */
const SHORTEST_MS = 250;
/** Pictures with sides below this are shown in sharp pixels, and not too large: of huge squares nobody recognises anything. */
const SMALL = 160;
const LARGEST_PIXEL = 8;

let study = null;
let rater = null;
let session = null;
let shownAt = 0;
let busy = true;
/** What "Try again" does. */
let retry = start;
/** Addresses of pictures that have been fetched, by name. */
const pictures = new Map();

// -- who ----------------------------------------------------------------------------------------------------------------------------

/** The number of this rater: that of the last visit, or a new one. crypto.randomUUID would want HTTPS. */
function findRater() {
  const name = `oar.study.${study.fingerprint}`;
  const fresh = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  try {
    const known = localStorage.getItem(name);
    if (/^[0-9a-f]{32}$/.test(known ?? "")) return known;
    localStorage.setItem(name, fresh);
  } catch {
    byId("no-storage").hidden = false;
  }
  return fresh;
}

// -- what is shown ------------------------------------------------------------------------------------------------------------------

function showOnly(name) {
  for (const each of ["intro", "comparing", "finished", "trouble"]) byId(each).hidden = each !== name;
}

function showProgress() {
  byId("place").textContent = `${session.done} of ${session.total}`;
  byId("bar").max = Math.max(1, session.total);
  byId("bar").value = session.done;
}

/** Show what comes next, once both pictures are there, and fetch those of the pair after it. */
async function show() {
  showProgress();
  const [current, after] = session.next;
  if (!current) {
    forget([]);
    showOnly("finished");
    announce("Finished");
    busy = false;
    return;
  }
  const both = await Promise.all([load(current.left), load(current.right)]);
  showOnly("comparing");
  byId("question").textContent = current.question;
  for (const [side, picture] of [["left", both[0]], ["right", both[1]]]) {
    const image = byId(`${side}-picture`);
    image.src = picture.src;
    const pixels = Math.max(picture.naturalWidth, picture.naturalHeight);
    image.classList.toggle("sharp", pixels < SMALL);
    image.style.maxWidth = pixels < SMALL ? `${pixels * LARGEST_PIXEL}px` : "";
    await image.decode();
  }
  for (const name of ["left", "right", "tie"]) byId(name).classList.remove("chosen");
  byId("undo").disabled = session.last === null;
  await painted();
  shownAt = performance.now();
  announce(current.question);
  setTimeout(() => {
    document.body.dataset.comparison = current.comparison;
    busy = false;
  }, SHORTEST_MS);
  forget([current, after]);
  if (after) for (const name of [after.left, after.right]) load(name).catch(() => pictures.delete(name));
}

function painted() {
  return new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
}

/** A picture that is ready to be shown. An address in <img> could carry no token. */
async function load(name) {
  if (!pictures.has(name)) pictures.set(name, fetchPicture(name));
  return pictures.get(name);
}

async function fetchPicture(name) {
  try {
    const image = new Image();
    image.src = URL.createObjectURL(await (await send(`api/pictures/${name}.png`)).blob());
    await image.decode();
    return image;
  } catch (error) {
    pictures.delete(name);
    throw error;
  }
}

/** Free the pictures of all pairs but these. */
function forget(pairs) {
  const kept = new Set(pairs.filter(Boolean).flatMap((pair) => [pair.left, pair.right]));
  for (const [name, loading] of pictures) {
    if (kept.has(name)) continue;
    pictures.delete(name);
    loading.then((image) => URL.revokeObjectURL(image.src)).catch(() => {});
  }
}

// -- what the rater does ------------------------------------------------------------------------------------------------------------

async function choose(choice) {
  const ms = Math.round(performance.now() - shownAt);
  if (busy || byId("comparing").hidden) return;
  byId(choice).classList.add("chosen");
  await tell("api/answers", { comparison: session.next[0].comparison, choice, ms });
}

async function undo() {
  if (busy || !session?.last || (byId("comparing").hidden && byId("finished").hidden)) return;
  await tell("api/undo", { comparison: session.last });
}

/** Send it, until it has arrived, and show what comes next. The same twice is once to the server. */
async function tell(path, what) {
  busy = true;
  delete document.body.dataset.comparison;
  try {
    session = await post(path, what);
    await show();
  } catch (error) {
    fail(error, () => tell(path, what));
  }
}

async function post(path, what = {}) {
  return (await send(path, { method: "POST", json: { study: study.fingerprint, rater, ...what } })).json();
}

function fail(error, next) {
  if (error.status === 401) return login("api/study").then(next);
  // What it says about this session is old: another tab has gone on, or the server has another study now.
  retry = error.status >= 400 && error.status < 500 && error.status !== 429 ? start : next;
  if (!(error instanceof ApiError)) console.error(error); // a fault of the page itself
  byId("error").textContent = error.status === 0 ? `${error.message} Your answers so far are stored.` : error.message;
  showOnly("trouble");
  return undefined;
}

// -- beginning ----------------------------------------------------------------------------------------------------------------------

async function start() {
  busy = true;
  try {
    study = await (await send("api/study")).json();
    rater = findRater();
    session = await post("api/session");
    if (session.done > 0) return await show();
    showProgress();
    byId("how-many").textContent = count(study.comparisons, "time");
    byId("about-checks").hidden = study.checks === 0;
    showOnly("intro");
    for (const name of session.next.flatMap((pair) => [pair.left, pair.right])) load(name).catch(() => {});
  } catch (error) {
    return fail(error, start);
  } finally {
    document.body.dataset.ready = "";
  }
  return undefined;
}

function begin() {
  busy = true;
  show().catch((error) => fail(error, begin));
}

const KEYS = { ArrowLeft: () => choose("left"), ArrowRight: () => choose("right"), ArrowDown: () => choose("tie"), Backspace: undo };

addEventListener("keydown", (event) => {
  if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey || byId("login").open) return;
  if (byId("comparing").hidden && (event.key !== "Backspace" || byId("finished").hidden)) return;
  event.preventDefault();
  if (!event.repeat) KEYS[event.key]();
});
for (const choice of ["left", "right", "tie"]) {
  byId(choice).addEventListener("click", (event) => {
    if (event.detail < 2) choose(choice);
  });
}
for (const name of ["undo", "undo-last"]) byId(name).addEventListener("click", undo);
byId("start").addEventListener("click", begin);
byId("again").addEventListener("click", () => retry());

takeToken();
start();
