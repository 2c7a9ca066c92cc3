// The chat page: a conversation is a list of messages, the last of which may be in the making.

import { complete, listModels } from "./completion.js";
import { MessageView } from "./message_view.js";

const at = (id) => document.getElementById(id);
const NUMBERS = {
  temperature: "temperature", "max-tokens": "max_tokens", "top-p": "top_p", "top-k": "top_k",
  "repetition-penalty": "repetition_penalty", seed: "seed",
};
const KEPT = ["system", "thinking", "tools", ...Object.keys(NUMBERS)];
const THEMES = ["auto", "light", "dark"];

let messages = [];
let views = [];
let running = null;

function load(store, name, otherwise) {
  try {
    return JSON.parse(store.getItem(`lfm_mlx.${name}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function save(store, name, value) {
  try {
    store.setItem(`lfm_mlx.${name}`, JSON.stringify(value));
  } catch {
    // A full or forbidden store: the page works without.
  }
}

// --- settings ---

function readTools() {
  const text = at("tools").value.trim();
  const note = at("tools-note");
  let tools = null;
  let problem = "";
  if (text) {
    try {
      tools = JSON.parse(text);
      if (!Array.isArray(tools)) problem = "expected a list: [...]";
    } catch (error) {
      problem = error.message;
    }
  }
  note.classList.toggle("wrong", problem !== "");
  note.textContent = problem ? `This is not used: ${problem}` : "JSON as OpenAI's interface takes it. You give the results.";
  return problem ? null : tools;
}

function parameters() {
  const fields = {};
  for (const [id, name] of Object.entries(NUMBERS)) {
    if (at(id).value !== "" && at(id).validity.valid) fields[name] = Number(at(id).value);
  }
  if (at("thinking").value) fields.reasoning_effort = at("thinking").value;
  const tools = readTools();
  if (tools?.length) fields.tools = tools;
  return fields;
}

function saveSettings() {
  save(localStorage, "settings", Object.fromEntries(KEPT.map((id) => [id, at(id).value])));
  readTools();
}

function showSettings(isShown) {
  at("settings").hidden = !isShown;
  at("settings-toggle").setAttribute("aria-expanded", String(isShown));
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  at("theme").textContent = `Theme: ${theme}`;
  save(localStorage, "theme", theme);
}

// --- what is shown ---

function isAtEnd() {
  const box = at("conversation");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function scrollToEnd() {
  at("conversation").scrollTop = at("conversation").scrollHeight;
}

function draw() {
  views = views.filter((view) => messages.includes(view.message));
  const known = new Map(views.map((view) => [view.message, view]));
  views = messages.map((message) => known.get(message) ?? new MessageView(message, actions));
  at("messages").replaceChildren(...views.map((view) => view.element));
  views.forEach((view, index) => {
    const isLast = index === views.length - 1;
    view.update({ isLast, isWriting: isLast && running !== null && view.message.role === "assistant" });
  });
  at("welcome").hidden = messages.length > 0;
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  if (running === null) save(sessionStorage, "messages", messages);
}

function say(text) {
  at("status").textContent = text;
}

function showProblem(text, canRetry = true) {
  at("problem").hidden = text === "";
  at("problem-text").textContent = text;
  at("retry").hidden = !canRetry;
  if (text) scrollToEnd();
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.body.appendChild(Object.assign(document.createElement("textarea"), { value: text }));
    area.select();
    document.execCommand("copy"); // Pages without TLS have no clipboard except on this machine.
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

// --- the conversation ---

// The messages as the server takes them.
function asked() {
  const sent = at("system").value.trim() ? [{ role: "system", content: at("system").value }] : [];
  for (const { role, content, reasoning_content, calls, results } of messages) {
    const message = { role, content };
    if (reasoning_content) message.reasoning_content = reasoning_content;
    if (calls?.length) message.tool_calls = calls;
    sent.push(message);
    (results ?? []).forEach((result, index) => {
      sent.push({ role: "tool", tool_call_id: calls[index].id, content: result });
    });
  }
  return sent;
}

function take(answer, part) {
  if (part.reasoning) answer.reasoning_content += part.reasoning;
  if (part.content) answer.content += part.content;
  if (part.usage) answer.usage = part.usage;
  if (part.finish) answer.finish = part.finish;
  if (part.call) {
    const { index, id, function: given } = part.call;
    answer.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } };
    answer.calls[index].function.name += given.name ?? "";
    answer.calls[index].function.arguments += given.arguments ?? "";
  }
}

async function answer() {
  const body = { messages: asked(), ...parameters() };
  const written = { role: "assistant", content: "", reasoning_content: "", calls: [] };
  const own = { controller: new AbortController() };
  running = own;
  messages.push(written);
  showProblem("");
  draw();
  scrollToEnd();
  say("Answering");
  let startedMs = null;
  try {
    for await (const part of complete(body, at("api-key").value, own.controller.signal)) {
      startedMs ??= performance.now();
      take(written, part);
      const follows = isAtEnd();
      views.at(-1).later({ isWriting: running === own, isLast: true });
      if (follows) requestAnimationFrame(scrollToEnd);
    }
    say("Answered");
  } catch (error) {
    if (own.controller.signal.aborted) {
      written.finish = "stopped";
      say("Stopped");
    } else {
      if (error.status === 401) askForKey();
      showProblem(error.message || "the server cannot be reached");
    }
    // A call that was cut has no arguments to show.
    written.calls = [];
  }
  written.seconds = startedMs === null ? 0 : (performance.now() - startedMs) / 1000;
  const isEmpty = !written.content && !written.reasoning_content && !written.calls.length;
  if (isEmpty && written.finish !== "stop") messages = messages.filter((message) => message !== written);
  if (running === own) running = null;
  const follows = isAtEnd();
  draw();
  if (follows) scrollToEnd();
}

function stop() {
  running?.controller.abort();
}

function send() {
  const content = at("input").value;
  if (!content.trim() || running) return;
  messages.push({ role: "user", content });
  at("input").value = "";
  fit();
  answer();
}

const actions = {
  copy,
  regenerate() {
    if (running) return;
    messages = messages.slice(0, -1);
    answer();
  },
  edit(message) {
    if (running) return;
    messages = messages.slice(0, messages.indexOf(message));
    at("input").value = message.content;
    showProblem("");
    draw();
    fit();
    at("input").focus();
  },
  give(message, results) {
    if (running) return;
    message.results = results;
    answer();
    at("input").focus();
  },
};

function startAnew() {
  stop();
  running = null;
  messages = [];
  showProblem("");
  draw();
  at("input").focus();
}

// --- the rest of the page ---

function fit() {
  at("input").style.height = "auto";
  at("input").style.height = `${at("input").scrollHeight + 2}px`;
}

function askForKey() {
  at("api-key-label").hidden = false;
  showSettings(true);
  at("api-key").focus();
}

async function greet() {
  try {
    const [model] = await listModels(at("api-key").value);
    at("model").textContent = model.id;
    document.title = `${model.id} · lfm_mlx`;
    showProblem("");
  } catch (error) {
    if (error.status === 401) askForKey();
    showProblem(error.status === 401 ? "This server wants an API key: it goes into the settings." : error.message, false);
  }
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("input").addEventListener("input", fit);
at("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else if (!at("settings").hidden) {
    showSettings(false);
    at("settings-toggle").focus();
  }
});
at("messages").addEventListener("click", (event) => {
  if (event.target.matches(".copy-code")) copy(event.target.previousElementSibling.textContent, event.target);
});
at("stop").addEventListener("click", () => {
  stop();
  at("input").focus();
});
at("retry").addEventListener("click", () => {
  if (running) return;
  if (messages.at(-1)?.role === "assistant" && !messages.at(-1).results) messages = messages.slice(0, -1);
  if (messages.length) answer();
  else showProblem("");
});
at("new-chat").addEventListener("click", startAnew);
at("settings-toggle").addEventListener("click", () => showSettings(at("settings").hidden));
at("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(load(localStorage, "theme", "auto")) + 1) % THEMES.length]);
});
at("settings").addEventListener("input", saveSettings);
at("api-key").addEventListener("change", () => {
  save(sessionStorage, "key", at("api-key").value);
  greet();
});

for (const [id, value] of Object.entries(load(localStorage, "settings", {}))) {
  if (KEPT.includes(id)) at(id).value = value;
}
at("api-key").value = load(sessionStorage, "key", "");
at("api-key-label").hidden = at("api-key").value === "";
messages = load(sessionStorage, "messages", []);
setTheme(load(localStorage, "theme", "auto"));
readTools();
draw();
scrollToEnd();
greet();
