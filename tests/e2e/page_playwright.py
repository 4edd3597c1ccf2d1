#!/usr/bin/env python3
"""Uses the page of `quattuor serve` as people do, in headless Chromium: page_playwright.py QUATTUOR MODEL [SCREENSHOT_FOLDER].

Starts the servers itself, on free ports. Exit 77 when playwright (PyPI) or a chromium is not installed."""

import atexit
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
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    print("skipped: no playwright in this Python (pip install playwright)")
    sys.exit(77)
chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not chromium:
    print("skipped: no chromium")
    sys.exit(77)

quattuor, model = sys.argv[1], sys.argv[2].rstrip("/")
folder = sys.argv[3] if len(sys.argv) > 3 else None
n_failed = 0


def check(ok, what, *more):
    global n_failed
    if not ok:
        n_failed += 1
        print("FAIL:", what, *more)


class Server:
    def __init__(self, *options, model_dir=model):
        self.process = subprocess.Popen([quattuor, "serve", "--model", model_dir, "--port", "0", *options], stderr=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)  # whatever happens: who waits for our output would wait for the server
        self.url, log = None, ""
        for line in self.process.stderr:
            log += line
            found = re.search(r"its page at (http://\S+)", line)
            if found:
                self.url = found.group(1)
                break
        if not self.url:
            raise SystemExit("the server did not start: " + log)
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Visit:
    """A fresh browser profile at a server. Whatever the console says and wherever a request goes is kept for the checks at the end."""

    def __init__(self, browser, url, expected=(), **how):
        self.url, self.expected = url, expected
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **how})
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.said, self.requests, self.pages = [], [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.context.on("page", lambda page: self.pages.append(page))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.set_default_timeout(60000)
        self.page.goto(url)
        expect(self.page.locator("#model")).not_to_have_text("…")

    def __enter__(self):
        return self.page

    def __exit__(self, kind, value, trace):
        if kind is None:
            unexpected = [text for text in self.said if not any(word in text for word in self.expected)]
            check(not unexpected, "the console says", unexpected)
            away = [url for url in self.requests if not url.startswith((self.url, "blob:" + self.url))]
            check(not away, "requests left the origin:", away)
            check(len(self.pages) == 1, "windows were opened:", [page.url for page in self.pages])
        self.context.close()


def sse(text, finish="stop"):
    """A stream that says this text, as the server would."""
    events = [{"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]} for part in re.findall(r"\S+\s*|\s+", text)]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    events.append({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(events)}})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def ask(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page, n=1):
    """Waits until the n-th answer is complete; its text."""
    expect(page.locator(".message.assistant")).to_have_count(n)
    expect(page.locator("#send")).to_be_visible()
    return page.locator(".message.assistant .body").last.inner_text()


def says(page, text, question="Say it"):
    """The page's view of an answer with this text, which no model has to produce."""
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=sse(text)))
    n = page.locator(".message.assistant").count()
    ask(page, question)
    answered(page, n + 1)
    page.unroute("**/v1/chat/completions")
    return page.locator(".message.assistant .body").last


def until(page, expression, arg=None):
    """Waits until the expression is true (wait_for_function wants eval, which the page's policy forbids)."""
    end = time.time() + 60
    while not page.evaluate(expression, arg):
        if time.time() > end:
            raise TimeoutError(expression)
        page.wait_for_timeout(50)


def settle(page, **values):
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#settings-form [name={name}]", value)
    page.click("#settings-form .primary")


def shot(page, name):
    if folder:
        os.makedirs(folder, exist_ok=True)
        page.screenshot(path=os.path.join(folder, name + ".png"))


def conversation(browser, url):
    sent = []
    with Visit(browser, url) as page:
        page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
        settle(page, max_tokens="40", temperature="0", system="You are brief.", seed="7")
        page.fill("#question", "Tell me")
        page.press("#question", "Shift+Enter")
        page.keyboard.type("a story.")
        page.press("#question", "Enter")
        first = answered(page)
        check(first, "an answer has no text")
        body = sent[-1]
        check(body["messages"] == [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Tell me\na story."}], "messages", body)
        check(body["max_tokens"] == 40 and body["temperature"] == 0 and body["seed"] == 7 and body["stream"] is True and "top_p" not in body, "sampling", body)
        check(re.search(r"\d+ tokens?", page.locator(".stats").last.inner_text()), "no count of tokens")

        page.click("text=Regenerate")
        expect(page.locator(".message.assistant")).to_have_count(1)
        check(answered(page) == first, "a greedy answer changed when it was regenerated")
        check(len(sent) == 2 and sent[1] == sent[0], "regenerate asked something else")

        page.reload()
        check(answered(page) == first, "a reload lost the answer")
        check("Tell me\na story." in page.locator(".message.user").inner_text(), "a reload lost the question")
        ask(page, "And then?")
        answered(page, 2)
        check([m["role"] for m in sent[-1]["messages"]] == ["system", "user", "assistant", "user"], "the second question's messages", sent[-1])

        page.locator(".message.user").last.get_by_role("button", name="Edit").click()
        page.get_by_label("Edit your message").fill("And before?")
        page.get_by_label("Edit your message").press("Enter")
        answered(page, 2)
        check(sent[-1]["messages"][-1]["content"] == "And before?" and len(sent[-1]["messages"]) == 4, "the edited question", sent[-1])
        check(page.locator(".message.user").count() == 2, "editing left the old question")

        page.click("#new")
        expect(page.locator(".message")).to_have_count(0)
        ask(page, "Another one.")
        answered(page)
        expect(page.locator("#list li")).to_have_count(2)
        page.locator("#list .open").last.click()
        expect(page.locator(".message.assistant")).to_have_count(2)
        with page.expect_download() as download:
            page.click("#export")
        kept = json.load(open(download.value.path(), encoding="utf-8"))
        check(sorted(len(c["messages"]) for c in kept["conversations"]) == [2, 4], "the export", kept)
        page.once("dialog", lambda dialog: dialog.accept())
        page.locator("#list li.here .more").click()
        expect(page.locator("#list li")).to_have_count(1)
        page.reload()
        expect(page.locator("#list li")).to_have_count(1)
        expect(page.locator(".message.assistant")).to_have_count(1)


def stopping(browser, url):
    with Visit(browser, url) as page:
        settle(page, max_tokens="2000", temperature="1")

        def endless(route):  # the demo model likes to be brief: do not let it end
            route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))

        page.route("**/v1/chat/completions", endless)
        for way in ("Escape", "#stop"):
            page.click("#new")
            ask(page, "Tell me everything.")
            body = page.locator(".message.assistant .body")
            until(page, "document.querySelector('.message.assistant .body')?.textContent.length > 40")
            check(page.locator("#log").get_attribute("aria-busy") == "true", "a running answer is not marked busy")
            early = body.inner_text()
            until(page, "n => document.querySelector('.message.assistant .body').textContent.length > n + 40", arg=len(early))
            page.keyboard.press("Escape") if way == "Escape" else page.click(way)
            text = answered(page)
            check(text.startswith(early.rstrip()[:20]), "a stopped answer lost its text")
            expect(page.locator(".stats").last).to_contain_text("stopped")
            check(page.locator("#log").get_attribute("aria-busy") == "false", "a stopped answer is marked busy")
        # the server heard of it: nothing runs there
        for _ in range(300):
            metrics = page.request.get(url + "metrics").text()
            if re.search(r"num_requests_running\S* 0\n", metrics):
                break
            time.sleep(0.1)
        else:
            check(False, "the server goes on with a stopped answer")
        # the reader who scrolls up is left alone
        page.click("#new")
        ask(page, "Once more.")
        until(page, "(s => s.scrollHeight > s.clientHeight + 300)(document.querySelector('#scroller'))")
        page.mouse.move(720, 400)
        page.mouse.wheel(0, -250)
        until(page, "!document.querySelector('#newest').hidden")
        top = page.evaluate("document.querySelector('#scroller').scrollTop")
        length = page.evaluate("document.querySelector('#log').textContent.length")
        until(page, "n => document.querySelector('#log').textContent.length > n + 200", arg=length)
        check(page.evaluate("document.querySelector('#scroller').scrollTop") <= top + 1, "the page scrolled away from its reader")
        page.click("#newest")
        until(page, "(s => s.scrollHeight - s.clientHeight - s.scrollTop < 60)(document.querySelector('#scroller'))")
        page.reload()  # in the midst of an answer
        expect(page.locator(".message.assistant .body")).to_have_text(re.compile(r"\S{3}"))


MARKDOWN = """# Title

Words with **strong**, *emphasis*, ~~gone~~, `code <b>`, snake_case_name and 2 * 3 * 4.

| Left | Right |
|:--|--:|
| a \\| b | **1** |
| `x` | 2 |

- one
- two
  1. inner
  2. more
- [x] done

> quoted
> lines

```python
print("<i>not italic</i>")
```

[a link](https://example.org/a_(b)) and https://example.org/plain.
"""

HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2"> <svg onload="window.hacked=3">

[click](javascript:window.hacked=4) [data](data:text/html,<script>1</script>) [odd](JaVaScRiPt:alert(1)) [file](file:///etc/passwd) [relative](/v1/models)

![pixel](https://evil.example/pixel.png) ![other](http://evil.example/"onerror="window.hacked=5)

<iframe src="https://evil.example/"></iframe><style>body { display: none }</style>

```"><script>window.hacked=6</script>
</code></pre><script>window.hacked = 7</script>
```

[x](https://evil.example/" onclick="window.hacked=8)
"""


def markdown(browser, url):
    with Visit(browser, url) as page:
        body = says(page, MARKDOWN)
        wanted = {"h3": "Title", "strong >> nth=0": "strong", "em": "emphasis", "del": "gone", "p code": "code <b>", "blockquote": "quoted\nlines",
                  "td >> nth=0": "a | b", "td.right >> nth=0": "1", "ul > li >> nth=0": "one", "ol li >> nth=1": "more", "pre code": 'print("<i>not italic</i>")'}
        for selector, text in wanted.items():
            found = body.locator(selector)
            check(found.count() == 1 and found.inner_text() == text, "Markdown:", selector, found.all_inner_texts())
        check("snake_case_name and 2 * 3 * 4." in body.inner_text(), "Markdown: plain stars and lines")
        check([a.get_attribute("href") for a in body.locator("a").all()] == ["https://example.org/a_(b)", "https://example.org/plain"], "Markdown: links")
        check(all("noopener" in a.get_attribute("rel") for a in body.locator("a").all()), "Markdown: rel")
        body.get_by_role("button", name="Copy the code").click()
        expect(body.get_by_role("button", name="Copy the code")).to_have_text("Copied")
        check(page.evaluate("navigator.clipboard.readText()") == 'print("<i>not italic</i>")', "the copied code")

        body = says(page, HOSTILE)
        check(page.evaluate("window.hacked") is None, "a script of the model ran")
        check(body.locator("script, img, iframe, style, svg, object, embed, [onerror], [onclick], [onload], [style]").count() == 0, "hostile elements")
        schemes = {(a.get_attribute("href") or "").split(":")[0] for a in body.locator("a").all()}
        check(schemes <= {"http", "https"}, "hostile links", schemes)
        check("<script>window.hacked = 1</script>" in body.inner_text(), "hostile text is not shown as text")

        wide = "|" + "|".join(f"column{i}" for i in range(100)) + "|\n|" + "--|" * 100 + "\n" + ("|" + "|".join("x" * 30 for _ in range(100)) + "|\n") * 400
        body = says(page, wide)
        check(body.locator("tr").count() == 301 and body.locator("th").count() == 40, "a huge table is not bounded")
        check("100 more rows, 60 more columns" in body.inner_text(), "a huge table hides what it cut")
        check(page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a huge table widens the page")

        # time does not explode: what is not linear here takes minutes
        evil = ["[" * 20000, "*a " * 20000, "**" * 20000, "`" * 20000 + "a", "> " * 5000 + "x", "- " * 5000 + "x", "![" * 10000, "[a](" * 10000,
                "_a" * 20000, "|" * 20000 + "\n" + "|-" * 5000, "*" * 30000 + "a" + "*" * 30000, "`a``b" * 8000, "1. " * 5000, "\\" * 20001, "~~a" * 9999]
        for text in evil:
            spent = page.evaluate("""async (text) => {
              const { renderMarkdown } = await import(new URL("page/markdown.js", location.href));
              const node = document.createElement("div"), start = performance.now();
              renderMarkdown(node, text);
              return performance.now() - start;
            }""", text)
            check(spent < 5000, "Markdown takes", round(spent), "ms for", text[:8])
        # however a stream cuts it, the result is the same
        same = page.evaluate("""async (text) => {
          const { renderMarkdown } = await import(new URL("page/markdown.js", location.href));
          const whole = document.createElement("div"), grown = document.createElement("div");
          renderMarkdown(whole, text);
          for (let i = 1; i <= text.length; i++) renderMarkdown(grown, text.slice(0, i));
          return whole.innerHTML === grown.innerHTML;
        }""", MARKDOWN + HOSTILE)
        check(same, "a streamed answer looks different from a whole one")


def errors(browser, url):
    refused = ("the server responded with a status of", "Failed to load resource", "ERR_")
    with Visit(browser, url, expected=refused) as page:
        settle(page, max_tokens="30")  # a drawn answer may be thousands of tokens long

        def refuse(status, message, **headers):
            page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=headers, content_type="application/json",
                       body=json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})))

        for status, message, words, headers in ((429, "queue", "busy", {"Retry-After": "1"}), (503, "the device failed", "the device failed", {}),
                                                (400, "too many tokens", "too many tokens", {}), (504, "late", "took too long", {})):
            refuse(status, message, **headers)
            page.click("#new")
            ask(page, "Hello")
            expect(page.get_by_role("alert")).to_contain_text(words)
            page.unroute("**/v1/chat/completions")
            page.get_by_role("button", name="Try again").click()
            answered(page)
            expect(page.get_by_role("alert")).to_have_count(0)
        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.click("#new")
        ask(page, "Hello")
        expect(page.get_by_role("alert")).to_contain_text("connection to the server was lost")
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=sse("Half of an answ").split("data: [DONE]")[0]))
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("alert")).to_contain_text("not complete")
        expect(page.locator(".message.assistant .body")).to_have_text("Half of an answ")
        page.unroute("**/v1/chat/completions")
        failing = 'data: {"choices":[{"index":0,"delta":{"content":"Some"}}]}\n\ndata: {"error":{"message":"the GPU is gone","type":"x","code":null}}\n\n'
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=failing))
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_role("alert")).to_contain_text("the GPU is gone")


def keys(browser):
    with tempfile.NamedTemporaryFile("w", suffix=".keys") as file:
        file.write("open-sesame\n")
        file.flush()
        server = Server("--api-key", file.name)
        with Visit(browser, server.url, expected=("401",)) as page:
            expect(page.locator("#state")).to_have_text("API key needed")
            settle(page, max_tokens="30")
            ask(page, "Hello")
            expect(page.get_by_role("alert")).to_contain_text("API key")
            page.get_by_role("button", name="Enter the key").click()
            page.keyboard.type("open-sesame")
            page.keyboard.press("Enter")
            expect(page.locator("#model")).to_have_text(os.path.basename(model))
            expect(page.locator("#state")).to_have_text("")
            page.get_by_role("button", name="Try again").click()
            check(answered(page), "no answer with the key")
            page.click("#open-engine")
            expect(page.locator(".tile strong").nth(3)).not_to_have_text("–")
            page.reload()
            expect(page.locator("#model")).to_have_text(os.path.basename(model))
        check(server.stop() == 0, "the server's exit code")


def engine(browser, url):
    with Visit(browser, url) as page:
        polls = []
        page.on("request", lambda request: polls.append(request.url) if request.url.endswith("/metrics") else None)
        page.wait_for_timeout(1500)
        check(not polls, "the page polls while nobody looks")
        page.click("#open-engine")
        line = page.locator("#charts .card").first.locator("path.line").first
        expect(line).to_have_attribute("d", re.compile("^M.*L"))
        stop = threading.Event()

        def load():
            body = json.dumps({"prompt": "The old man", "max_tokens": 200, "ignore_eos": True, "n": 6}).encode()
            import urllib.request
            while not stop.is_set():
                urllib.request.urlopen(urllib.request.Request(url + "v1/completions", body, {"Content-Type": "application/json"}), timeout=60).read()

        loader = threading.Thread(target=load)
        loader.start()
        speed = page.locator(".tile strong").nth(0)
        expect(speed).not_to_have_text(re.compile("^0$|–"))
        before = line.get_attribute("d")
        expect(line).not_to_have_attribute("d", before)
        expect(page.locator(".tile strong").nth(1)).not_to_have_text("0")
        for name in ("first", "token", "whole", "step"):
            chart = page.locator(f"[data-histogram={name}]")
            expect(chart.locator("rect").first).to_be_attached()
            check("90 percent" in chart.get_attribute("aria-label"), "the histogram has no words", name)
        figure = page.locator(".card", has_text="KV pages").locator(".figure").inner_text()
        check(re.fullmatch(r"\S+ used, \S+ cached, [\d.]+( k)? free", figure), "KV pages by state", figure)
        page.wait_for_timeout(4000)
        shot(page, "engine")
        stop.set()
        loader.join()
        page.click("#close-engine")
        page.wait_for_timeout(1200)  # what is under way ends
        n = len(polls)
        page.wait_for_timeout(2500)
        check(len(polls) == n, "the page polls after the panel was closed")
        page.click("#open-engine")
        page.keyboard.press("Tab")
        check(page.evaluate("document.activeElement !== document.body"), "focus is lost")


WIDE = MARKDOWN + "\n```\n" + "a long line of code " * 20 + "\n```\n\n" + "|" + "column |" * 30 + "\n|" + "--|" * 30 + "\n\n" + "x" * 500


def looks(browser, url):
    for name, how in {"light": {}, "dark": {"color_scheme": "dark"},
                      "phone": {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}}.items():
        with Visit(browser, url, **how) as page:
            fits = "document.documentElement.scrollWidth <= innerWidth && document.querySelector('#scroller').scrollWidth <= document.querySelector('#scroller').clientWidth"
            check(page.evaluate(fits), name, "scrolls sideways when empty")
            if name == "phone":  # Enter is a new line there
                page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=sse(WIDE)))
                page.fill("#question", "Say it")
                page.tap("#send")
                answered(page)
            else:
                says(page, WIDE)
            check(page.evaluate(fits), name, "scrolls sideways with an answer")
            shot(page, name)
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            brightness = sum(map(int, re.findall(r"\d+", background)[:3]))
            check(brightness < 200 if name == "dark" else brightness > 600, name, "has the background", background)
            if name == "phone":
                for opener, closer in (("#open-engine", "#close-engine"), ("#open-sidebar", "#close-sidebar")):
                    page.tap(opener)
                    check(page.evaluate(fits), "phone scrolls sideways with", opener)
                    page.tap(closer)
                page.tap("#open-settings")
                shot(page, "phone-settings")
            if name == "light":  # the switch: system, light, dark; kept
                for _ in range(2):
                    page.click("#theme")
                page.reload()
                background = page.evaluate("getComputedStyle(document.body).backgroundColor")
                check(sum(map(int, re.findall(r"\d+", background)[:3])) < 200, "the switch is forgotten")


def no_template(browser):
    with tempfile.TemporaryDirectory() as copy:
        for file in os.listdir(model):
            if file == "tokenizer_config.json":
                config = json.load(open(os.path.join(model, file), encoding="utf-8"))
                config.pop("chat_template", None)
                json.dump(config, open(os.path.join(copy, file), "w", encoding="utf-8"))
            elif file != "chat_template.jinja":
                os.symlink(os.path.abspath(os.path.join(model, file)), os.path.join(copy, file))
        server = Server(model_dir=copy)
        sent = []
        with Visit(browser, server.url, expected=("400",)) as page:
            page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
            settle(page, max_tokens="12")
            ask(page, "The old man")
            check(answered(page), "no answer without a template")
            expect(page.locator("#notice")).to_contain_text("no chat template")
            check(sent == [server.url + "v1/chat/completions", server.url + "v1/completions"], "the way to completions", sent)
            ask(page, "and then")
            answered(page, 2)
            check(sent[-1].endswith("/v1/completions") and len(sent) == 3, "it asks for the template again", sent)
        server.stop()


with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    server = Server()
    for test in (conversation, stopping, markdown, errors, engine, looks):
        start = time.time()
        test(browser, server.url)
        print(f"{test.__name__}: {time.time() - start:.1f} s")
    keys(browser)
    no_template(browser)
    browser.close()
    check(server.stop() == 0, "the server's exit code")
print("ok" if not n_failed else f"{n_failed} checks failed")
sys.exit(1 if n_failed else 0)
