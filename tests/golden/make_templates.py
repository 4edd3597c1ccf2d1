#!/usr/bin/env python3
"""Writes templates.json: what jinja2, set up as transformers does it, makes of our templates. Run by hand when templates/*.jinja,
template_features.txt or the conversations change; needs jinja2.

template_features.txt holds one case a line, or several lines between <<< and >>>. The families of templates/ are our own, in the
style of well-known ones; they are rendered with every conversation of tests/e2e/oracle_templates.py.
"""
import glob
import importlib.util
import json
import os
import re

HERE = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("oracle", os.path.join(HERE, "../e2e/oracle_templates.py"))
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)


def result(env, source, values):
    try:
        return {"text": env.from_string(source).render(values)}
    except oracle.Raised as e:
        return {"raised": str(e)}
    except Exception as e:  # noqa: BLE001
        return {"refused": f"{type(e).__name__}: {e}"}


def features():
    text = open(os.path.join(HERE, "template_features.txt"), encoding="utf-8").read()
    for block in re.findall(r"<<<\n.*?\n>>>\n|[^\n]*\n", text, re.S):
        yield block[4:-5] if block.startswith("<<<") else block[:-1]


def main():
    env = oracle.environment()
    cases = [{"template": source, **result(env, source, {})} for source in features()]
    families = []
    values = list(oracle.variables())
    for path in sorted(glob.glob(os.path.join(HERE, "templates/*.jinja"))):
        source = open(path, encoding="utf-8").read()
        chosen = [i for i, (what, _) in enumerate(values) if not what.startswith("long") and what.endswith((", no tools, True", ", tools, True", ", bare"))]
        families.append({"name": os.path.basename(path), "results": [{"values": i, **result(env, source, values[i][1])} for i in chosen]})
    used = sorted({r["values"] for f in families for r in f["results"]})
    for f in families:
        for r in f["results"]:
            r["values"] = used.index(r["values"])
    with open(os.path.join(HERE, "templates.json"), "w", encoding="utf-8") as f:
        json.dump({"features": cases, "values": [values[i][1] for i in used], "families": families}, f, ensure_ascii=False, indent=0)
        f.write("\n")


if __name__ == "__main__":
    main()
