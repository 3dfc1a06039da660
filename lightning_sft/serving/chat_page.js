
"use strict";
// Asks `/v1` and shows the answers as they come. Everything a model wrote goes through textContent.
(() => {
  const at = (id) => document.getElementById(id);
  const make = (id) => at(id).content.firstElementChild.cloneNode(true);
  const form = at("ask");
  const instruction = at("instruction");
  let token = ""; // in memory only
  let models = [];
  let turns = []; // of this conversation: {question, given, answers: {model: text}}
  let running = null; // the AbortController of what is being answered

  async function call(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    if (token) headers.Authorization = `Bearer ${token}`;
    const method = body ? "POST" : "GET";
    const response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
    if (response.ok) return response;
    const { error } = await response.json().catch(() => ({ error: null }));
    throw Object.assign(new Error(error ? error.message : `status ${response.status}`), {
      status: response.status,
    });
  }

  // --- connecting ---

  async function connect() {
    try {
      models = (await (await call("/v1/models")).json()).data;
    } catch (error) {
      if (error.status !== 401) {
        at("about").textContent = `The server cannot be reached: ${error.message}`;
        return;
      }
      at("token-note").textContent = token
        ? "That was not it."
        : "It is kept in this page's memory only, until you leave.";
      token = "";
      at("about").textContent = "Not connected.";
      at("token-form").hidden = false;
      form.hidden = true;
      at("token").focus();
      return;
    }
    at("token-form").hidden = true;
    at("token").value = "";
    const names = models.map((model) => model.id);
    at("title").textContent = `Talk to ${names.join(" and ")}`;
    document.title = `${names.join(" and ")} · talk`;
    at("about").textContent = models
      .map((model) => `${model.prompt_style} prompts, ${model.context_length} tokens of context`)
      .filter((text, place, all) => all.indexOf(text) === place)
      .join("; ");
    const { defaults, limits } = models[0];
    for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
      at(name).value = defaults[name] ?? "";
    }
    at("max_tokens").max = limits.max_tokens;
    if (models.length > 1) offerModels(names);
    if (turns.length === 0) at("earlier").checked = models.every((model) => model.keeps_turns);
    showSettings();
    at("ask-button").disabled = form.hidden = false;
    at("empty").hidden = turns.length > 0;
    instruction.focus();
  }

  function offerModels(names) {
    const choices = [["", "both, side by side"], ...names.map((name) => [name, name])];
    at("who").hidden = false;
    at("who-choices").replaceChildren(
      ...choices.map(([value, text], place) => {
        const label = document.createElement("label");
        const input = document.createElement("input");
        Object.assign(input, { type: "radio", name: "who", value, checked: place === 0 });
        label.append(input, text);
        return label;
      }),
    );
  }

  function showSettings() {
    const read = (id, text) => (at(id).value === "" ? [] : [`${text} ${at(id).value}`]);
    const parts = [...read("temperature", "temperature"), ...read("top_p", "top p"), ...read("top_k", "top k")];
    parts.push(...read("seed", "seed"), ...(at("earlier").checked ? ["earlier turns"] : []));
    parts.push(...(at("system").value.trim() ? ["system prompt"] : []));
    at("turns-note").textContent = at("earlier").checked
      ? "Earlier turns go along with each question; Clear begins anew."
      : "Each question stands by itself, unless the settings say that earlier turns go along.";
    at("settings-note").textContent = parts.join(", ");
  }

  // --- asking ---

  function readSettings() {
    const settings = {};
    for (const id of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
      if (at(id).value !== "") settings[id] = Number(at(id).value);
    }
    if (at("stop").value) settings.stop = at("stop").value;
    return settings;
  }

  function buildBody(model, question, given, settings) {
    const messages = [];
    const system = at("system").value.trim();
    if (system) messages.push({ role: "system", content: system });
    if (at("earlier").checked) {
      for (const turn of turns.filter((turn) => turn.answers[model]?.trim())) {
        const input = turn.given ? { input: turn.given } : {};
        messages.push({ role: "user", content: turn.question, ...input });
        messages.push({ role: "assistant", content: turn.answers[model] });
      }
    }
    messages.push({ role: "user", content: question });
    return { model, messages, ...(given ? { input: given } : {}), ...settings };
  }

  async function ask(question, given) {
    const chosen = form.elements.who ? form.elements.who.value : "";
    const names = chosen ? [chosen] : models.map((model) => model.id);
    const settings = readSettings();
    const exchange = make("exchange");
    exchange.querySelector(".question").textContent = question;
    const input = exchange.querySelector(".given-input");
    input.textContent = given;
    input.hidden = !given;
    exchange.querySelector(".answers").classList.toggle("two", names.length > 1);
    at("empty").hidden = true;
    at("log").append(exchange);
    at("clear").disabled = false;
    const turn = { question, given, answers: {} };
    running = new AbortController();
    setRunning(true);
    at("spoken").textContent = "Answering";
    const bodies = names.map((name) => buildBody(name, question, given, settings));
    const cards = bodies.map((body) => addAnswer(exchange, body));
    scrollTo(0, document.documentElement.scrollHeight);
    const { signal } = running;
    const texts = await Promise.all(bodies.map((body, place) => answer(body, cards[place], signal)));
    const follow = nearEnd(); // what the cards say at the end makes them longer
    names.forEach((name, place) => (turn.answers[name] = texts[place]));
    if (exchange.isConnected) {
      turns.push(turn);
      const said = cards.map((card) => {
        const text = card.querySelector(".text").textContent || "nothing";
        return `${card.querySelector(".who").textContent}: ${text} ${card.querySelector(".facts").textContent}`;
      });
      at("spoken").textContent = said.join(" — ");
    }
    running = null;
    setRunning(false);
    if (follow) scrollTo(0, document.documentElement.scrollHeight);
  }

  function addAnswer(exchange, body) {
    const card = make("answer");
    card.querySelector(".who").textContent = body.model;
    card.classList.add("running");
    const details = card.querySelector("details");
    details.addEventListener("toggle", () => details.open && showPrompt(body, details), { once: true });
    exchange.querySelector(".answers").append(card);
    return card;
  }

  async function showPrompt(body, details) {
    const { model, messages, input, max_tokens } = body;
    const shown = details.querySelector("pre");
    try {
      const reply = await (await call("/v1/chat/prompt", { model, messages, input, max_tokens })).json();
      shown.textContent = reply.prompt;
      details.querySelector("summary").textContent += ` (${reply.prompt_tokens} tokens)`;
    } catch (error) {
      shown.textContent = error.message;
    }
    details.scrollIntoView({ block: "nearest" });
  }

  async function answer(body, card, signal) {
    const text = card.querySelector(".text");
    const facts = card.querySelector(".facts");
    const begun = performance.now();
    let usage = null;
    let reason = null;
    let cut = 0;
    try {
      const options = { stream: true, stream_options: { include_usage: true } };
      const response = await call("/v1/chat/completions", { ...body, ...options }, signal);
      for await (const chunk of readEvents(response)) {
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        cut = chunk.cut_turns ?? 0;
        const choice = chunk.choices[0];
        if (!choice) continue;
        reason = choice.finish_reason ?? reason;
        if (choice.delta.content) {
          const follow = nearEnd();
          text.append(choice.delta.content);
          if (follow) scrollTo(0, document.documentElement.scrollHeight);
        }
      }
      if (!reason) throw new Error("The connection ended before the answer did.");
      const seconds = (performance.now() - begun) / 1000;
      const speed = usage ? `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s` : "";
      facts.textContent = reason === "length" ? `${speed}, cut off at its most tokens` : speed;
      if (cut) facts.textContent += `; the oldest ${cut === 1 ? "turn" : `${cut} turns`} left out, for want of context`;
    } catch (error) {
      const stopped = error.name === "AbortError";
      facts.textContent = stopped ? "stopped" : error.message;
      facts.classList.toggle("fault", !stopped);
      if (error.status === 401) connect();
    }
    card.classList.remove("running");
    return text.textContent;
  }

  async function* readEvents(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  }

  const nearEnd = () =>
    innerHeight + scrollY > document.documentElement.scrollHeight - 120;

  function setRunning(on) {
    at("stop-button").hidden = !on;
    at("ask-button").hidden = on;
    if (!on && (document.activeElement === document.body || document.activeElement === null)) {
      instruction.focus(); // the button that had the focus is gone
    }
  }

  // --- what the hand does ---

  const stop = () => running && running.abort();

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = instruction.value.trim();
    if (!question || running || at("ask-button").disabled) return;
    const given = at("input").value.trim();
    instruction.value = at("input").value = "";
    at("input-part").open = false;
    instruction.focus();
    ask(question, given);
  });
  instruction.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  // A field out of range in the closed settings could not be shown to be wrong.
  form.addEventListener("invalid", () => (at("settings").open = true), true);
  form.addEventListener("change", showSettings);
  document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
  at("stop-button").addEventListener("click", stop);
  at("clear").addEventListener("click", () => {
    stop();
    turns = [];
    at("log").querySelectorAll(".exchange").forEach((exchange) => exchange.remove());
    at("empty").hidden = false;
    at("clear").disabled = true;
    at("spoken").textContent = "Cleared";
    instruction.focus();
  });
  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value.trim();
    connect();
  });
  connect();
})();
