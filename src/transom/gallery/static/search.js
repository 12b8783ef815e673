// Search while typing: in the index that came with the site, or by asking the server.
(() => {
  const form = document.querySelector(".search");
  const input = form?.querySelector("input");
  const list = form?.querySelector("#hits");
  if (!form) return;
  const served = form.dataset.source === "api";
  const most = 8;
  let active = -1, links = [], asked = 0, wait = 0, abort = null;

  const words = (text) => text.toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "")
    .split(/[^0-9a-z+]+/).filter((word) => word.length > 1);

  // the same sums as transom.gallery.index.search
  let vocabulary = null;
  const look = (text) => {
    const index = window.transomIndex;
    vocabulary ??= Object.keys(index.terms).sort((a, b) => (a < b ? -1 : 1));
    let total = null;
    for (const word of words(text)) {
      const found = new Map();
      let low = 0, high = vocabulary.length;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (vocabulary[middle] < word) low = middle + 1; else high = middle;
      }
      for (; low < vocabulary.length && vocabulary[low].startsWith(word); low++) {
        const term = vocabulary[low], entries = index.terms[term];
        const rare = Math.log(1 + index.documents.length / (entries.length / 2));
        for (let i = 0; i < entries.length; i += 2) {
          const score = entries[i + 1] * rare * (term === word ? 2 : 1);
          found.set(entries[i], Math.max(found.get(entries[i]) ?? 0, score));
        }
      }
      if (total === null) total = found;
      else {
        const both = new Map();
        for (const [d, score] of found) if (total.has(d)) both.set(d, total.get(d) + score);
        total = both;
      }
    }
    return [...(total ?? [])].sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, most)
      .map(([d]) => {
        const [title, href, says, runs] = index.documents[d];
        return { title, href: form.dataset.root + href, says, runs };
      });
  };

  const ask = async (text) => {
    abort?.abort();
    abort = new AbortController();
    const answer = await fetch(`/api/search?limit=${most}&q=${encodeURIComponent(text)}`, { signal: abort.signal });
    if (!answer.ok) return [];
    return (await answer.json()).hits;
  };

  const marked = (target, text, wanted) => {
    // whole words of the text that begin with what was typed
    for (const piece of text.split(/([0-9\p{L}+]+)/u)) {
      const hit = wanted.some((word) => words(piece)[0]?.startsWith(word));
      const node = document.createElement(hit ? "mark" : "span");
      node.textContent = piece;
      target.append(hit ? node : piece);
    }
  };

  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
    active = -1;
  };

  const choose = (number) => {
    active = number;
    links.forEach((item, i) => item.setAttribute("aria-selected", String(i === number)));
    if (number >= 0) {
      input.setAttribute("aria-activedescendant", links[number].id);
      links[number].scrollIntoView({ block: "nearest" });
    } else input.removeAttribute("aria-activedescendant");
  };

  const show = (hits, text) => {
    const wanted = words(text);
    links = hits.map((hit, i) => {
      const item = document.createElement("li");
      item.id = `hit-${i}`;
      item.setAttribute("role", "option");
      item.dataset.href = hit.href;
      const title = document.createElement("b");
      marked(title, hit.title, wanted);
      const says = document.createElement("span");
      says.textContent = hit.says + (hit.runs ? "" : hit.says ? " · not here yet" : "not here yet");
      item.append(title, says);
      item.addEventListener("mousedown", (event) => { event.preventDefault(); location.href = hit.href; });
      return item;
    });
    if (!hits.length) {
      const item = document.createElement("li");
      item.className = "empty";
      item.setAttribute("role", "option");
      item.setAttribute("aria-disabled", "true");
      item.setAttribute("aria-selected", "false");
      item.textContent = "Nothing has all of these words";
      list.replaceChildren(item);
    } else list.replaceChildren(...links);
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    choose(hits.length ? 0 : -1);
  };

  const search = async () => {
    const text = input.value, mine = ++asked;
    if (!words(text).length) { close(); return; }
    try {
      const hits = served ? await ask(text) : look(text);
      if (mine === asked) show(hits, text);  // an older answer may come later
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    }
  };

  input.addEventListener("input", () => {
    clearTimeout(wait);
    if (served) wait = setTimeout(search, 90);
    else search();
  });
  input.addEventListener("focus", () => { if (input.value) search(); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { if (list.hidden) input.blur(); else close(); }
    else if (list.hidden || !links.length) return;
    else if (event.key === "ArrowDown") { event.preventDefault(); choose((active + 1) % links.length); }
    else if (event.key === "ArrowUp") { event.preventDefault(); choose((active - 1 + links.length) % links.length); }
  });
  form.addEventListener("submit", (event) => {
    if (!list.hidden && active >= 0 && links[active]) {
      event.preventDefault();
      location.href = links[active].dataset.href;
    } else if (!served) {
      event.preventDefault();
      const first = look(input.value)[0];
      if (first) location.href = first.href;
    }
  });
})();
