// api.js - talks to the server that the page came from, and to nobody else: addresses are relative. Errors become ApiError with a
// sentence for people.

export class ApiError extends Error {
  constructor(status, message, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status; // 0: no answer at all
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

const LOST = "The connection to the server was lost.";

function headers(key, more = {}) {
  return key ? { ...more, Authorization: "Bearer " + key } : more;
}

async function failure(response) {
  let said = "";
  let code = null;
  try {
    const { error } = await response.json();
    said = String(error.message || "");
    code = error.code || null;
  } catch {
    // not ours: a proxy's page
  }
  const retryAfter = response.headers.get("Retry-After");
  const lead = {
    401: "The server wants an API key, and the one in the settings is missing or wrong.",
    429: "The server is busy: its queue is full.",
    502: "The server behind the proxy does not answer.",
    503: "The server cannot answer now.",
    504: "The request took too long.",
  }[response.status];
  const tail = response.status === 401 || response.status === 429 ? "" : said;
  return new ApiError(response.status, [lead, tail].filter(Boolean).join(" ") || `The server answered ${response.status}.`, { code, retryAfter });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", credentials: "omit", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, LOST);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function getModel(key) {
  const { data } = await (await ask("v1/models", { headers: headers(key) })).json();
  return data[0];
}

export async function getMetricsText(key, signal) {
  return (await ask("metrics", { headers: headers(key), signal })).text();
}

// Asks for a stream and calls onChunk with each of its JSON objects. Returns after [DONE]; throws ApiError, or AbortError when
// `signal` stopped it.
export async function stream(path, body, key, signal, onChunk) {
  const response = await ask(path, {
    method: "POST",
    headers: headers(key, { "Content-Type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, LOST);
    }
    if (part.done) throw new ApiError(0, LOST + " The answer is not complete.");
    rest += decoder.decode(part.value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // comments keep a silent stream alive
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(Number(chunk.error.code) || 500, String(chunk.error.message));
      onChunk(chunk);
    }
  }
}
