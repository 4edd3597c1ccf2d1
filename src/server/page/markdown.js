// markdown.js - Markdown to DOM nodes. The text comes from a model and is hostile: it only ever becomes text nodes and the few
// elements made here, never HTML; links go to http, https and mailto only; images are not loaded. Every loop is bounded: depth
// of nesting, columns and rows of tables, and no search is repeated once it has failed.

const MAX_DEPTH = 8;
const MAX_COLUMNS = 40;
const MAX_ROWS = 300;
const MAX_LINK = 2000;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// ---- inside a line -----------------------------------------------------------------------------

// A link's address when its scheme is harmless, else null.
function safeAddress(text) {
  if (!/^(https?:\/\/|mailto:)/i.test(text) || text.length > MAX_LINK) return null;
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function link(address, ...children) {
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

// [text](address) or ![text](address) at i, the bracket's place: { text, address, end }, or null.
function readLink(s, i) {
  const close = s.slice(i, i + MAX_LINK).indexOf("](");
  if (close < 0) return null;
  const start = i + close + 2;
  const rest = s.slice(start, start + MAX_LINK);
  let depth = 1;
  for (let k = 0; k < rest.length; k++) {
    if (rest[k] === "(") depth++;
    if (rest[k] === ")" && --depth === 0) {
      const address = rest.slice(0, k).trim().split(/\s/)[0].replace(/^<|>$/g, "");
      return { text: s.slice(i + 1, i + close), address, end: start + k + 1 };
    }
  }
  return null;
}

const isWord = (c) => c !== undefined && /[\p{L}\p{N}_]/u.test(c);

// Appends a line's text with its emphasis, code and links to `node`.
function inline(node, s, depth = 0) {
  let plain = "";
  const failed = new Set(); // marks that have no partner in what is left
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  const put = (child) => {
    flush();
    node.append(child);
  };
  for (let i = 0; i < s.length; ) {
    const c = s[i];
    if (c === "\\" && i + 1 < s.length && /[!-/:-@[-`{-~]/.test(s[i + 1])) {
      plain += s[i + 1];
      i += 2;
      continue;
    }
    if (c === "\n") {
      put(element("br"));
      i++;
      continue;
    }
    if (c === "`") {
      let n = 1;
      while (s[i + n] === "`") n++;
      const mark = "`".repeat(Math.min(n, 32));
      let end = -1;
      if (n <= 32 && !failed.has(mark)) {
        end = s.indexOf(mark, i + n);
        while (end >= 0 && (s[end + n] === "`" || s[end - 1] === "`")) {
          while (s[end] === "`") end++;
          end = s.indexOf(mark, end);
        }
        if (end < 0) failed.add(mark);
      }
      if (end >= 0) {
        put(element("code", {}, s.slice(i + n, end).replace(/\n/g, " ").replace(/^ (.*\S.*) $/, "$1")));
        i = end + n;
      } else {
        plain += s.slice(i, i + n);
        i += n;
      }
      continue;
    }
    if ((c === "*" || c === "_" || (c === "~" && s[i + 1] === "~")) && depth < MAX_DEPTH) {
      const mark = s[i + 1] === c ? c + c : c;
      const inside = i + mark.length;
      const opens = s[inside] && !/\s/.test(s[inside]) && !(c === "_" && isWord(s[i - 1]));
      let end = -1;
      if (opens && !failed.has(mark)) {
        end = s.indexOf(mark, inside + 1);
        // a single mark must not be half of a double one; none closes after a space
        while (end >= 0 && (/\s/.test(s[end - 1]) || (mark.length === 1 && (s[end + 1] === c || s[end - 1] === c)) ||
                            (c === "_" && isWord(s[end + mark.length])))) {
          let next = end;
          while (s[next] === c) next++;
          end = s.indexOf(mark, Math.max(next, end + 1));
        }
        if (end < 0) failed.add(mark);
      }
      if (end > inside) {
        const child = element(c === "~" ? "del" : mark.length === 2 ? "strong" : "em");
        inline(child, s.slice(inside, end), depth + 1);
        put(child);
        i = end + mark.length;
      } else {
        plain += mark;
        i += mark.length;
      }
      continue;
    }
    if ((c === "[" || (c === "!" && s[i + 1] === "[")) && depth < MAX_DEPTH && !failed.has("[")) {
      const image = c === "!";
      const found = readLink(s, image ? i + 1 : i);
      if (found) {
        const address = safeAddress(found.address);
        if (address) {
          const child = link(address);
          inline(child, (image ? "🖼 " : "") + (found.text || found.address), MAX_DEPTH); // no links in links
          put(child);
        } else {
          plain += found.text; // the words without the address
        }
        i = found.end;
        continue;
      }
      if (s.indexOf("](", i) < 0) failed.add("[");
    }
    if (c === "h" && depth < MAX_DEPTH && !isWord(s[i - 1]) && /^https?:\/\//.test(s.slice(i, i + 8))) {
      const found = /^[^\s<>"'`|]+/.exec(s.slice(i, i + MAX_LINK))[0].replace(/[.,;:!?)\]*_]+$/, "");
      const address = safeAddress(found);
      if (address) {
        put(link(address, found));
        i += found.length;
        continue;
      }
    }
    plain += c;
    i++;
  }
  flush();
}

// ---- blocks ------------------------------------------------------------------------------------

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/;
const QUOTE = /^ {0,3}> ?(.*)$/;

function cells(line) {
  let text = line.trim();
  if (text.startsWith("|")) text = text.slice(1);
  if (text.endsWith("|") && !text.endsWith("\\|")) text = text.slice(0, -1);
  return text.split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
}
const isTableRule = (line) => line !== undefined && line.includes("-") && line.includes("|") && line.length < 4000 &&
  cells(line).every((cell) => /^:?-+:?$/.test(cell));

// Cuts lines into blocks: { kind, from, to, … } with lines [from, to).
function split(lines, depth) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    const from = i;
    const line = lines[i];
    let match;
    if (!line.trim()) {
      i++;
      continue;
    }
    if ((match = FENCE.exec(line))) {
      const mark = match[1];
      const end = new RegExp(`^ {0,3}${mark[0]}{${Math.min(mark.length, 1000)},}\\s*$`);
      for (i++; i < lines.length && !end.test(lines[i]); i++);
      const closed = i < lines.length;
      blocks.push({ kind: "code", from, to: closed ? ++i : i, language: match[2].trim().split(/\s/)[0], closed });
    } else if ((match = HEADING.exec(line))) {
      i++;
      blocks.push({ kind: "heading", from, to: i, level: match[1].length, text: (match[2] || "").replace(/[ \t]#+[ \t]*$/, "") });
    } else if (RULE.test(line)) {
      i++;
      blocks.push({ kind: "rule", from, to: i });
    } else if (QUOTE.test(line) && depth < MAX_DEPTH) {
      for (; i < lines.length && lines[i].trim() && (QUOTE.test(lines[i]) || !startsBlock(lines, i)); i++);
      blocks.push({ kind: "quote", from, to: i });
    } else if ((match = ITEM.exec(line)) && depth < MAX_DEPTH) {
      const indent = match[1].length;
      const ordered = /\d/.test(match[2]);
      for (i++; i < lines.length; i++) {
        if (!lines[i].trim()) { // an empty line goes on when something of the list follows
          const next = lines[i + 1];
          const more = next !== undefined && next.trim() && (/^ {2,}/.test(next) || sameList(next, indent, ordered));
          if (!more) break;
          continue;
        }
        const item = ITEM.exec(lines[i]);
        if (RULE.test(lines[i]) || (item && item[1].length <= indent && /\d/.test(item[2]) !== ordered)) break;
        if (!item && !/^ {2,}/.test(lines[i]) && (startsBlock(lines, i) || !lines[i - 1].trim())) break;
      }
      blocks.push({ kind: "list", from, to: i, indent, ordered, start: ordered ? parseInt(match[2], 10) : 1 });
    } else if (line.includes("|") && isTableRule(lines[i + 1])) {
      for (i += 2; i < lines.length && lines[i].includes("|") && lines[i].trim(); i++);
      blocks.push({ kind: "table", from, to: i });
    } else {
      for (i++; i < lines.length && lines[i].trim() && !startsBlock(lines, i); i++);
      blocks.push({ kind: "paragraph", from, to: i });
    }
  }
  return blocks;
}

function sameList(line, indent, ordered) {
  const item = ITEM.exec(line);
  return item !== null && item[1].length >= indent && (item[1].length > indent + 1 || /\d/.test(item[2]) === ordered);
}

function startsBlock(lines, i) {
  const line = lines[i];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) ||
    (line.includes("|") && isTableRule(lines[i + 1]));
}

function codeBlock(lines, block) {
  const text = lines.slice(block.from + 1, block.closed ? block.to - 1 : block.to).join("\n");
  const copy = element("button", { type: "button", class: "copy", "aria-label": "Copy the code" }, "Copy");
  copy.addEventListener("click", async () => {
    copy.textContent = (await copyText(text)) ? "Copied" : "Not allowed";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return element("div", { class: "code" },
    element("div", { class: "code-head" }, element("span", {}, block.language.slice(0, 40)), copy),
    element("pre", { tabindex: "0" }, element("code", {}, text)));
}

function table(lines, block) {
  const columns = cells(lines[block.from]).slice(0, MAX_COLUMNS);
  const align = cells(lines[block.from + 1]).map((rule) => rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : "left");
  const row = (name, line) => {
    const given = cells(line);
    const tr = element("tr");
    columns.forEach((_, k) => {
      const cell = element(name, { class: align[k] || "left" });
      inline(cell, given[k] || "");
      tr.append(cell);
    });
    return tr;
  };
  const rows = lines.slice(block.from + 2, block.to);
  const body = element("tbody", {}, ...rows.slice(0, MAX_ROWS).map((line) => row("td", line)));
  const node = element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    element("table", {}, element("thead", {}, row("th", lines[block.from])), body));
  const columnsCut = cells(lines[block.from]).length - columns.length;
  if (rows.length > MAX_ROWS || columnsCut > 0) {
    const cut = [rows.length > MAX_ROWS ? `${rows.length - MAX_ROWS} more rows` : "", columnsCut > 0 ? `${columnsCut} more columns` : ""];
    node.append(element("p", { class: "note" }, cut.filter(Boolean).join(", ") + " are not shown"));
  }
  return node;
}

function list(lines, block, depth) {
  const node = element(block.ordered ? "ol" : "ul", block.ordered && block.start !== 1 ? { start: String(block.start) } : {});
  let item = null;
  let inset = 0;
  const items = [];
  for (const line of lines.slice(block.from, block.to)) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= block.indent + 1 && match[1].length < (inset || Infinity)) {
      inset = match[1].length + match[2].length + 1;
      items.push((item = [match[3] || ""]));
    } else {
      const space = /^ */.exec(line)[0].length;
      item.push(line.slice(Math.min(space, inset)));
    }
  }
  for (const own of items) {
    const li = element("li");
    const task = /^\[([ xX])\] (.*)$/.exec(own[0]);
    if (task) {
      own[0] = task[2];
      li.className = "task";
      li.append(task[1] === " " ? "☐ " : "☑ ");
    }
    blocksInto(li, own, depth + 1, !own.some((line) => !line.trim()));
    node.append(li);
  }
  return node;
}

function render(lines, block, depth, tight) {
  switch (block.kind) {
    case "code":
      return codeBlock(lines, block);
    case "heading": { // the page's own headings are h1 and h2
      const node = element("h" + Math.min(block.level + 2, 6), { class: "level" + block.level });
      inline(node, block.text);
      return node;
    }
    case "rule":
      return element("hr");
    case "quote": {
      const node = element("blockquote");
      blocksInto(node, lines.slice(block.from, block.to).map((line) => (QUOTE.exec(line) || [0, line])[1]), depth + 1);
      return node;
    }
    case "list":
      return list(lines, block, depth);
    case "table":
      return table(lines, block);
    default: {
      const node = element(tight ? "span" : "p");
      inline(node, lines.slice(block.from, block.to).map((line) => line.trim()).join("\n"));
      return node;
    }
  }
}

function blocksInto(node, lines, depth, tight = false) {
  for (const block of split(lines, depth)) node.append(render(lines, block, depth, tight));
}

const toLines = (text) => text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");

// Shows `text` in `node`. Called again with more text it keeps the blocks that have not changed, so that a stream costs only its
// last block each time and what the reader has selected stays selected.
export function renderMarkdown(node, text) {
  const lines = toLines(text);
  const blocks = split(lines, 0);
  const old = node.markdownBlocks || [];
  const now = [];
  blocks.forEach((block, i) => {
    const source = block.kind + "\n" + lines.slice(block.from, block.to).join("\n");
    if (old[i] && old[i].source === source) {
      now.push(old[i]);
      return;
    }
    const child = render(lines, block, 0, false);
    if (old[i]) old[i].child.replaceWith(child);
    else node.append(child);
    now.push({ source, child });
  });
  old.slice(blocks.length).forEach(({ child }) => child.remove());
  node.markdownBlocks = now;
}

// True when the text is in the clipboard. Outside of https and localhost only the old way is there.
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { class: "offscreen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
