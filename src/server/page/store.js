// store.js - what the browser keeps: settings, and each conversation under a key of its own, so that two tabs do not overwrite each
// other's. Without storage (a private window, a full disk) all works until the page is closed; `problem` says so.

const PREFIX = "quattuor.";
const CONVERSATION = PREFIX + "conversation.";
const memory = new Map();
export let problem = "";

function read(key) {
  try {
    const text = localStorage.getItem(key);
    return text === null ? memory.get(key) : JSON.parse(text);
  } catch {
    return memory.get(key);
  }
}

function write(key, value) {
  memory.set(key, value);
  try {
    localStorage.setItem(key, JSON.stringify(value));
    problem = "";
  } catch {
    problem = "The browser's storage is full or off: new messages are lost when this page closes. Delete old conversations, or export them.";
  }
}

function remove(key) {
  memory.delete(key);
  try {
    localStorage.removeItem(key);
  } catch {
    // nothing is there then
  }
}

const isMessage = (m) => m && (m.role === "user" || m.role === "assistant") && typeof m.content === "string";
const isConversation = (c) => c && typeof c.id === "string" && Array.isArray(c.messages) && c.messages.every(isMessage);

export const settings = {
  all: () => ({ sampling: {}, key: "", mode: "chat", current: null, engine: false, ...(read(PREFIX + "settings") || {}) }),
  save: (value) => write(PREFIX + "settings", value),
};

export const conversations = {
  // Newest first.
  all() {
    const found = new Map();
    const keys = [...memory.keys()];
    try {
      keys.push(...Object.keys(localStorage));
    } catch {
      // memory alone
    }
    for (const key of keys) {
      if (!key.startsWith(CONVERSATION)) continue;
      const value = read(key);
      if (isConversation(value)) found.set(value.id, value);
    }
    return [...found.values()].sort((a, b) => (b.updated || 0) - (a.updated || 0));
  },
  create(system = "") {
    const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
    return { id, title: "", system, messages: [], updated: Date.now() };
  },
  save(c) {
    write(CONVERSATION + c.id, c);
  },
  remove(id) {
    remove(CONVERSATION + id);
  },
};

export const theme = {
  get() {
    try {
      return localStorage.getItem(PREFIX + "theme") || "auto";
    } catch {
      return "auto";
    }
  },
  set(value) {
    try {
      localStorage.setItem(PREFIX + "theme", value);
    } catch {
      // for this page only
    }
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  },
};
