
"use strict";
// Search, sort and paging of the table of answers. Without this script its first page is there.
(() => {
  const table = document.getElementById("answers");
  if (!table) return;
  const byId = (id) => document.getElementById(id);
  const { page, columns, rows } = JSON.parse(byId("data").textContent);
  const body = table.tBodies[0];
  const texts = (row) => row.slice(columns.length); // instruction, input, wanted, given, judge
  const lower = new Map(); // of each row that was searched, its texts in lower case
  let found = rows;
  let place = 0; // number of the page that is shown

  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.textContent = text;
    return element;
  }

  // The same row as `_render_row` of answers_table.py writes.
  function draw(row) {
    const [instruction, given, wanted, response, judge] = texts(row);
    const line = document.createElement("tr");
    columns.forEach(([name, title], k) => {
      line.setAttribute(`data-${name}`, row[k]);
      const cell = make("td", "num", row[k] < 0 ? "–" : row[k]);
      cell.setAttribute("data-label", title);
      line.append(cell);
    });
    const question = make("td", "text", "");
    question.append(make("p", "", instruction));
    if (given) question.append(make("p", "input", given));
    const answers = make("dl", "", "");
    answers.append(make("dt", "", "wanted"), make("dd", "wanted", wanted));
    answers.append(make("dt", "", "given"), make("dd", "given", response));
    if (!response) answers.lastChild.append(make("i", "", "nothing"));
    if (judge) answers.append(make("dt", "", "judge"), make("dd", "judge", judge));
    const texted = make("td", "text", "");
    texted.append(answers);
    line.append(question, texted);
    return line;
  }

  function count() {
    const last = Math.ceil(found.length / page);
    byId("shown").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    byId("previous").parentElement.hidden = last < 2;
    byId("place").textContent = `page ${place + 1} of ${last}`;
    byId("previous").disabled = place === 0;
    byId("next").disabled = place + 1 >= last;
  }

  function show(number) {
    place = number;
    body.replaceChildren(...found.slice(place * page, (place + 1) * page).map(draw));
    count();
  }

  function search() {
    const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    found = rows.filter((row) => {
      if (wanted.length && !lower.has(row)) lower.set(row, texts(row).join("\n").toLowerCase());
      return wanted.every((word) => lower.get(row).includes(word));
    });
    show(0);
  }

  function sort(column, direction) {
    const sign = direction === "up" ? 1 : -1;
    const place = columns.findIndex(([name]) => name === column);
    rows.sort((a, b) => sign * (a[place] - b[place]) || a[0] - b[0]);
    for (const head of table.tHead.querySelectorAll("th")) head.removeAttribute("aria-sort");
    table.tHead
      .querySelector(`[data-sort="${column}"]`)
      .setAttribute("aria-sort", direction === "up" ? "ascending" : "descending");
    byId("order").value = `${column}:${direction}`; // empty where the list has no such choice
    search();
  }

  byId("search").addEventListener("input", search);
  byId("order").addEventListener("change", () => sort(...byId("order").value.split(":")));
  for (const head of table.tHead.querySelectorAll("[data-sort]")) {
    head.firstElementChild.addEventListener("click", () => {
      const again = head.getAttribute("aria-sort") === "ascending";
      sort(head.dataset.sort, again ? "down" : "up");
    });
  }
  for (const [id, step] of [["previous", -1], ["next", 1]]) {
    byId(id).addEventListener("click", () => {
      show(place + step);
      table.scrollIntoView();
    });
  }
  count();
})();
