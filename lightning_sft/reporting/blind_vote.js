
"use strict";
// One pair at a time; votes live in this browser's storage until they are exported.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = `lightning_sft votes ${data.comparison}`;
  const byId = (id) => document.getElementById(id);
  let votes = load();
  let at = firstOpen();

  function load() {
    try {
      return JSON.parse(localStorage.getItem(place)) || {};
    } catch {
      return {}; // storage is off: votes last as long as the page
    }
  }

  function save() {
    try {
      localStorage.setItem(place, JSON.stringify(votes));
    } catch {
      byId("state").textContent = "This browser keeps nothing: export before you close the page.";
    }
  }

  function firstOpen() {
    const open = data.items.findIndex((item) => !(item.item in votes));
    return open < 0 ? data.items.length : open;
  }

  function show() {
    const count = Object.keys(votes).length;
    byId("progress").value = count;
    byId("state").textContent = `${count} of ${data.items.length} voted`;
    const item = data.items[at];
    byId("pair").hidden = !item;
    if (!item) {
      byId("state").textContent += " — thank you. Export the votes now.";
      return;
    }
    for (const name of ["instruction", "input", "wanted", "left", "right"]) {
      byId(name).textContent = item[name] || (name === "input" ? "" : "(nothing)");
    }
    for (const side of ["left", "right"]) {
      byId(`${side}-card`).classList.toggle("chosen", votes[item.item] === side);
    }
  }

  function choose(choice) {
    const item = data.items[at];
    if (!item) return;
    // What is kept may know more than this page: of another tab, or what a quick reload came before.
    votes = { ...load(), ...votes, [item.item]: choice };
    save();
    at += 1;
    show();
  }

  function back() {
    at = Math.max(0, at - 1);
    show();
  }

  function exportVotes() {
    const { format, comparison } = data;
    const text = JSON.stringify({ format, comparison, votes }, null, 2);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "votes.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const button of document.querySelectorAll("[data-choice]")) {
    button.addEventListener("click", () => choose(button.dataset.choice));
  }
  byId("back").addEventListener("click", back);
  byId("export").addEventListener("click", exportVotes);
  const keys = { ArrowLeft: "left", ArrowRight: "right", t: "tie" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Backspace") back();
    else if (event.key in keys) choose(keys[event.key]);
    else return;
    event.preventDefault();
  });
  show();
})();
