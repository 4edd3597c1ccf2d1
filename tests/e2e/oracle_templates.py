#!/usr/bin/env python3
"""Renders real chat templates with jinja2, as transformers configures it, and with Quattuor, and compares byte for byte.

usage: oracle_templates.py TEMPLATE_RENDER [SHARED_DIR]
TEMPLATE_RENDER is the tool built from tests/unit/template_render.c; SHARED_DIR holds data/tokenizers/templates and models/.
Exits with 77 when jinja2 or the templates are missing. Where jinja2 raises, Quattuor must fail too, and the message of
raise_exception must be the same.
"""
import glob
import json
import os
import subprocess
import sys
from datetime import datetime

try:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
except ImportError:
    print("skipped: jinja2 is not installed")
    sys.exit(77)


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


class Raised(jinja2.exceptions.TemplateError):
    pass


class Namespace(jinja2.utils.Namespace):
    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError("underscore")


def environment():
    def raise_exception(message):
        raise Raised(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    env.globals["namespace"] = Namespace
    return env


def tool(name, properties, required, **more):
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The tool {name}; says \"hello\" & <more>.",
            "parameters": {"type": "object", "properties": properties, "required": required},
            **more,
        },
    }


TOOLS = [
    tool("get_weather", {"city": {"type": "string", "description": "A city: Zürich, 東京"}, "days": {"type": "integer", "description": " how many "}}, ["city"]),
    tool("add", {"x": {"type": "number", "description": "x"}, "y": {"type": ["number", "string"], "description": "y"},
                 "z": {"type": "array", "items": {"type": "string"}, "description": "list"},
                 "o": {"type": "object", "additionalProperties": {"type": "integer"}, "description": "map"}}, ["x", "y"],
         **{"return": {"type": "number", "description": "the sum"}}),
    tool("noop", {}, []),
]
OLD_TOOLS = [{"name": "search", "description": "Search the web", "parameter_definitions": {
    "query": {"description": "what to look for", "type": "str", "required": True},
    "limit": {"description": "how many", "type": "int", "required": False}}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(name, arguments, id="abcdef123"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def conversations():
    yield "one user turn", [user("Hello")]
    yield "system", [system("You are terse."), user("Hello")]
    yield "turns", [user("Hi"), assistant("Hello!"), user("How are you?"), assistant("  Fine.\n"), user(" \t trim me \n")]
    yield "system and turns", [system(" S "), user("a"), assistant("b"), user("c")]
    yield "ends with assistant", [user("Hi"), assistant("Hello!")]
    yield "unicode", [system("Ж\u00a0日本"), user("emoji 😀 “quotes” \u2028 line\u0007bell é"), assistant("ΑΣ ß İ"), user("{{ not }} {% a %} tag")]
    yield "quotes", [user("it's \"quoted\" \\ back\nnewline <b>&amp;</b>")]
    yield "empty content", [system(""), user(""), assistant(""), user("")]
    yield "empty list", []
    yield "two users", [user("a"), user("b")]
    yield "assistant first", [assistant("a"), user("b")]
    yield "unknown role", [{"role": "wizard", "content": "zap"}, user("b")]
    yield "no content", [{"role": "user"}]
    yield "none content", [user("x"), assistant(None), user("y")]
    yield "think", [user("1+1?"), assistant("<think>hm\n</think>\n\n2"), user("2+2?")]
    yield "parts", [user([{"type": "text", "text": "Hello"}, {"type": "image"}])]
    yield "call object", [user("weather?"), assistant("", tool_calls=[call("get_weather", {"city": "Zürich", "days": 2, "f": 1.0, "n": None, "l": [1, "a", True, {}]})]),
                          {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": "sunny"}, assistant("Sunny."), user("thanks")]
    yield "call string", [user("weather?"), assistant(None, tool_calls=[call("get_weather", '{"city": "Bern"}')]),
                          {"role": "tool", "tool_call_id": "abcdef123", "content": '{"t": 21.5}'}]
    yield "two calls", [system("s"), user("both"), assistant("ok", tool_calls=[call("get_weather", {"city": "a"}), call("add", {"x": 1, "y": 2.5})]),
                        {"role": "tool", "tool_call_id": "abcdef123", "content": "r1"}, {"role": "tool", "tool_call_id": "abcdef124", "content": "r2"}, user("go on")]
    yield "call without content", [user("w"), {"role": "assistant", "tool_calls": [call("noop", {})]}, {"role": "tool", "tool_call_id": "abcdef123", "content": {"a": [1, 2]}}]
    yield "empty calls", [user("w"), assistant("a", tool_calls=[]), user("b")]
    yield "bad call id", [user("w"), assistant("", tool_calls=[call("noop", {}, "x")]), {"role": "tool", "tool_call_id": "x", "content": "y"}]
    yield "ipython", [user("w"), assistant("a"), {"role": "ipython", "content": ["x", 1]}]
    yield "python", [user("w"), assistant(None, tool_calls=[call("python", "print(1)")]), {"role": "tool", "content": "1"}]
    yield "long", [m for i in range(200) for m in (user(f"question {i} " + "x" * (i * 7)), assistant(f"answer {i}"))] + [user("end")]


def variables():
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for name, messages in conversations():
        for tools_name, tools in (("no tools", None), ("tools", TOOLS), ("old tools", OLD_TOOLS), ("empty tools", [])):
            for generation in (True, False):
                more = {"functions": json.dumps(TOOLS), "datetime": "2026-01-02"}
                yield f"{name}, {tools_name}, {generation}", {"messages": messages, "tools": tools, "documents": None,
                                                              "add_generation_prompt": generation, **special, **more}
        yield f"{name}, bare", {"messages": messages}
        yield f"{name}, custom", {"messages": messages, "tools": None, "add_generation_prompt": True, **special, "custom_tools": TOOLS,
                                  "tools_in_user_message": False, "date_string": "1 Jan 2026", "builtin_tools": ["brave_search", "code_interpreter"]}


class Tool:
    def __init__(self, path):
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def render(self, template, values):
        self.process.stdin.write(json.dumps({"template": template, "variables": values}).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main():
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    here = os.path.dirname(os.path.abspath(__file__))
    shared = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("QUATTUOR_SHARED", os.path.join(here, "../../../shared"))
    templates = {os.path.basename(p): open(p, encoding="utf-8").read() for p in sorted(glob.glob(shared + "/data/tokenizers/templates/*.jinja"))}
    for path in sorted(glob.glob(shared + "/models/*/tokenizer_config.json")):
        source = json.load(open(path, encoding="utf-8")).get("chat_template")
        if isinstance(source, str):
            templates[path.split("/")[-2]] = source
    for path in sorted(glob.glob(here + "/../golden/templates/*.jinja")):
        templates["golden " + os.path.basename(path)] = open(path, encoding="utf-8").read()
    if not any(name.endswith(".jinja") and not name.startswith("golden") for name in templates):
        print("skipped: no shared chat templates here")
        return 77
    tool_under_test, env = Tool(sys.argv[1]), environment()
    n, n_raised, failures = 0, 0, 0
    for name, source in templates.items():
        compiled = env.from_string(source)
        for what, values in variables():
            n += 1
            expected, error = None, None
            try:
                expected = compiled.render(values)
            except Exception as e:  # noqa: BLE001 - whatever jinja2 raises
                error = e
                n_raised += 1
            got = tool_under_test.render(source, values)
            if error is None:
                good = got.get("text") == expected
            elif isinstance(error, Raised):
                good = got.get("status") == "QTR_ERR_ARGUMENT" and got["error"] == str(error)
            else:
                good = "error" in got and got["status"] != "QTR_ERR_ARGUMENT"
            if not good:
                failures += 1
                if failures <= 5:
                    print(f"FAILED {name}: {what}\n  jinja2:   {error!r} {expected!r}\n  quattuor: {got!r}"[:3000])
    print(f"{len(templates)} templates, {n} renderings ({n_raised} refused by both), {failures} differ")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
