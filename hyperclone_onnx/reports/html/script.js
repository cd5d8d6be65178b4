"use strict";
for (const data of document.querySelectorAll(".data")) {
  const body = data.querySelector("tbody");
  const rows = [...body.rows];
  const key = (row, place) => {
    const cell = row.cells[place];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  const names = new Intl.Collator("en", { numeric: true });
  const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : names.compare(String(a), String(b)));
  const heads = [...data.querySelectorAll("thead th")];
  if (rows.length > 1) {
    heads.forEach((head, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.title = "Sort by " + head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        rows.sort((a, b) => (down ? -1 : 1) * order(key(a, place), key(b, place)));
        body.append(...rows);
      });
    });
  }
  const search = data.querySelector(".search");
  if (search) {
    search.hidden = false;
    const input = search.querySelector("input");
    const output = search.querySelector("output");
    const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const filter = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const fits = words.every((word) => texts.get(row).includes(word));
        row.hidden = !fits;
        row.style.display = fits ? "" : "none";
        shown += fits ? 1 : 0;
      }
      output.value = shown + " of " + rows.length;
    };
    input.addEventListener("input", filter);
    filter();
  }
}
for (const code of document.querySelectorAll(".steps pre")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected: copy it with the keyboard";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 2500);
  });
  code.after(button);
}
