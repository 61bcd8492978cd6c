// Light or dark, before the page is painted: what was chosen last time; else as the system says. Not a module, since those run later.
{
  const order = ["system", "light", "dark"];
  const read = () => {
    try {
      return localStorage.getItem("oar.theme");
    } catch {
      return null; // storage can be switched off
    }
  };
  const apply = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  let theme = order.includes(read()) ? read() : "system";
  apply(theme);
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      button.dataset.shows = theme;
      button.setAttribute("aria-label", `Colours: ${theme}`);
      button.title = `Colours: ${theme}. Press to change`;
    };
    button.addEventListener("click", () => {
      theme = order[(order.indexOf(theme) + 1) % order.length];
      apply(theme);
      show();
      document.dispatchEvent(new Event("themechange"));
      try {
        localStorage.setItem("oar.theme", theme);
      } catch {
        // it then lasts until the page is closed
      }
    });
    show();
  });
}
