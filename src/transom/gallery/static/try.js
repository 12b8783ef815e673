// Preview of the picture, progress of a job, and the blocks of its result.
(() => {
  const $ = (wanted) => document.querySelector(wanted);

  const form = $("#try");
  if (form) {
    const input = $("#picture"), drop = $("#drop"), canvas = $("#preview");
    const show = async () => {
      const file = input.files[0];
      if (!file) return;
      $("#chosen").textContent = `${file.name}, ${(file.size / 2 ** 20).toFixed(1)} MiB`;
      try {
        const picture = await createImageBitmap(file);
        const scale = Math.min(1, 640 / picture.width, 480 / picture.height);
        canvas.width = Math.max(1, Math.round(picture.width * scale));
        canvas.height = Math.max(1, Math.round(picture.height * scale));
        canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
        picture.close();
        canvas.hidden = false;
        $("#invite").hidden = true;
      } catch {
        canvas.hidden = true;
        $("#invite").hidden = false;
        $("#chosen").textContent = `${file.name} cannot be shown; is it a picture?`;
      }
    };
    input.addEventListener("change", show);
    for (const kind of ["dragenter", "dragover"]) drop.addEventListener(kind, () => drop.classList.add("over"));
    for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("over"));
    const boxes = [...form.querySelectorAll("[name=method]")];
    const limit = () => {
      const full = boxes.filter((box) => box.checked).length;
      for (const box of boxes) box.disabled = full >= 4 && !box.checked;
      boxes[0].setCustomValidity(full ? "" : "Choose at least one method");
    };
    form.addEventListener("change", limit);
    limit();
    form.addEventListener("submit", () => {
      const button = form.querySelector("button[type=submit]");
      button.textContent = "Sending …";
      setTimeout(() => { button.disabled = true; });
    });
  }

  const job = $("#job");
  if (job && ["waiting", "running"].includes(job.dataset.state)) {
    const source = new EventSource(job.dataset.events);
    source.addEventListener("message", (event) => {
      const told = JSON.parse(event.data);
      if (told.step) {
        $("#step").textContent = told.step;
        $("#part").textContent = `${told.done} of ${told.total}`;
        $("#bar").max = told.total;
        $("#bar").value = told.done;
      } else if (told.state === "waiting" && told.ahead) {
        $("#step").textContent = `waiting: ${told.ahead} before this one`;
      } else if (told.state === "running") $("#step").textContent = "starting";
      else if (["done", "failed", "cancelled"].includes(told.state)) {
        source.close();
        location.reload();
      }
    });
  }

  for (const slider of document.querySelectorAll(".layers input")) {
    const frames = [...slider.closest("figure").querySelectorAll(".frames img")];
    slider.addEventListener("input", () => {
      frames.forEach((frame, i) => { frame.hidden = i !== Number(slider.value); });
      slider.nextElementSibling.textContent = frames[slider.value].dataset.label;
    });
  }
})();
