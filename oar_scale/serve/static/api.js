/** Requests to `oar serve`, or `oar study serve`. Addresses are relative to the page, so that it also works behind a path of a proxy. */

const TOKEN = "oar.token";

/** What the server refused, in its words; `param` names the field that is wrong. `status` 0: there was no answer. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, code = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

/** Take `#token=...` out of the address: it is kept for this tab only, and neither history nor bookmarks see it. */
export function takeToken() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const token = fragment.get("token");
  if (!token) return;
  setToken(token);
  history.replaceState(null, "", location.pathname + location.search);
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

/** Send a request; returns the response where the server is content with it. Raises ApiError otherwise. */
export async function send(path, { method = "GET", json, headers = {}, signal, keepalive = false } = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const all = { ...headers };
  if (token) all.Authorization = `Bearer ${token}`;
  if (json !== undefined) all["Content-Type"] = "application/json";
  const body = json === undefined ? undefined : JSON.stringify(json);
  let response;
  try {
    response = await fetch(address(path), { method, headers: all, body, signal, keepalive, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. See whether it is still running.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function address(path) {
  return new URL(path.replace(/^\/+/, ""), document.baseURI);
}

async function refusal(response) {
  const { status } = response;
  try {
    const { error } = await response.json();
    return new ApiError(String(error.message), { status, param: error.param, code: error.code });
  } catch {
    return new ApiError(`The server answered with status ${status} ${response.statusText}.`, { status });
  }
}
