#!/usr/bin/env python3
"""Golden fp32 logits of the bf16 demo model by transformers, made once: make_demo.py MODEL_DIR (needs torch, transformers).

Writes tests/golden/demo/tokens.json (ids of a short text) and logits.f32 (the last 4 positions, vocabulary-wide).
"""
import json
import os
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

text = (
    "It was a bright cold day in April, and the clocks were striking thirteen. The old man had taught the boy to fish "
    "and the boy loved him. There was nothing to do but wait for the morning, and so they sat by the fire and talked of "
    "ships and of the sea, until the lamp burned low & the rain (which had begun at noon) ceased."
)
here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
ids = tokenizer(text)["input_ids"]
if ids[0] != tokenizer.bos_token_id:
    ids = [tokenizer.bos_token_id] + ids
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0, -4:].numpy().astype(np.float32)
json.dump({"tokens": ids}, open(os.path.join(here, "tokens.json"), "w"))
logits.tofile(os.path.join(here, "logits.f32"))
print(len(ids), logits.shape, logits.std())
