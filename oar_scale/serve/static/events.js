/**
 * Server-sent events by fetch, which unlike EventSource can send a token. A connection that breaks is opened again with the id of the last
 * event that arrived (Last-Event-ID), so that none is lost.
 */
import { ApiError, send } from "./api.js";

const FIRST_PAUSE = 500;
/** The server stops a job that nobody has watched for 15 seconds. */
const LONGEST_PAUSE = 4000;
/** The server says something at least every 15 seconds; a connection that is silent for so long is dead. */
const LONGEST_SILENCE = 45_000;

/**
 * The events of a job, {name, id, data}, until one that is named in `last`.
 *
 * `onLost` is called when the connection breaks, `onBack` once it stands again. Raises ApiError where the server refuses.
 */
export async function* readEvents(path, { signal, last, onLost, onBack }) {
  let id = null;
  let pause = FIRST_PAUSE;
  let lost = false;
  while (true) {
    try {
      const headers = { Accept: "text/event-stream" };
      if (id !== null) headers["Last-Event-ID"] = id;
      const response = await send(path, { headers, signal });
      if (lost) onBack();
      lost = false;
      for await (const event of parse(response.body)) {
        pause = FIRST_PAUSE;
        if (event.id !== null) id = event.id;
        yield event;
        if (last.includes(event.name)) return;
      }
    } catch (error) {
      signal.throwIfAborted();
      if (error instanceof ApiError && error.status !== 0 && ![429, 502, 503, 504].includes(error.status)) throw error;
    }
    if (!lost) onLost();
    lost = true;
    await sleep(pause, signal);
    pause = Math.min(2 * pause, LONGEST_PAUSE);
  }
}

/** Events of a stream of bytes, as the HTML standard defines them. Ends with the stream; raises where the connection breaks. */
export async function* parse(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let event = { name: "message", id: null, lines: [] };
  try {
    while (true) {
      const { done, value } = await heard(reader.read());
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line !== "") {
          addLine(event, line);
          continue;
        }
        if (event.lines.length) yield { name: event.name, id: event.id, data: JSON.parse(event.lines.join("\n")) };
        event = { name: "message", id: null, lines: [] };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function addLine(event, line) {
  const colon = line.indexOf(":");
  const field = colon < 0 ? line : line.slice(0, colon);
  const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
  if (field === "event") event.name = value;
  if (field === "id") event.id = value;
  if (field === "data") event.lines.push(value);
}

/** The promise, unless nothing comes of it for too long. */
function heard(promise) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error("silent")), LONGEST_SILENCE);
  });
  return Promise.race([promise, silence]).finally(() => clearTimeout(timer));
}

/** Wait; less where the browser says that the network is back. */
function sleep(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      resolve();
    };
    const timer = setTimeout(end, milliseconds);
    addEventListener("online", end);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  });
}
