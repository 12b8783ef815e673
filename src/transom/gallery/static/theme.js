// Runs before the page is drawn, so that the chosen colours are there from the first moment.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("theme");
  } catch {
    // storage may be closed; then the system decides
  }
  if (chosen === "dark" || chosen === "light") {
    document.documentElement.dataset.theme = chosen;
  }
  document.documentElement.classList.add("js");
})();
