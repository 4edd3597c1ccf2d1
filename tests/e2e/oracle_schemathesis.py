#!/usr/bin/env python3
"""Lets Schemathesis (PyPI) compare `quattuor serve` with the /openapi.json it publishes: oracle_schemathesis.py QUATTUOR MODEL.

Starts the server itself, with a key, on a free port. Seeds are fixed. Exit 77 when Schemathesis is not installed. Schemathesis
loads this file as its hooks, too: two of its checks need what only the document can tell them.

MAX_EXAMPLES in the environment: how many requests it makes up for each route besides its fixed ones (default 40)."""

import os
import re
import subprocess
import sys
import tempfile

try:
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance
except ImportError:
    print("skipped: no schemathesis in this Python (pip install schemathesis)")
    sys.exit(77)


@schemathesis.check
def described_data_acceptance(ctx, response, case):
    """Data that fits the schemas is taken, unless the refused member is marked with x-further-rules."""
    if response.status_code == 400:
        root = case.operation.schema.raw_schema
        body = next(iter(root["paths"][case.operation.path]["post"]["requestBody"]["content"].values()))["schema"]
        members = root["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]
        param = response.json()["error"]["param"] or ""
        if members.get(re.split(r"[.\[]", param)[0], {}).get("x-further-rules"):
            return None
    return positive_data_acceptance(ctx, response, case)


@schemathesis.check
def no_server_error(ctx, response, case):
    """No 5xx but the one that is the whole answer of a route that is not supported."""
    only = "501" in case.operation.schema.raw_schema["paths"][case.operation.path].get("post", {}).get("responses", {})
    assert response.status_code < 500 or (only and response.status_code == 501), f"status {response.status_code}"


def main():
    quattuor, model = sys.argv[1], sys.argv[2].rstrip("/")
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [quattuor, "serve", "--model", model, "--port", "0", "--log-format", "none", "--max-model-len", "192"],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "QUATTUOR_API_KEY": "sk-test"})
        try:
            url = next(filter(None, (re.search(r"at (http://\S+)/v1", line) for line in server.stderr))).group(1)
            checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance,not_a_server_error"]
            status = subprocess.run(
                [sys.executable, "-m", "schemathesis.cli", "run", url + "/openapi.json", "-H", "Authorization: Bearer sk-test",
                 "--seed", "1", "--generation-deterministic", "--no-color", "--warnings", "off",
                 "--request-timeout", "60", "--max-examples", os.environ.get("MAX_EXAMPLES", "40"), *checks],
                cwd=folder, env={**os.environ, "SCHEMATHESIS_HOOKS": "oracle_schemathesis",
                                 "PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}).returncode
            server.terminate()
            ended = server.wait(60)
            if ended != 0:
                print("FAIL: the server ended with", ended)
            sys.exit(1 if status or ended else 0)
        finally:
            server.kill()


if __name__ == "__main__":
    main()
