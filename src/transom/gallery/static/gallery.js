// Filters, sorting, copying and keys. Without it every page still reads.
(() => {
  const $ = (wanted, within = document) => within.querySelector(wanted);
  const $$ = (wanted, within = document) => [...within.querySelectorAll(wanted)];

  // light or dark
  const root = document.documentElement;
  const night = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => { root.dataset.theme = night() ? "dark" : "light"; };
  const turn = () => {
    root.dataset.theme = night() ? "light" : "dark";
    try { localStorage.setItem("theme", root.dataset.theme); } catch { /* closed storage */ }
  };
  show();
  $("#theme")?.addEventListener("click", turn);

  // filters
  const form = $("#filters");
  const folded = $(".filters");
  if (folded && matchMedia("(max-width: 60rem)").matches) folded.open = false;
  if (form?.dataset.mode === "served") {
    form.addEventListener("change", () => form.requestSubmit());
    $$("button[type=reset]").forEach((button) =>
      button.addEventListener("click", (event) => { event.preventDefault(); location.href = form.action; }));
  } else if (form) {
    const cards = $$(".card", $("#feed"));
    const fits = (card, host) => {
      if (!host.value) return true;
      if (host.dataset.decodes) return card.dataset.decodes === "yes";
      if (card.dataset.decodes === "yes") return false;
      const open = host.dataset.slots.split(" ");
      const wanted = card.dataset.slots.split(" ").filter((s) => s && s !== "tokenizer" && s !== "position");
      return wanted.length > 0 && wanted.every((slot) => open.includes(slot));
    };
    const apply = () => {
      const chosen = Object.fromEntries(new FormData(form));
      const host = $("#host").selectedOptions[0];
      let count = 0;
      for (const card of cards) {
        const d = card.dataset;
        const on = (!chosen.family || d.family === chosen.family)
          && (!chosen.kind || d.kinds.split(" ").includes(chosen.kind))
          && (!chosen.status || d.status.split(" ").includes(chosen.status))
          && fits(card, host);
        card.hidden = !on;
        count += on;
      }
      for (const day of $$(".day")) day.hidden = !$(".card:not([hidden])", day);
      $(".count").textContent = `${count} ${count === 1 ? "paper" : "papers"}`;
      $(".none").hidden = count > 0;
      const set = Object.entries(chosen).filter(([, value]) => value);
      const note = $(".active", folded);
      note.hidden = !set.length;
      note.textContent = set.length ? `(${set.map(([, value]) => value).join(", ")})` : "";
      const hash = new URLSearchParams(set).toString();
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    };
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      const field = form.elements[name];
      if (field) field.value = value;
    }
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    apply();
  }

  // tables that sort
  const value = (cell) => cell.dataset.value ?? cell.textContent.trim();
  for (const table of $$("table.sortable")) {
    $$("thead th", table).forEach((head, column) => {
      $("button", head)?.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        $$("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = $$("tbody tr", table).map((row) => [value(row.cells[column]), row]);
        rows.sort(([a], [b]) => {
          if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1);  // empty ones last, either way
          const x = Number(a), y = Number(b);
          const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  // copying
  for (const button of $$("[data-copy]")) {
    button.addEventListener("click", async () => {
      const code = $("code", button.parentElement);
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        getSelection().selectAllChildren(code);
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  // keys
  let before = "";
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches("input, select, textarea, [contenteditable]")) return;
    const key = event.key;
    if (key === "/") { event.preventDefault(); $("#q")?.focus(); }
    else if (key === "t") turn();
    else if (key === "j" || key === "k") {
      const links = $$(".card:not([hidden]) h3 a");
      const at = links.indexOf(document.activeElement);
      const next = links[key === "j" ? at + 1 : Math.max(0, at - 1)];
      next?.focus();
      next?.closest(".card").scrollIntoView({ block: "center" });
    } else if (before === "g" && key === "r") location.href = $("nav a:nth-child(2)").href;
    else if (before === "g" && key === "f") location.href = $("nav a:nth-child(1)").href;
    before = key;
  });
})();
