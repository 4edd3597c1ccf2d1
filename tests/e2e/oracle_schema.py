#!/usr/bin/env python3
"""Random JSON Schemas against Python's jsonschema (PyPI): oracle_schema.py SCHEMA_WALK [QUATTUOR MODEL].

Walks at random through what the server's automaton of each schema lets through (tests/unit/schema_walk.c): every text must be
JSON and fit the schema, and no walk may come to a dead end. With QUATTUOR and MODEL a model writes some answers as well.
N_SCHEMAS in the environment: how many (default 1500). Exit 77 where jsonschema is not installed."""

import json
import os
import random
import re
import subprocess
import sys
import urllib.request

try:
    import jsonschema
except ImportError:
    print("skipped: no jsonschema in this Python (pip install jsonschema)")
    sys.exit(77)

rng = random.Random(11)
LETTERS = "abcxyz019 _-é€😀\"\\/"


def in_pattern(keyword, pattern, instance, schema):
    """Classes of ECMA-262 are ASCII; Python's are not unless told."""
    if isinstance(instance, str) and not re.search(pattern, instance, re.ASCII):
        yield jsonschema.ValidationError(f"{instance!r} does not fit {pattern!r}")


Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {"pattern": lambda validator, pattern, instance, schema: in_pattern("", pattern, instance, schema)},
    format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def a_pattern(depth=0):
    def atom():
        kind = rng.randrange(9)
        if kind == 0 and depth < 3:
            return "(" + rng.choice(["", "?:"]) + inner() + ")"
        if kind == 1:
            return rng.choice([r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "."])
        if kind == 2:
            return "[" + rng.choice(["", "^"]) + "".join(rng.choice(["a-z", "0-9", "_", r"\d", "é", r"\]", r"\-", '"', "A-F"]) for _ in range(rng.randint(1, 3))) + "]"
        if kind == 3:
            return rng.choice([r"\.", r"\\", r"\/", r"\"" if False else '"', r"\n", r"\t", r"\u00e9", r"\x41", r"\(", r"\+"])
        return re.escape(rng.choice(LETTERS)).replace(r"\ ", " ").replace(r'\"', '"').replace(r"\-", "-")

    def inner():
        return "|".join("".join(atom() + rng.choice(["", "", "", "*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])
                                for _ in range(rng.randint(0 if depth else 1, 4))) for _ in range(rng.choice([1, 1, 2, 3])))

    depth += 1
    if rng.random() < 0.5:
        return "^(?:" + inner() + ")$"
    return rng.choice(["", "^"]) + inner() + rng.choice(["", "$"])


def a_number(whole):
    schema = {"type": "integer" if whole else "number"}
    scale = rng.choice([1, 1, 10, 1000, 10**6, 10**14])
    value = lambda: rng.randint(-20, 20) * scale if whole or rng.random() < 0.4 else round(rng.uniform(-5, 5) * scale, rng.randint(0, 6))
    low, high = sorted([value(), value()])
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = high
    if whole and rng.random() < 0.3:
        schema["multipleOf"] = rng.choice([1, 2, 3, 7, 10, 25, 64, 100])
    return schema


def a_string():
    schema = {"type": "string"}
    kind = rng.randrange(4)
    if kind == 0:
        schema["pattern"] = a_pattern()
    elif kind == 1:
        schema["format"] = rng.choice(["date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "color"])
    if rng.random() < 0.5:
        low = rng.randint(0, 6)
        if rng.random() < 0.7:
            schema["minLength"] = low
        if rng.random() < 0.7:
            schema["maxLength"] = low + rng.randint(0, 30)
    return schema


def a_value():
    return rng.choice([None, True, False, 0, 5, -3, 2.5, "a", "é\"\\", "", [1, "x"], {"k": [None]}, 10**12])


def a_schema(depth, defs):
    kind = rng.randrange(14 if depth < 3 else 7)
    if kind < 2:
        return a_string()
    if kind == 2:
        return a_number(True)
    if kind == 3:
        return a_number(False)
    if kind == 4:
        return {"type": rng.choice(["boolean", "null"])}
    if kind == 5:
        schema = {"enum": [a_value() for _ in range(rng.randint(1, 5))]}
        if rng.random() < 0.3:
            schema["type"] = rng.choice(["string", "integer", "number", ["null", "boolean", "string"]])
        return schema
    if kind == 6:
        return {"const": a_value()}
    if kind == 7:
        schema = {"type": "array", "items": a_schema(depth + 1, defs)}
        low = rng.randint(0, 3)
        if rng.random() < 0.5:
            schema["minItems"] = low
        if rng.random() < 0.8:
            schema["maxItems"] = low + rng.randint(0, 3)
        return schema
    if kind == 8:
        return {"type": "array", "prefixItems": [a_schema(depth + 1, defs) for _ in range(rng.randint(1, 3))]}
    if kind < 11:
        names = rng.sample(["a", "b", "long name", "é", "q\"", "kind"], rng.randint(1, 4))
        schema = {"type": "object", "properties": {n: a_schema(depth + 1, defs) for n in names},
                  "required": [n for n in names if rng.random() < 0.5]}
        if rng.random() < 0.5:
            schema["additionalProperties"] = False
        return schema
    if kind == 11:
        union = {rng.choice(["anyOf", "oneOf"]): [a_schema(depth + 1, defs) for _ in range(rng.randint(1, 3))]}
        if rng.random() < 0.3:
            union.update(rng.choice([{"type": "integer"}, {"minLength": 2}, {"title": "t"}, {"type": "object"}]))
        return union
    if kind == 12:
        return {"allOf": [a_schema(depth + 1, defs) for _ in range(rng.randint(1, 2))], **rng.choice([{}, {"type": "object"}, {"maxLength": 9}])}
    return {"$ref": "#/$defs/" + rng.choice(defs), **rng.choice([{}, {}, {"description": "d"}, {"minimum": 1}])}


def a_document():
    defs = ["one", "two"]
    return {**a_schema(0, defs), "$defs": {name: a_schema(1, defs) for name in defs}}


n_failed = 0


def check(schema, text, where):
    global n_failed
    try:
        value = json.loads(text)
        Validator(schema, format_checker=Validator.FORMAT_CHECKER).validate(value)
    except RecursionError:
        return
    except (ValueError, jsonschema.ValidationError) as error:
        n_failed += 1
        print(f"FAIL ({where}):", json.dumps(schema), "let through", text, "but", str(error).split("\n")[0])


def walks(walker, schemas):
    global n_failed
    out = subprocess.run([walker, "12", "5"], input="".join(json.dumps(s) + "\n" for s in schemas), capture_output=True, text=True, check=True)
    n_texts, n_used, refusals = 0, 0, {}
    for schema, line in zip(schemas, out.stdout.split("\n")[:-1], strict=True):
        answer = json.loads(line)
        if "error" in answer:
            why = answer["error"]
            refusals[why] = refusals.get(why, 0) + 1
            continue
        n_used += 1
        if answer["dead"]:
            n_failed += 1
            print("FAIL: a dead end in", json.dumps(schema))
        for text in answer["texts"]:
            n_texts += 1
            check(schema, text, "walk")
    print(f"{n_texts} texts of {n_used} schemas fit; {len(schemas) - n_used} schemas are refused, such as:")
    for why, n in sorted(refusals.items(), key=lambda item: -item[1])[:int(os.environ.get("N_REFUSALS", "3"))]:
        print(f"  {n} x {why}")
    if n_used * 2 < len(schemas) or n_texts < n_used:
        n_failed += 1
        print("FAIL: too few schemas are taken for this to mean much")


def answers(quattuor, model, schemas):
    server = subprocess.Popen([quattuor, "serve", "--model", model, "--port", "0", "--log-format", "none"], stderr=subprocess.PIPE, text=True)
    n_whole = 0
    try:
        url = next(filter(None, (re.search(r"at (http://\S+)/v1", line) for line in server.stderr))).group(1)
        for i, schema in enumerate(schemas):
            body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 120, "temperature": 1.3, "top_p": 1, "n": 4, "seed": i,
                    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
            request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
            try:
                choices = json.load(urllib.request.urlopen(request))["choices"]
            except urllib.error.HTTPError as error:
                if error.code != 400:
                    print("FAIL: status", error.code, json.dumps(schema), error.read())
                    global n_failed
                    n_failed += 1
                continue
            for choice in choices:
                if choice["finish_reason"] == "stop":
                    n_whole += 1
                    check(schema, choice["message"]["content"], "answer")
        print(f"{n_whole} answers of the model fit")
    finally:
        server.terminate()
        server.wait(60)


schemas = [a_document() for _ in range(int(os.environ.get("N_SCHEMAS", "1500")))]
walks(sys.argv[1], schemas)
if len(sys.argv) > 3:
    answers(sys.argv[2], sys.argv[3], schemas[:60])
print("FAILED" if n_failed else "every text fits")
sys.exit(1 if n_failed else 0)
