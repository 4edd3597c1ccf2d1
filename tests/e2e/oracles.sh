#!/usr/bin/env bash
# Compares with Python's own implementations, where they are installed: oracles.sh QUATTUOR [PYTHON] [TEMPLATE_RENDER]
# (PyPI tokenizers, jinja2, numpy, safetensors, openai, schemathesis, jsonschema, playwright). An oracle that is missing is named and
# skipped; a difference fails.
set -euo pipefail
quattuor=$(realpath "$1") python=${2:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
shared=${QUATTUOR_SHARED:-$here/../../../shared}
render=${3:-$(dirname "$quattuor")/tests/template_render}
command -v "$python" >/dev/null || python=python3
failed=0
oracle() { # oracle NAME COMMAND...
  local name=$1 status=0
  shift
  "$@" || status=$?
  case $status in
    0) echo "$name: equal" ;;
    77) echo "$name: skipped" ;;
    *) echo "$name: DIFFERENT"; failed=1 ;;
  esac
}
oracle "chat templates against jinja2" "$python" "$here/oracle_templates.py" "$render" "$shared"
for vocabulary in llama-3.tokenizer.json llama-2.tokenizer.json; do
  oracle "$vocabulary against tokenizers" "$python" "$here/oracle_tokenizers.py" "$quattuor" "$shared/data/tokenizers/$vocabulary" \
    "$shared/data/text/wikitext-2-raw-test.txt"
done
oracle "checkpoints against the specification's reader" "$python" "$here/oracle_formats.py" "$quattuor" "$shared/models/demo-bf16"
oracle "imports of files that torch wrote" "$python" "$here/oracle_torch.py" "$quattuor"
oracle "quattuor serve against the openai client" "$python" "$here/oracle_openai.py" "$quattuor" "$here/../../models/demo"
oracle "JSON Schemas against jsonschema" "$python" "$here/oracle_schema.py" "$(dirname "$quattuor")/tests/schema_walk" "$quattuor" \
  "$here/../../models/demo"
oracle "quattuor serve against its own /openapi.json, by schemathesis" "$python" "$here/oracle_schemathesis.py" "$quattuor" \
  "$here/../../models/demo"
oracle "the page in Chromium" "$python" "$here/page_playwright.py" "$quattuor" "$here/../../models/demo"
exit $failed
