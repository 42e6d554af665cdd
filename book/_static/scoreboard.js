// Filter and sort the scoreboard. Without this script the table is complete and in book order.
(() => {
  const board = document.querySelector(".gb-scoreboard");
  if (!board) return;
  const table = board.querySelector("table");
  const form = board.querySelector("form");
  const count = board.querySelector(".gb-count span");
  const bodies = [...table.tBodies];
  const rows = bodies.flatMap((body) =>
    [...body.rows]
      .filter((row) => !row.classList.contains("gb-part"))
      .map((element, place) => ({
        element,
        body,
        place,
        part: body.dataset.part,
        text: `${body.dataset.part} ${element.textContent}`.toLowerCase(),
      })),
  );
  const scales = ["small", "medium", "full"];

  const verdicts = (row, scale) =>
    row.element.dataset.verdicts
      ? [row.element.dataset.verdicts]
      : (scale ? [scale] : scales).map((name) => row.element.dataset[name]);

  function filter() {
    const wanted = Object.fromEntries(new FormData(form));
    const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      row.element.hidden = !(
        words.every((word) => row.text.includes(word)) &&
        (!wanted.part || row.part === wanted.part) &&
        (!wanted.verdict || verdicts(row, wanted.scale).includes(wanted.verdict))
      );
    }
    for (const body of bodies) {
      const shown = rows.some((row) => row.body === body && !row.element.hidden);
      body.querySelector(".gb-part").hidden = sorted() || !shown;
    }
    for (const scale of scales) {
      const off = wanted.scale !== "" && wanted.scale !== scale;
      table.classList.toggle(`gb-without-${scale}`, off);
    }
    showTitles();
    report();
    remember(wanted);
  }

  // A paper's title is shown once, at its first visible row in book order, and always when sorted.
  function showTitles() {
    const seen = new Set();
    for (const { element } of rows) {
      const head = element.querySelector("th");
      const first = !seen.has(head.dataset.sort);
      if (!element.hidden) seen.add(head.dataset.sort);
      element.classList.toggle("gb-titled", sorted() || (first && !element.hidden));
    }
  }

  function report() {
    const shown = rows.filter((row) => !row.element.hidden);
    const planned = shown.filter((row) => row.element.dataset.verdicts).length;
    const all = shown.length === rows.length ? "" : ` (of ${rows.length} rows)`;
    count.textContent = `${shown.length - planned} claims and ${planned} planned papers${all}.`;
  }

  function remember(wanted) {
    const query = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value));
    const search = query.size ? `?${query}` : "";
    history.replaceState(null, "", location.pathname + search + location.hash);
  }

  const sorted = () => table.querySelector("th[aria-sort]") !== null;

  function key(row, column) {
    const cell = row.element.cells[column];
    return cell ? (cell.dataset.sort ?? cell.textContent.trim()) : "";
  }

  function compare(a, b) {
    if (!a || !b) return !a - !b; // empty cells last, both ways
    return a.localeCompare(b, "en", { numeric: true });
  }

  function sort(head) {
    const next = { none: "ascending", ascending: "descending", descending: "none" };
    const order = next[head.getAttribute("aria-sort") ?? "none"];
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    if (order !== "none") head.setAttribute("aria-sort", order);
    const column = head.cellIndex;
    const sign = order === "descending" ? -1 : 1;
    const ranked = [...rows];
    if (order !== "none") {
      ranked.sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        return x && y ? sign * compare(x, y) : compare(x, y);
      });
    }
    for (const row of ranked) (order === "none" ? row.body : bodies[0]).append(row.element);
    filter();
  }

  function restore() {
    for (const [name, value] of new URLSearchParams(location.search)) {
      if (form.elements[name]) form.elements[name].value = value;
    }
  }

  for (const button of table.querySelectorAll(".gb-sort")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  form.hidden = false;
  restore();
  filter();
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
})();
