#!/usr/bin/env python3
"""Writes the same bf16 Llama model in another basis of the residual stream: its channels reordered and half of them negated, which
bf16 holds exactly.   make_permuted.py MODEL_DIR OUTPUT_DIR"""
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

source, output = map(Path, sys.argv[1:])
output.mkdir(exist_ok=True)
for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
    if (source / name).exists():
        shutil.copy(source / name, output / name)
raw = (source / "model.safetensors").read_bytes()
(n,) = struct.unpack("<Q", raw[:8])
header = json.loads(raw[8:8 + n])
data = bytearray(raw[8 + n:])
hidden = json.loads((source / "config.json").read_text())["hidden_size"]
rng = np.random.default_rng(1)
order = rng.permutation(hidden)
sign = np.where(rng.random(hidden) < 0.5, 0x8000, 0).astype(np.uint16)  # the sign bits to turn
for name, tensor in header.items():
    if name == "__metadata__":
        continue
    assert tensor["dtype"] == "BF16", name
    begin, end = tensor["data_offsets"]
    w = np.frombuffer(bytes(data[begin:end]), np.uint16).reshape(tensor["shape"])
    if "norm" in name:  # a factor for each channel, whatever its sign
        w = w[order]
    elif "o_proj" in name or "down_proj" in name:  # gives channels
        w = w[order] ^ sign[order][:, None]
    else:  # takes channels, or is the embedding
        w = w[:, order] ^ sign[order]
    data[begin:end] = np.ascontiguousarray(w).tobytes()
(output / "model.safetensors").write_bytes(raw[:8 + n] + bytes(data))
