// engine.js - the live view: asks /metrics once a second while it is seen, and draws what it says as SVG. Counters become rates
// over the time between two answers; histograms are shown since the server started.
import { getMetricsText } from "./api.js";

const SECONDS = 120; // of history
const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 340;

function make(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function html(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

// ---- Prometheus text ---------------------------------------------------------------------------

// { name: { value, buckets: [[upper bound, count up to it]] } }; samples of one name are added up.
export function parseMetrics(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})? (\S+)/.exec(line);
    if (!match) continue;
    const [, name, labels = "", number] = match;
    const entry = (found[name] ??= { value: 0, buckets: [] });
    const value = Number(number);
    const bound = /[{,]le="([^"]*)"/.exec(labels);
    if (bound) entry.buckets.push([bound[1] === "+Inf" ? Infinity : Number(bound[1]), value]);
    else entry.value += value;
  }
  return found;
}

// Counts in each bucket instead of up to it.
function apart(buckets) {
  return buckets.map(([bound, count], i) => [bound, count - (i ? buckets[i - 1][1] : 0)]);
}

// Linear inside a bucket, as Prometheus' histogram_quantile.
export function quantile(buckets, q) {
  const total = buckets.length ? buckets[buckets.length - 1][1] : 0;
  if (!total) return NaN;
  const rank = q * total;
  const i = buckets.findIndex(([, count]) => count >= rank);
  const [high, upTo] = buckets[i];
  const [low, before] = i ? buckets[i - 1] : [0, 0];
  return high === Infinity ? low : low + ((high - low) * (rank - before)) / (upTo - before);
}

// ---- numbers -----------------------------------------------------------------------------------

export function seconds(x) {
  if (!Number.isFinite(x)) return "–";
  if (x < 1) return `${Number((x * 1000).toPrecision(x < 0.01 ? 2 : 3))} ms`;
  return `${Number(x.toPrecision(3))} s`;
}
const count = (x) => (x >= 1e6 ? `${(x / 1e6).toFixed(1)} M` : x >= 1e4 ? `${Math.round(x / 1e3)} k` : x >= 100 || x === Math.round(x) ? `${Math.round(x)}` : x.toFixed(1));

// The next of 1, 2, 5, 10 … above x.
function niceTop(x) {
  const power = 10 ** Math.floor(Math.log10(Math.max(x, 1)));
  return [1, 2, 5, 10].map((f) => f * power).find((top) => top >= x) || 10 * power;
}

// ---- charts ------------------------------------------------------------------------------------

function card(title, legend) {
  const value = html("span", "figure");
  const node = html("section", "card", html("div", "card-head", html("h3", "", title), value));
  if (legend) {
    node.append(html("div", "legend", ...legend.map(([name, label]) => html("span", "", html("i", "key " + name), label))));
  }
  return { node, value };
}

// Lines or stacked areas over the last two minutes. series: [[class, label]].
function timeChart(title, series, { stacked = false, legend = series } = {}) {
  const height = 84;
  const { node, value } = card(title, legend.length > 1 ? legend : null);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", class: "chart" });
  const top = make("text", { x: 0, y: 9, class: "scale" });
  svg.append(make("line", { x1: 0, x2: WIDTH, y1: 14.5, y2: 14.5, class: "grid" }),
    make("line", { x1: 0, x2: WIDTH, y1: (height + 14) / 2, y2: (height + 14) / 2, class: "grid" }),
    make("line", { x1: 0, x2: WIDTH, y1: height - 0.5, y2: height - 0.5, class: "axis" }), top);
  const shapes = series.map(([name]) => {
    const area = make("path", { class: `area ${name}` });
    const line = make("path", { class: `line ${name}` });
    svg.append(area, line);
    return { area, line };
  });
  node.append(svg);
  const draw = (history, text) => {
    const most = Math.max(0, ...history.map((h) => (stacked ? h.values.reduce((a, b) => a + b, 0) : Math.max(...h.values))));
    const high = niceTop(most);
    const now = history.length ? history[history.length - 1].time : 0;
    const x = (h) => Math.max(0, WIDTH - ((now - h.time) / SECONDS) * WIDTH).toFixed(1);
    const y = (v) => (height - 1 - (Math.min(v, high) / high) * (height - 16)).toFixed(1);
    top.textContent = count(high);
    const below = history.map(() => 0);
    shapes.forEach((shape, k) => {
      const floor = history.map((h, i) => `${x(h)} ${y(stacked ? below[i] : 0)}`).reverse();
      if (stacked) history.forEach((h, i) => (below[i] += h.values[k]));
      const points = history.map((h, i) => `${x(h)} ${y(stacked ? below[i] : h.values[k])}`);
      shape.line.setAttribute("d", points.length > 1 ? "M" + points.join("L") : "");
      shape.area.setAttribute("d", points.length > 1 ? `M${points.join("L")}L${floor.join("L")}Z` : "");
    });
    value.textContent = text;
    svg.setAttribute("aria-label", `${title}, last ${SECONDS / 60} minutes. Now: ${text}`);
  };
  return { node, draw };
}

function histogramChart(title, id) {
  const height = 84;
  const { node, value } = card(title);
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", class: "chart", "data-histogram": id });
  node.append(svg);
  const draw = (buckets) => {
    const bars = apart(buckets);
    let first = bars.findIndex(([, n]) => n > 0);
    let last = bars.findLastIndex(([, n]) => n > 0);
    svg.replaceChildren(make("line", { x1: 0, x2: WIDTH, y1: height - 14.5, y2: height - 14.5, class: "axis" }));
    if (first < 0) {
      value.textContent = "";
      svg.append(make("text", { x: WIDTH / 2, y: height / 2, class: "scale middle" }, "nothing yet"));
      svg.setAttribute("aria-label", `${title}: nothing yet`);
      return;
    }
    first = Math.max(0, first - 1);
    last = Math.min(bars.length - 1, Math.max(last + 1, first + 5));
    const shown = bars.slice(first, last + 1);
    const most = Math.max(...shown.map(([, n]) => n));
    const step = WIDTH / shown.length;
    shown.forEach(([bound, n], i) => {
      const tall = n ? Math.max(2, (n / most) * (height - 22)) : 0;
      const bar = make("rect", { x: i * step + 1, y: height - 15 - tall, width: Math.max(1, step - 2), height: tall, rx: 2, class: "bar" },
        make("title", {}, `up to ${bound === Infinity ? "∞" : seconds(bound)}: ${n}`));
      svg.append(bar);
      if (shown.length <= 8 || i % 2 === 0) {
        svg.append(make("text", { x: (i + 1) * step, y: height - 3, class: "scale end" }, bound === Infinity ? "∞" : seconds(bound)));
      }
    });
    const [p50, p90, p99] = [0.5, 0.9, 0.99].map((q) => seconds(quantile(buckets, q)));
    value.textContent = `p50 ${p50} · p90 ${p90} · p99 ${p99}`;
    svg.setAttribute("aria-label", `${title}: half within ${p50}, 90 percent within ${p90}, 99 percent within ${p99}`);
  };
  return { node, draw };
}

// ---- the view ----------------------------------------------------------------------------------

// Fills `panel`. key(): the API key; onError(error or null) hears how the last question went.
export function createEngineView(panel, { key, onError }) {
  const tiles = html("div", "tiles");
  const tile = (label) => {
    const value = html("strong", "", "–");
    tiles.append(html("div", "tile", value, html("span", "", label)));
    return value;
  };
  const tile_ = { speed: tile("tokens / s"), running: tile("running"), waiting: tile("waiting"), kv: tile("KV pages in use"), hits: tile("prefix-cache hits"), preempted: tile("preemptions") };
  const states = [["one", "used"], ["two", "cached, reusable"], ["free", "free"]];
  const charts = {
    tokens: timeChart("Tokens a second", [["one", "generated"], ["two", "prompt"]]),
    batch: timeChart("Batch", [["one", "running"]]),
    queue: timeChart("Queue", [["three", "waiting"]]),
    pages: timeChart("KV pages", states.slice(0, 2), { stacked: true, legend: states }),
    first: histogramChart("Time to first token", "first"),
    token: histogramChart("Time per output token", "token"),
    whole: histogramChart("Whole answer", "whole"),
    step: histogramChart("Step of the engine", "step"),
  };
  const shares = states.map(([name]) => html("i", "key " + name)); // of the whole pool; the chart above shows what is not free
  const share = html("div", "share", ...shares);
  charts.pages.node.append(share);
  const note = html("p", "note", "");
  panel.append(tiles, ...Object.values(charts).map((c) => c.node), note);

  const history = { tokens: [], batch: [], queue: [], pages: [] };
  let before = null;
  let timer = 0;
  let seen = false;
  let running = null;

  function push(list, time, ...values) {
    list.push({ time, values });
    while (list.length && time - list[0].time > SECONDS) list.shift();
  }

  function show(m, time) {
    const get = (name) => m[name]?.value ?? 0;
    const rate = (name) => (before ? Math.max(0, get(name) - (before.m[name]?.value ?? 0)) / (time - before.time) : 0);
    const generated = rate("vllm:generation_tokens_total");
    const prompt = rate("vllm:prompt_tokens_total");
    const [used, cached, total] = ["used", "cached", ""].map((s) => get("quattuor:kv_pages" + (s && "_" + s)));
    const free = Math.max(0, total - used - cached);
    const active = get("vllm:num_requests_running");
    const waiting = get("vllm:num_requests_waiting");
    if (before) push(history.tokens, time, generated, prompt);
    push(history.batch, time, active);
    push(history.queue, time, waiting);
    push(history.pages, time, used, cached);
    [used, cached, free].forEach((n, i) => (shares[i].style.flexGrow = n));

    tile_.speed.textContent = count(generated);
    tile_.running.textContent = count(active);
    tile_.waiting.textContent = count(waiting);
    tile_.kv.textContent = total ? `${used && used < total / 1000 ? "<0.1" : Number(((100 * used) / total).toFixed(1))} %` : "–";
    const asked = get("vllm:prefix_cache_queries_total");
    tile_.hits.textContent = asked ? `${Math.round((100 * get("vllm:prefix_cache_hits_total")) / asked)} %` : "–";
    tile_.preempted.textContent = count(get("vllm:num_preemptions_total"));

    const steps = before ? get("quattuor:step_sequences_count") - (before.m["quattuor:step_sequences_count"]?.value ?? 0) : 0;
    const sequences = before ? get("quattuor:step_sequences_sum") - (before.m["quattuor:step_sequences_sum"]?.value ?? 0) : 0;
    const mean = steps > 0 ? `, ${count(sequences / steps)} a step` : "";
    charts.tokens.draw(history.tokens, `${count(generated)} generated, ${count(prompt)} prompt`);
    charts.batch.draw(history.batch, `${count(active)} of ${count(get("quattuor:max_num_seqs"))}${mean}`);
    charts.queue.draw(history.queue, `${count(waiting)} of ${count(get("quattuor:max_queue"))}`);
    charts.pages.draw(history.pages, `${count(used)} used, ${count(cached)} cached, ${count(free)} free`);
    charts.first.draw(m["vllm:time_to_first_token_seconds_bucket"]?.buckets ?? []);
    charts.token.draw(m["vllm:time_per_output_token_seconds_bucket"]?.buckets ?? []);
    charts.whole.draw(m["vllm:e2e_request_latency_seconds_bucket"]?.buckets ?? []);
    charts.step.draw(m["quattuor:step_seconds_bucket"]?.buckets ?? []);
    const up = get("quattuor:uptime_seconds");
    const spelled = up >= 3600 ? `${Math.floor(up / 3600)} h ${Math.floor((up % 3600) / 60)} min` : up >= 60 ? `${Math.floor(up / 60)} min` : `${Math.floor(up)} s`;
    note.textContent = `Up ${spelled}. Charts: the last two minutes; latencies: since the start.`;
    before = { m, time };
  }

  async function poll() {
    running = new AbortController();
    try {
      const text = await getMetricsText(key(), running.signal);
      show(parseMetrics(text), performance.now() / 1000);
      onError(null);
    } catch (error) {
      if (error.name === "AbortError") return;
      before = null; // no rate over a gap
      onError(error);
    }
    if (seen) timer = setTimeout(poll, 1000);
  }

  // Asks only while somebody looks.
  function watch(wanted) {
    const now = wanted && !document.hidden;
    if (now === seen) return;
    seen = now;
    clearTimeout(timer);
    running?.abort();
    before = null;
    if (seen) poll();
  }
  let wanted = false;
  document.addEventListener("visibilitychange", () => watch(wanted));
  return {
    show(value) {
      wanted = value;
      watch(wanted);
    },
  };
}
