#!/usr/bin/env python3
"""Talks to `quattuor serve` with the openai client of PyPI and compares with `quattuor generate`: oracle_openai.py QUATTUOR MODEL.

Starts the server itself, on a free port. Exit 77 when the client is not installed."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

try:
    import openai

    try:
        import httpx
    except ImportError:
        import httpx2 as httpx
except ImportError:
    print("skipped: no openai client in this Python (pip install openai)")
    sys.exit(77)

quattuor, model = sys.argv[1], sys.argv[2].rstrip("/")
name = os.path.basename(model)
n_failed = 0


def check(ok, what, *more):
    global n_failed
    if not ok:
        n_failed += 1
        print("FAIL:", what, *more)


class Server:
    """A server on a free port; `log` is all it wrote on stderr."""

    def __init__(self, *options, model_dir=model, env=None):
        self.process = subprocess.Popen(
            [quattuor, "serve", "--model", model_dir, "--port", "0", *options],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
        self.log, self.url = "", None
        for line in self.process.stderr:
            self.log += line
            found = re.search(r"at (http://\S+)/v1", line)
            if found:
                self.url = found.group(1)
                break
        if not self.url:
            raise SystemExit("the server did not start: " + self.log)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            self.log += line

    def client(self, kind=openai.OpenAI, key="none"):
        return kind(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=120)

    def metric(self, wanted):
        for line in httpx.get(self.url + "/metrics").text.splitlines():
            if line.startswith(wanted):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(wanted)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(60)


def generate(*options):
    out = subprocess.run([quattuor, "generate", "--model", model, "--json", *options], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in out.stdout.splitlines()]


def fails(kind, param, call, **arguments):
    """The call must fail with this exception, and name this parameter."""
    try:
        call(**arguments)
    except kind as error:
        body = error.body if isinstance(error.body, dict) else {}
        check(body.get("param") == param, "parameter of the error", body, "not", param)
        check(body.get("message"), "an error without a message", body)
        return
    except Exception as error:  # noqa: BLE001
        check(False, f"{kind.__name__} for {param}", "but", repr(error))
        return
    check(False, f"no {kind.__name__} for {param}", arguments)


PROMPT = "The old man"
CHAT = [{"role": "user", "content": "I need a table for two in San Jose tonight."}]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
SAMPLED_FLAGS = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "7"]


def test_plain(server):
    client = server.client()
    check([m.id for m in client.models.list()] == [name], "list of models")
    check(client.models.retrieve(name).id == name, "one model")
    greedy = generate("--prompt", PROMPT, "--max-tokens", "24")[0]
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=24, temperature=0, top_p=1)
    check(answer.choices[0].text == greedy["text"], "greedy completion", answer.choices[0].text, greedy["text"])
    check(answer.choices[0].finish_reason == greedy["finish_reason"], "finish_reason")
    check(answer.usage.prompt_tokens == greedy["prompt_tokens"], "prompt_tokens")
    check(answer.usage.completion_tokens == len(greedy["token_ids"]), "completion_tokens")
    check(answer.object == "text_completion" and answer.id.startswith("cmpl-"), "shape of a completion")

    wanted = generate("--prompt", CHAT[0]["content"], "--chat", "--max-tokens", "40", "--n", "3", *SAMPLED_FLAGS)
    chat = client.chat.completions.create(model=name, messages=CHAT, max_tokens=40, n=3, **SAMPLED)
    check([c.message.content for c in chat.choices] == [w["text"] for w in wanted], "n sampled chat completions")
    check([c.finish_reason for c in chat.choices] == [w["finish_reason"] for w in wanted], "their ends")
    check(all(c.message.role == "assistant" for c in chat.choices), "role")

    # the same by stream
    texts, ends, usage = {}, {}, None
    for chunk in client.chat.completions.create(model=name, messages=CHAT, max_completion_tokens=40, n=3, stream=True,
                                                stream_options={"include_usage": True}, **SAMPLED):
        for c in chunk.choices:
            texts[c.index] = texts.get(c.index, "") + (c.delta.content or "")
            ends[c.index] = c.finish_reason or ends.get(c.index)
        usage = chunk.usage or usage
    check([texts[i] for i in range(3)] == [w["text"] for w in wanted], "streamed chat completions")
    check([ends[i] for i in range(3)] == [w["finish_reason"] for w in wanted], "their ends")
    check(usage and usage.completion_tokens == sum(len(w["token_ids"]) for w in wanted), "usage of a stream", usage)

    text = "".join(c.choices[0].text for c in client.completions.create(model=name, prompt=PROMPT, max_tokens=24, temperature=0,
                                                                       stream=True) if c.choices)
    check(text == greedy["text"], "streamed completion")


def test_prompts(server):
    client = server.client()
    create = lambda prompt, **more: client.completions.create(model=name, prompt=prompt, max_tokens=6, temperature=0, **more)
    tokens = httpx.post(server.url + "/tokenize", json={"prompt": PROMPT}).json()
    check(tokens["count"] == len(tokens["tokens"]) and tokens["tokens"][0] == 0, "tokenize", tokens)
    back = httpx.post(server.url + "/detokenize", json={"tokens": tokens["tokens"][1:]}).json()
    check(back["prompt"] == PROMPT, "detokenize", back)
    one = create(PROMPT).choices[0].text
    check(create(tokens["tokens"]).choices[0].text == one, "a prompt of tokens")
    many = create([PROMPT, "Once upon a time"])
    check(many.choices[0].text == one and [c.index for c in many.choices] == [0, 1], "an array of prompts")
    check(create([tokens["tokens"], tokens["tokens"]]).choices[1].text == one, "an array of token arrays")
    check(create(PROMPT, echo=True).choices[0].text == PROMPT + one, "echo")
    streamed = "".join(c.choices[0].text for c in create(PROMPT, echo=True, stream=True))
    check(streamed == PROMPT + one, "echo in a stream", streamed)
    stopped = client.completions.create(model=name, prompt=PROMPT, max_tokens=60, temperature=0, stop=["who", "zzz"])
    check("who" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop", "stop", stopped.choices[0])
    check(one.startswith(stopped.choices[0].text) or stopped.choices[0].text.startswith(one), "text before the stop string")
    biased = create(PROMPT, logit_bias={str(tokens["tokens"][-1]): 100})
    check(biased.choices[0].text.replace(" man", "") == "", "logit_bias", biased.choices[0].text)
    extra = create(PROMPT, extra_body={"top_k": 1, "min_p": 0.1, "ignore_eos": True, "repetition_penalty": 1.0,
                                       "no_such_field": {"x": [1]}})
    check(extra.choices[0].text == one, "fields beyond OpenAI's, and an unknown one")
    penalised = create(PROMPT, presence_penalty=1.5, frequency_penalty=1.5, user="me")
    check(len(penalised.choices[0].text) > 0, "penalties")


def test_logprobs(server):
    client = server.client()
    wanted = generate("--prompt", PROMPT, "--max-tokens", "8", "--logprobs", "3")[0]["logprobs"]
    got = client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3).choices[0]
    check(len(got.logprobs.tokens) == 8 and "".join(got.logprobs.tokens) == got.text, "tokens of logprobs", got)
    check(all(abs(a - b["logprob"]) < 1e-4 for a, b in zip(got.logprobs.token_logprobs, wanted)), "values of logprobs")
    check(all(len(t) <= 3 for t in got.logprobs.top_logprobs), "top_logprobs")
    check(got.logprobs.text_offset[0] == 0 and got.logprobs.text_offset[1] == len(got.logprobs.tokens[0]), "text_offset")
    chat = client.chat.completions.create(model=name, messages=CHAT, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    check(len(content) == 8, "logprobs of a chat", content)
    check(all(len(c.top_logprobs) == 2 and c.top_logprobs[0].logprob >= c.top_logprobs[1].logprob for c in content), "best first")
    text = bytes(b for c in content for b in c.bytes).decode().removesuffix("<|im_end|>")  # the last token ends the answer
    check(text == chat.choices[0].message.content, "bytes of logprobs", text)
    items = []
    for chunk in client.chat.completions.create(model=name, messages=CHAT, max_tokens=8, temperature=0, logprobs=True,
                                                top_logprobs=2, stream=True):
        if chunk.choices and chunk.choices[0].logprobs:
            items += chunk.choices[0].logprobs.content
    check([c.token for c in items] == [c.token for c in content], "logprobs of a stream")


def test_echo(server):
    """Log-probabilities of prompts: what `quattuor eval ppl` says of the same tokens, in every way to ask for them."""
    client = server.client()
    text = "The old man, who had been in the garden, said that it was late.\nNobody answered him; the dog slept." * 8
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(text)
        file.flush()
        tokens = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()["tokens"]
        out = subprocess.run([quattuor, "eval", "ppl", "--model", model, "--text", file.name, "--ctx", str(len(tokens)), "--json"],
                             capture_output=True, text=True, check=True)
        wanted = json.loads(out.stdout.splitlines()[-1])["mean_nll"]
    create = lambda **more: client.completions.create(model=name, prompt=text, temperature=0, top_p=1, echo=True, logprobs=2, **more)
    plain = create(max_tokens=0)
    answer, lp = plain.choices[0], plain.choices[0].logprobs
    check(answer.text == text and answer.finish_reason == "length" and plain.usage.completion_tokens == 0, "echo alone", answer.finish_reason)
    check(lp.token_logprobs[0] is None and lp.top_logprobs[0] is None and len(lp.token_logprobs) == len(tokens), "the first token")
    mean = -sum(lp.token_logprobs[1:]) / (len(tokens) - 1)
    check(abs(mean - wanted) < 2e-4, "mean log-probability against eval ppl", mean, wanted)
    check(all(token in top and 2 <= len(top) <= 3 for token, top in zip(lp.tokens[1:], lp.top_logprobs[1:])), "the token beside the best")
    check(all(text[at:].startswith(token) for token, at in list(zip(lp.tokens, lp.text_offset))[1:]), "text_offset of a prompt")
    check("".join(lp.tokens[1:]) == text, "tokens of a prompt")
    longer = create(max_tokens=5, n=2)
    for choice in longer.choices:
        check(choice.logprobs.token_logprobs[:len(tokens)] == lp.token_logprobs, "the same after a prefix-cache hit, in each completion")
        check(len(choice.logprobs.tokens) == len(tokens) + 5 and choice.text == "".join(choice.logprobs.tokens[1:]), "and the output's")
    parts = [c.choices[0] for c in create(max_tokens=5, stream=True) if c.choices]
    check("".join(p.text for p in parts) == longer.choices[0].text, "echo in a stream")
    streamed = [x for p in parts if p.logprobs for x in p.logprobs.token_logprobs]
    check(streamed == longer.choices[0].logprobs.token_logprobs, "log-probabilities of a stream", len(streamed))
    given = client.completions.create(model=name, prompt=[tokens, tokens[:9]], max_tokens=0, echo=True, logprobs=0).choices
    check(given[0].logprobs.token_logprobs == lp.token_logprobs, "a prompt of tokens")
    check(given[1].logprobs.token_logprobs == lp.token_logprobs[:9], "and a shorter one")


def test_transformers():
    """The same of the float model, by transformers, where it and torch are installed."""
    folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../../shared/models/demo-bf16")
    folder = os.path.join(os.environ["QUATTUOR_SHARED"], "models/demo-bf16") if "QUATTUOR_SHARED" in os.environ else folder
    try:
        import torch
        import transformers
    except ImportError:
        print("test_transformers: left out, no torch and transformers in this Python")
        return
    if not os.path.isdir(folder):
        print("test_transformers: left out, there is no", folder)
        return
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    server = Server("--log-format", "none", model_dir=folder)
    text = "The old man, who had been in the garden, said that it was late. Nobody answered him."
    got = server.client().completions.create(model="demo-bf16", prompt=text, max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    tokens = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()["tokens"]
    with torch.no_grad():
        scores = torch.log_softmax(reference(torch.tensor([tokens])).logits[0].double(), -1)
    wanted = [scores[i - 1, t].item() for i, t in enumerate(tokens)][1:]
    worst = max(abs(a - b) for a, b in zip(got.token_logprobs[1:], wanted))
    check(len(got.token_logprobs) == len(tokens) and worst < 0.01, "log-probabilities of transformers", worst)
    print("test_transformers: largest difference", worst)
    server.stop()


def test_errors(server):
    client = server.client()
    bad, chat, completion = openai.BadRequestError, client.chat.completions.create, client.completions.create
    base = {"model": name, "messages": CHAT}
    for param, value in {"temperature": -1, "top_p": 0, "n": 0, "presence_penalty": 9, "frequency_penalty": "x", "seed": 1.5,
                         "max_tokens": 0, "max_completion_tokens": -5, "logit_bias": {"x": 1}, "stop": [1], "top_logprobs": 3,
                         "tools": [{"type": "x"}], "stream_options": {"include_usage": True}}.items():
        fails(bad, "tools[0]" if param == "tools" else param, chat, **base, **{param: value})
    for param, value in {"top_k": -7, "min_p": 2, "repetition_penalty": 0, "ignore_eos": 1, "best_of": 2,
                         "stop_token_ids": ["a"]}.items():
        fails(bad, param, chat, **base, extra_body={param: value})
    fails(bad, "messages", chat, model=name, messages=[])
    fails(bad, "messages[0].role", chat, model=name, messages=[{"role": "king", "content": "x"}])
    fails(bad, "messages[0].content", chat, model=name, messages=[{"role": "user", "content": [{"type": "image_url"}]}])
    fails(bad, "response_format.type", chat, **base, response_format={"type": "xml"})
    fails(bad, "tool_choice", chat, **base, tool_choice="required")
    fails(bad, "prompt", completion, model=name, prompt=[])
    fails(bad, "prompt", completion, model=name, prompt=[1, "x"])
    fails(bad, "prompt", completion, model=name, prompt=[99999999])
    fails(bad, "prompt", completion, model=name, prompt="word " * 20000)
    fails(bad, "suffix", completion, model=name, prompt="x", suffix="y")
    fails(openai.NotFoundError, "model", chat, model="other", messages=CHAT)
    fails(openai.NotFoundError, "model", client.models.retrieve, model="other")
    fails(openai.InternalServerError, None, client.embeddings.create, model=name, input="x")
    check(httpx.post(server.url + "/v1/embeddings", json={}).status_code == 501, "embeddings")
    check(httpx.get(server.url + "/nothing").status_code == 404, "an unknown path")
    described = httpx.get(server.url + "/openapi.json").json()
    check(described["openapi"] == "3.1.0" and "/v1/chat/completions" in described["paths"], "/openapi.json")
    check(described["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == [name, None], "its model")
    check(httpx.get(server.url + "/v1/completions").status_code == 405, "a wrong method")


def test_many(server):
    """64 streams at once, each equal to `generate` with the same seed."""
    prompts = [f"{w} {i}" for i in range(16) for w in ("The old man", "I need a flight to", "Once there was", "In the garden")]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for p in prompts:
            file.write(json.dumps({"prompt": p}) + "\n")
        file.flush()
        wanted = [w["text"] for w in generate("--prompts-file", file.name, "--max-tokens", "24", *SAMPLED_FLAGS)]

    async def one(client, prompt):
        stream = await client.completions.create(model=name, prompt=prompt, max_tokens=24, stream=True, **SAMPLED)
        return "".join([c.choices[0].text async for c in stream if c.choices])

    async def every():
        async with server.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*[one(client, p) for p in prompts])

    got = asyncio.run(every())
    check(got == wanted, "64 streams at once", [(g, w) for g, w in zip(got, wanted) if g != w][:2])


def test_cancel(server):
    """A client that goes away frees its pages at once."""
    before = server.metric('vllm:request_success_total{model_name="%s",finished_reason="abort"}' % name)
    stream = server.client().completions.create(model=name, prompt=PROMPT, max_tokens=8000, stream=True,
                                                extra_body={"ignore_eos": True})
    next(iter(stream))
    check(server.metric("vllm:num_requests_running") == 1, "one runs")
    stream.close()
    with httpx.Client() as client:  # not streamed: only the socket's end tells
        try:
            client.post(server.url + "/v1/completions", json={"prompt": PROMPT, "max_tokens": 8000, "ignore_eos": True}, timeout=0.5)
            check(False, "a long completion took less than its timeout")
        except httpx.ReadTimeout:
            pass
    for _ in range(50):
        time.sleep(0.1)
        if server.metric("vllm:num_requests_running") == 0:
            break
    check(server.metric("vllm:num_requests_running") == 0 and server.metric("quattuor:kv_pages_used") == 0, "pages after leaving")
    after = server.metric('vllm:request_success_total{model_name="%s",finished_reason="abort"}' % name)
    check(after == before + 2, "aborted completions", before, after)


def test_operation():
    with tempfile.TemporaryDirectory() as folder:
        keys = os.path.join(folder, "keys")
        with open(keys, "w") as file:
            file.write("# team\nsk-one\nsk-two\n")
        server = Server("--api-key", keys, "--max-num-seqs", "2", "--max-queue", "1", "--served-model-name", "org/mine",
                        "--log-format", "json", "--ping", "1", "--grace", "2")
        for key in ("sk-one", "sk-two"):
            check([m.id for m in server.client(key=key).models.list()] == ["org/mine"], "a right key")
        check(server.client(key="sk-one").models.retrieve("org/mine").id == "org/mine", "a name with a slash")
        for key in ("sk-thr", "sk-on", "sk-onee", "x"):
            try:
                server.client(key=key).models.list()
                check(False, "a wrong key opened")
            except openai.AuthenticationError as error:
                check(error.code == "invalid_api_key", "code of a wrong key", error.body)
        for path in ("/v1/models", "/metrics", "/version", "/nothing"):
            check(httpx.get(server.url + path).status_code == 401, "without a key", path)
        check(httpx.post(server.url + "/tokenize", json={"prompt": "x"}).status_code == 401, "/tokenize without a key")
        check(httpx.get(server.url + "/health").json() == {"status": "ok"}, "/health without a key")

        client = server.client(key="sk-one")
        endless = lambda: client.completions.create(model="org/mine", prompt=PROMPT, max_tokens=8000, stream=True,
                                                    extra_body={"ignore_eos": True}, extra_headers={"X-Request-Id": "my-id.1"})
        streams = [endless(), endless(), endless()]  # two run, one waits
        check(streams[0].response.headers["x-request-id"] == "my-id.1", "the request's id comes back")
        time.sleep(2.5)
        try:
            endless()
            check(False, "a full queue took one more")
        except openai.RateLimitError as error:
            check(error.response.headers.get("retry-after") == "1", "Retry-After")
        try:
            client.completions.create(model="org/mine", prompt=[PROMPT] * 4, max_tokens=1)
            check(False, "more completions than the server ever takes")
        except openai.BadRequestError as error:
            check(error.body["param"] == "n", "its parameter", error.body)
        except openai.RateLimitError:
            pass  # also true: the queue is full
        waiting = streams[2].response.iter_raw()
        check(b"keep-alive" in next(waiting), "a comment in a silent stream")
        start = time.time()
        check(server.stop() == 0, "exit code after SIGTERM")
        check(1.5 < time.time() - start < 8, "the grace was given", time.time() - start)
        try:
            for _ in streams[0]:
                pass
            check(False, "a cut stream ended as if it were complete")
        except (openai.APIError, httpx.HTTPError) as error:
            check("shutting down" in str(error) or isinstance(error, httpx.HTTPError), "the reason for the cut", repr(error))
        lines = [json.loads(l) for l in server.log.splitlines() if l.startswith("{")]
        check(any(l["status"] == 429 for l in lines) and any(l["status"] == 401 for l in lines), "lines of the log")
        check(any(l.get("finish") == "cut" and l["request_id"] == "my-id.1" for l in lines), "a cut stream in the log", lines[-3:])

    server = Server(env={"QUATTUOR_API_KEY": "sk-env"})
    check(httpx.get(server.url + "/v1/models").status_code == 401, "the key of the variable")
    check(httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer sk-env"}).status_code == 200, "and with it")
    # SIGTERM under load: what runs is finished
    client = server.client(key="sk-env")
    texts = []
    worker = threading.Thread(target=lambda: texts.append(client.completions.create(
        model=name, prompt=PROMPT, max_tokens=150, temperature=0, extra_body={"ignore_eos": True}).usage.completion_tokens))
    worker.start()
    time.sleep(0.3)
    check(server.stop() == 0, "exit code")
    worker.join()
    check(texts == [150], "a request that ran when SIGTERM came", texts)


TEMPLATE = """{% if tools %}<|im_start|>system
Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": n, "description": d, "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
    "required": ["city"], "additionalProperties": False}}} for n, d in (("find_table", "Finds a table"), ("find_flight", "Flies"))]


def test_tools():
    """The demo model knows no tools, but it can be made to write a call; the template here shows tools as Hermes does."""
    with tempfile.TemporaryDirectory() as folder:
        for entry in os.listdir(model):
            os.symlink(os.path.abspath(os.path.join(model, entry)), os.path.join(folder, entry))
        with open(os.path.join(folder, "chat_template.jinja"), "w") as file:
            file.write(TEMPLATE)
        server = Server("--served-model-name", name, "--log-format", "none", model_dir=folder)
        client = server.client()
        create = lambda **more: client.chat.completions.create(model=name, messages=CHAT, tools=TOOLS, max_tokens=200,
                                                               temperature=0.7, seed=5, **more)
        for choice in ("required", {"type": "function", "function": {"name": "find_flight"}}):
            answer = create(tool_choice=choice).choices[0]
            check(answer.finish_reason == "tool_calls" and answer.message.content is None, "a forced call", answer)
            call = answer.message.tool_calls[0]
            check(call.function.name in ("find_table", "find_flight"), "its name", call)
            check(isinstance(choice, str) or call.function.name == "find_flight", "the name asked for", call)
            arguments = json.loads(call.function.arguments)
            check(len(arguments["city"]) <= 20 and set(arguments) <= {"city", "people"}, "its arguments", arguments)
            parts, ends = [], []
            for chunk in create(tool_choice=choice, stream=True):
                parts += chunk.choices[0].delta.tool_calls or []
                ends.append(chunk.choices[0].finish_reason)
                check(not chunk.choices[0].delta.content, "text beside a call", chunk)
            check(ends[-1] == "tool_calls" and len(parts) == 1 and parts[0].index == 0, "a streamed call", parts, ends)
            check(parts[0].function.arguments == call.function.arguments, "the same call in a stream")
            # the call and its result go back through the template
            more = CHAT + [answer.message.model_dump(exclude_none=True),
                           {"role": "tool", "tool_call_id": call.id, "content": "no table"}]
            text = httpx.post(server.url + "/tokenize", json={"messages": more, "tools": TOOLS}).json()
            text = httpx.post(server.url + "/detokenize", json={"tokens": text["tokens"]}).json()["prompt"]
            check("find_table" in text and f'<tool_call>{{"name": "{call.function.name}"' in text and "no table" in text,
                  "tools in the prompt", text)
        plain = create(tool_choice="none").choices[0]
        check(plain.message.tool_calls is None and plain.message.content, "tool_choice none", plain)
        auto = create().choices[0]
        check(auto.message.content or auto.message.tool_calls, "tool_choice auto")
        server.stop()


SCHEMA = {"type": "object", "additionalProperties": False, "required": ["city", "people", "meal", "tags"], "properties": {
    "city": {"type": "string", "minLength": 2, "maxLength": 12}, "people": {"type": "integer", "minimum": 1, "maximum": 12},
    "meal": {"enum": ["lunch", "dinner"]}, "note": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"}]},
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2}}}


def test_json(server):
    client = server.client()
    form = {"type": "json_schema", "json_schema": {"name": "booking", "schema": SCHEMA, "strict": True}}
    answers = client.chat.completions.create(model=name, messages=CHAT, max_tokens=300, n=8, temperature=1.2, top_p=1,
                                             seed=3, response_format=form)
    for choice in answers.choices:
        check(choice.finish_reason == "stop", "the end of a JSON answer", choice)
        value = json.loads(choice.message.content)
        check(set(SCHEMA["required"]) <= set(value) <= set(SCHEMA["properties"]), "members", value)
        check(2 <= len(value["city"]) <= 12 and 1 <= value["people"] <= 12 and value["meal"] in ("lunch", "dinner") and
              len(value["tags"]) <= 2 and all(len(t) <= 5 for t in value["tags"]), "values", value)
    streamed = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(
        model=name, messages=CHAT, max_tokens=300, temperature=1.2, top_p=1, seed=3, response_format=form, stream=True) if c.choices)
    check(streamed == answers.choices[0].message.content, "the same by stream")
    free = client.chat.completions.create(model=name, messages=CHAT, max_tokens=400, temperature=0.9, seed=4, n=4,
                                          response_format={"type": "json_object"})
    for choice in free.choices:
        check(choice.message.content.startswith("{"), "a JSON object", choice.message.content)
        if choice.finish_reason == "stop":
            check(isinstance(json.loads(choice.message.content), dict), "a whole JSON object")
    fails(openai.BadRequestError, "response_format.json_schema.schema", client.chat.completions.create, model=name, messages=CHAT,
          response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(?=a)"}}})


def main():
    server = Server("--log-format", "none")
    try:
        for test in (test_plain, test_prompts, test_logprobs, test_echo, test_errors, test_json, test_many, test_cancel):
            start = time.time()
            test(server)
            print(f"{test.__name__}: {time.time() - start:.1f} s")
    finally:
        server.stop()
    for test in (test_tools, test_operation, test_transformers):
        start = time.time()
        test()
        print(f"{test.__name__}: {time.time() - start:.1f} s")
    print("FAILED" if n_failed else "equal")
    sys.exit(1 if n_failed else 0)


main()
