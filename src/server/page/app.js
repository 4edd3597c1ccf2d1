// app.js - the page: conversations, the running answer, settings, and the engine's panel.
import { ApiError, getModel, stream } from "./api.js";
import { createEngineView } from "./engine.js";
import { copyText, renderMarkdown } from "./markdown.js";
import { conversations, problem as storageProblem, settings as stored, theme } from "./store.js";

const $ = (id) => document.getElementById(id);
const ui = Object.fromEntries(["sidebar", "shade", "list", "model", "state", "scroller", "notice", "empty", "ideas", "log", "newest",
  "composer", "question", "send", "stop", "engine", "charts", "settings"].map((id) => [id, $(id)]));
const form = $("settings-form");
const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty"];
const IDEAS = ["Tell me a story about an old lighthouse.", "Write a letter to a friend who moved away.", "Describe a market in the morning."];

const settings = stored.all();
let conversation = null; // the one that is shown
let running = null; // { conversation, message, abort }
let untemplated = false; // this model has no chat template

function node(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
function button(label, className, act) {
  const made = node("button", className, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

// ---- notices -----------------------------------------------------------------------------------

function notice() {
  const text = [storageProblem, untemplated && settings.mode === "chat" ?
    "This model has no chat template: it goes on with the text as it stands (/v1/completions)." : ""].filter(Boolean).join(" ");
  ui.notice.textContent = text;
  ui.notice.hidden = !text;
}
function save(c) {
  conversations.save(c);
  notice();
}

// ---- scrolling: follows the answer until the reader scrolls up ------------------------------------

let following = true;
const atEnd = () => ui.scroller.scrollHeight - ui.scroller.scrollTop - ui.scroller.clientHeight < 60;
function follow(force = false) {
  if (force) following = true;
  if (following) ui.scroller.scrollTop = ui.scroller.scrollHeight;
  ui.newest.hidden = following;
}
let lastTop = 0;
ui.scroller.addEventListener("scroll", () => {
  const top = ui.scroller.scrollTop;
  if (top < lastTop - 2 && !atEnd()) following = false; // only the reader moves up
  else if (atEnd()) following = true;
  lastTop = top;
  ui.newest.hidden = following;
});
ui.newest.addEventListener("click", () => follow(true));
new ResizeObserver(() => follow()).observe(ui.scroller);

// ---- messages ----------------------------------------------------------------------------------

function statsText(s) {
  if (!s) return "";
  const speed = s.tokens > 1 && s.seconds > 0.05 ? ` · ${((s.tokens - 1) / s.seconds).toFixed(1)} tokens/s` : "";
  const first = s.first !== undefined ? ` · first after ${s.first < 1 ? Math.round(s.first * 1000) + " ms" : s.first.toFixed(1) + " s"}` : "";
  const end = { length: " · cut at the limit of tokens", stopped: " · stopped" }[s.finish] || "";
  return `${s.tokens} token${s.tokens === 1 ? "" : "s"}${speed}${first}${end}`;
}

function showProblem(holder, error) {
  const box = node("div", "problem", node("span", "", error.text));
  box.setAttribute("role", "alert");
  if (error.status === 401) box.append(button("Enter the key", "", () => openSettings("key")));
  box.append(button("Try again", "", regenerate));
  holder.append(box);
}

function drawMessage(message, index) {
  const holder = node("article", `message ${message.role}`);
  holder.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  const body = node("div", "body");
  const tools = node("div", "tools");
  const last = index === conversation.messages.length - 1;
  holder.append(body);
  if (message.role === "user") {
    body.textContent = message.content;
    const isLast = index === conversation.messages.findLastIndex((m) => m.role === "user");
    if (isLast) tools.append(button("Edit", "quiet", () => editQuestion(holder, index)));
    holder.append(tools);
  } else {
    renderMarkdown(body, message.content);
    const active = running && running.message === message;
    holder.classList.toggle("running", Boolean(active));
    if (!active) {
      if (message.content) {
        tools.append(button("Copy", "quiet", async (event) => {
          event.target.textContent = (await copyText(message.content)) ? "Copied" : "Not allowed";
        }));
      }
      if (last && !message.error) tools.append(button("Regenerate", "quiet", regenerate));
    }
    tools.append(node("span", "stats", statsText(message.stats)));
    holder.append(tools);
    if (message.error) showProblem(holder, message.error);
  }
  message.view = () => ({ holder, body, tools });
  return holder;
}

// Views are not kept: a message's `view` is a function, which JSON leaves out.
function drawConversation() {
  ui.log.replaceChildren(...conversation.messages.map(drawMessage));
  ui.log.setAttribute("aria-busy", String(Boolean(running && running.conversation === conversation)));
  ui.empty.hidden = conversation.messages.length > 0;
  drawButtons();
  notice();
  follow();
}
function drawButtons() {
  ui.send.hidden = Boolean(running);
  ui.stop.hidden = !running;
}

function editQuestion(holder, index) {
  if (running) return;
  const area = node("textarea");
  area.value = conversation.messages[index].content;
  area.setAttribute("aria-label", "Edit your message");
  const send = () => {
    const text = area.value.trim();
    if (!text) return;
    conversation.messages.length = index;
    ask(text);
  };
  const box = node("div", "edit", area, node("div", "actions", button("Cancel", "quiet", drawConversation), button("Send", "primary", send)));
  area.addEventListener("keydown", (event) => {
    if (isSend(event)) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      drawConversation();
    }
  });
  holder.replaceChildren(box);
  area.focus();
}

// ---- the list ----------------------------------------------------------------------------------

const titleOf = (c) => c.title || "New conversation";

function drawList() {
  ui.list.replaceChildren(...conversations.all().map((c) => {
    const open = button(titleOf(c), "open", () => openConversation(c.id));
    const more = button("✕", "more", () => deleteConversation(c));
    more.setAttribute("aria-label", `Delete “${titleOf(c)}”`);
    const item = node("li", c.id === conversation.id ? "here" : "", open, more);
    if (c.id === conversation.id) open.setAttribute("aria-current", "true");
    return item;
  }));
}

function show(c) {
  conversation = running && running.conversation.id === c.id ? running.conversation : c;
  settings.current = c.id;
  stored.save(settings);
  following = true;
  drawConversation();
  drawList();
  drawer(false);
}
function openConversation(id) {
  const found = conversations.all().find((c) => c.id === id);
  if (found) show(found);
}
function newConversation() {
  show(conversations.create(conversation ? conversation.system : ""));
  ui.question.focus();
}
function deleteConversation(c) {
  if (c.messages.length && !confirm(`Delete “${titleOf(c)}”?`)) return;
  if (running && running.conversation.id === c.id) {
    running.deleted = true;
    running.abort.abort();
  }
  conversations.remove(c.id);
  if (c.id === conversation.id) show(conversations.all()[0] || conversations.create(c.system));
  else drawList();
}
function exportAll() {
  const data = { format: "quattuor conversations", version: 1, conversations: conversations.all() };
  const address = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
  const a = node("a");
  a.href = address;
  a.download = `quattuor-${new Date().toISOString().slice(0, 10)}.json`;
  a.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}
function deleteAll() {
  if (!confirm("Delete all conversations in this browser?")) return;
  if (running) {
    running.deleted = true;
    running.abort.abort();
  }
  conversations.all().forEach((c) => conversations.remove(c.id));
  show(conversations.create(conversation.system));
}

// ---- asking ------------------------------------------------------------------------------------

// What the endpoint wants: messages for a chat; for a model without a template the text so far, which it goes on with.
function requestOf(c, asText) {
  const sampling = Object.fromEntries(SAMPLING.filter((name) => settings.sampling[name] !== undefined).map((name) => [name, settings.sampling[name]]));
  const said = [];
  for (const { role, content } of c.messages) {
    const before = said[said.length - 1];
    if (!content) continue; // the running answer, or one that failed
    if (before && before.role === role) before.content += "\n\n" + content; // templates want turns
    else said.push({ role, content });
  }
  if (!asText) {
    const system = c.system ? [{ role: "system", content: c.system }] : [];
    return ["v1/chat/completions", { ...sampling, messages: [...system, ...said] }];
  }
  let prompt = c.system ? c.system + "\n\n" : "";
  said.forEach((m, i) => {
    if (m.role === "user" && i > 0) prompt += "\n";
    prompt += m.content;
  });
  return ["v1/completions", { max_tokens: 256, ...sampling, prompt }];
}

// Draws the running answer at most once a frame, and less often where drawing takes long.
function paced() {
  let waiting = false;
  let earliest = 0;
  return (act) => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => requestAnimationFrame(() => {
      waiting = false;
      const start = performance.now();
      act();
      earliest = performance.now() + 4 * (performance.now() - start);
    }), Math.max(0, earliest - performance.now()));
  };
}

async function answer(c) {
  const message = { role: "assistant", content: "" };
  const abort = new AbortController();
  const mine = (running = { conversation: c, message, abort });
  c.messages.push(message);
  if (c === conversation) drawConversation();
  const start = performance.now();
  const times = { first: 0, last: 0 };
  const stats = { tokens: 0 };
  const schedule = paced();
  const draw = () => {
    if (c !== conversation || running !== mine) return;
    const { body, tools } = message.view();
    renderMarkdown(body, message.content);
    tools.querySelector(".stats").textContent = statsText(message.stats);
    follow();
  };
  const take = (chunk) => {
    const choice = chunk.choices && chunk.choices[0];
    if (chunk.usage) stats.tokens = chunk.usage.completion_tokens;
    if (choice) {
      const text = choice.delta ? choice.delta.content : choice.text;
      if (text) {
        times.last = performance.now();
        if (!times.first) times.first = times.last;
        if (!chunk.usage) stats.tokens++;
        message.content += text;
      }
      if (choice.finish_reason) stats.finish = choice.finish_reason;
    }
    if (times.first) {
      stats.first = (times.first - start) / 1000;
      stats.seconds = (times.last - times.first) / 1000;
      message.stats = stats;
    }
    schedule(draw);
  };
  let asText = settings.mode === "text" || untemplated;
  for (;;) {
    try {
      const [path, body] = requestOf(c, asText);
      await stream(path, body, settings.key, abort.signal, take);
      serverState(null);
    } catch (error) {
      if (error instanceof ApiError && error.code === "no_chat_template" && !asText) {
        asText = untemplated = true;
        continue;
      }
      if (error.name === "AbortError") {
        stats.finish = "stopped";
        message.stats = stats;
      } else {
        message.error = { text: error.message, status: error.status ?? 0 };
        if (error.retryAfter) message.error.text += ` It asks to wait ${error.retryAfter} s.`;
        if (!(error instanceof ApiError)) console.warn(error);
      }
    }
    break;
  }
  running = null;
  c.updated = Date.now();
  if (!mine.deleted) save(c);
  if (c === conversation) drawConversation();
  else drawButtons();
  drawList();
}

function ask(text) {
  if (running) return;
  conversation.messages.push({ role: "user", content: text });
  if (!conversation.title) conversation.title = text.replace(/\s+/g, " ").slice(0, 60);
  conversation.updated = Date.now();
  save(conversation); // before the answer: a reload in its midst keeps the question
  drawList();
  following = true;
  answer(conversation);
}

function regenerate() {
  if (running) return;
  const messages = conversation.messages;
  while (messages.length && messages[messages.length - 1].role === "assistant") messages.pop();
  if (messages.length) {
    following = true;
    answer(conversation);
  }
}
function stop() {
  if (running) running.abort.abort();
}

// ---- composer ----------------------------------------------------------------------------------

const touch = matchMedia("(pointer: coarse)");
const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229 && !touch.matches;
function grow() {
  ui.question.style.height = "auto";
  ui.question.style.height = ui.question.scrollHeight + "px";
}
ui.question.addEventListener("input", grow);
ui.question.addEventListener("keydown", (event) => {
  if (!isSend(event)) return;
  event.preventDefault();
  ui.composer.requestSubmit();
});
ui.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = ui.question.value.trim();
  if (!text || running) return;
  ui.question.value = "";
  grow();
  ask(text);
});
ui.stop.addEventListener("click", () => {
  stop();
  ui.question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !ui.settings.open) {
    if (ui.sidebar.classList.contains("open")) drawer(false);
    else if (running) stop();
    else if (!ui.engine.hidden && ui.engine.contains(document.activeElement)) engine(false);
  } else if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey && !event.target.closest("input, textarea, select, dialog")) {
    event.preventDefault();
    ui.question.focus();
  }
});
for (const idea of IDEAS) ui.ideas.append(button(idea, "", () => ask(idea)));

// ---- settings ----------------------------------------------------------------------------------

function openSettings(focus) {
  for (const name of SAMPLING) form.elements[name].value = settings.sampling[name] ?? "";
  form.elements.system.value = conversation.system || "";
  form.elements.mode.value = settings.mode;
  form.elements.key.value = settings.key;
  ui.settings.showModal();
  form.elements[focus || "system"].focus();
}
// What was typed counts, however the dialog is left; what is out of range does not.
function readSettings() {
  settings.sampling = {};
  for (const name of SAMPLING) {
    const input = form.elements[name];
    if (input.value !== "" && input.validity.valid) settings.sampling[name] = Number(input.value);
  }
  settings.mode = form.elements.mode.value;
  const key = form.elements.key.value.trim();
  const changed = key !== settings.key;
  settings.key = key;
  stored.save(settings);
  conversation.system = form.elements.system.value.trim();
  if (conversation.messages.length) save(conversation);
  notice();
  if (changed) readModel();
}
$("open-settings").addEventListener("click", () => openSettings());
form.addEventListener("submit", (event) => {
  if (!form.reportValidity()) event.preventDefault();
});
form.noValidate = true; // asked for above, so that the cross closes with the same words
ui.settings.addEventListener("close", readSettings);
ui.settings.addEventListener("click", (event) => {
  if (event.target === ui.settings) ui.settings.close(); // beside the dialog
});
$("reset").addEventListener("click", () => SAMPLING.forEach((name) => (form.elements[name].value = "")));

const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
function drawTheme() {
  const [sign, name] = THEMES[theme.get()];
  $("theme").textContent = sign;
  $("theme").title = `Colours: ${name}`;
  $("theme").setAttribute("aria-label", `Colours: ${name}. Change`);
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme.set(names[(names.indexOf(theme.get()) + 1) % names.length]);
  drawTheme();
});

// ---- panels ------------------------------------------------------------------------------------

function drawer(open) {
  ui.sidebar.classList.toggle("open", open);
  ui.shade.hidden = !open;
  if (open) $("new").focus();
}
$("open-sidebar").addEventListener("click", () => drawer(true));
$("close-sidebar").addEventListener("click", () => drawer(false));
ui.shade.addEventListener("click", () => drawer(false));
$("new").addEventListener("click", newConversation);
$("export").addEventListener("click", exportAll);
$("delete-all").addEventListener("click", deleteAll);

const view = createEngineView(ui.charts, {
  key: () => settings.key,
  onError: (error) => {
    $("engine-state").textContent = !error ? "" : error.status === 401 ? "API key needed" : error.status ? `error ${error.status}` : "connection lost";
    serverState(error);
  },
});
function engine(open) {
  ui.engine.hidden = !open;
  $("open-engine").setAttribute("aria-expanded", String(open));
  settings.engine = open;
  stored.save(settings);
  view.show(open);
  if (!open) $("open-engine").focus();
}
$("open-engine").addEventListener("click", () => engine(ui.engine.hidden));
$("close-engine").addEventListener("click", () => engine(false));

// ---- the server --------------------------------------------------------------------------------

function serverState(error) {
  ui.state.textContent = !error ? "" : error.status === 401 ? "API key needed" : error.status ? `error ${error.status}` : "connection lost";
}
async function readModel() {
  try {
    const model = await getModel(settings.key);
    ui.model.textContent = model.id;
    ui.model.title = `${model.id}, context of ${model.max_model_len} tokens`;
    document.title = `${model.id} – Quattuor`;
    serverState(null);
  } catch (error) {
    ui.model.textContent = "Quattuor";
    serverState(error);
  }
}

// A page that is left in the midst of an answer keeps what has come.
addEventListener("pagehide", () => {
  if (running && !running.deleted) save(running.conversation);
});

// Another tab has written: show its words, unless this one is at work.
addEventListener("storage", () => {
  if (running) return;
  const found = conversations.all().find((c) => c.id === conversation.id);
  if (found && JSON.stringify(found) !== JSON.stringify(conversation)) {
    conversation = found;
    drawConversation();
  }
  drawList();
});

conversation = conversations.all().find((c) => c.id === settings.current) || conversations.all()[0] || conversations.create();
drawTheme();
drawConversation();
drawList();
readModel();
if (settings.engine && matchMedia("(min-width: 1181px)").matches) engine(true);
if (!touch.matches) ui.question.focus();
