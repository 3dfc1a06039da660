
"use strict";
// Search and sort of the table of answers. Without this script the page is whole, only still.
(() => {
  const table = document.getElementById("answers");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const shown = document.getElementById("shown");
  const words = (row) => [...row.querySelectorAll("p, dd")].map((part) => part.textContent);
  const texts = new Map(rows.map((row) => [row, words(row).join("\n").toLowerCase()]));

  function filter() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      row.hidden = !wanted.every((word) => texts.get(row).includes(word));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length}`;
  }

  function sort(column, direction) {
    const sign = direction === "up" ? 1 : -1;
    const value = (row) => Number(row.getAttribute(`data-${column}`));
    const index = (row) => Number(row.dataset.index);
    rows.sort((a, b) => sign * (value(a) - value(b)) || index(a) - index(b));
    body.append(...rows);
    for (const head of table.tHead.querySelectorAll("th")) head.removeAttribute("aria-sort");
    table.tHead
      .querySelector(`[data-sort="${column}"]`)
      .setAttribute("aria-sort", direction === "up" ? "ascending" : "descending");
    order.value = `${column}:${direction}`; // empty where the list has no such choice
  }

  search.addEventListener("input", filter);
  order.addEventListener("change", () => sort(...order.value.split(":")));
  for (const head of table.tHead.querySelectorAll("[data-sort]")) {
    head.firstElementChild.addEventListener("click", () => {
      const again = head.getAttribute("aria-sort") === "ascending";
      sort(head.dataset.sort, again ? "down" : "up");
    });
  }
})();
