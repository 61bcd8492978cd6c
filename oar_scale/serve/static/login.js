/** The dialog that asks for the token of a server that wants one. */
import { send, setToken } from "./api.js";
import { byId } from "./dom.js";

/** Ask, until the server takes the token and answers at `path`. Nothing on the page works without, so that the dialog cannot be closed. */
export async function login(path = "api/model") {
  const dialog = byId("login");
  if (!dialog.open) dialog.showModal();
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  while (true) {
    await submitted();
    setToken(byId("token").value.trim());
    try {
      await send(path);
      break;
    } catch (error) {
      byId("error-token").textContent = error.status === 401 ? "That is not the token of this server." : error.message;
      byId("error-token").hidden = false;
    }
  }
  byId("token").value = "";
  byId("error-token").hidden = true;
  dialog.close();
}

function submitted() {
  return new Promise((resolve) => {
    const end = (event) => {
      event.preventDefault();
      resolve();
    };
    byId("login-form").addEventListener("submit", end, { once: true });
  });
}
