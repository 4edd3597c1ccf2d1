#!/usr/bin/env python3
"""An exactly equivalent model with outliers (numpy only): outlier_model.py SOURCE DEST [options].

SOURCE is a Hugging Face Llama directory with F32, F16 or BF16 safetensors. Small models do not have the outliers that QoQ is
for; DEST computes the same, in every float format, because all factors are powers of two, and has in each layer
  * key channels that are FACTOR times larger: rows of k_proj (and bias) times f, the same rows of the group's q_proj divided by
    f; both channels of a RoPE pair together, or the rotation would tell them apart;
  * channels of the MLP between up and down: rows of up_proj (and bias) times f, columns of down_proj divided by f;
  * channels behind the norms: gain times f, those columns of q, k, v (gate, up) divided by f.
"""
import argparse
import json
import os
import shutil
import struct
import sys

import numpy as np

WORD = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read(path):
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        begin = f.tell()
    data = np.memmap(path, np.uint8, "r", begin)
    header.pop("__metadata__", None)
    out = {}
    for name, t in header.items():
        if t["dtype"] not in WORD:
            sys.exit(f"{name} is {t['dtype']}; float weights are needed")
        a, b = t["data_offsets"]
        out[name] = (t["dtype"], np.frombuffer(data[a:b].tobytes(), WORD[t["dtype"]]).reshape(t["shape"]).copy())
    return out


def write(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, x) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, x in tensors.values():
            f.write(x.tobytes())


def floats(dtype, x):
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else x.astype(np.float32)


def scale(tensors, name, where, factor):
    """tensors[name][where] *= factor, refused unless that is exact."""
    dtype, x = tensors[name]
    old = floats(dtype, x[where])
    new = old * np.float32(factor)
    if dtype == "BF16":
        stored = (new.view(np.uint32) >> 16).astype(np.uint16)
    else:
        stored = new.astype(WORD[dtype])
    back = floats(dtype, stored)
    small = np.abs(new) < np.finfo(np.float32).tiny
    if not np.isfinite(back).all() or not ((back / np.float32(factor) == old) | small).all():
        sys.exit(f"{name}: {factor} times is not exact in {dtype}; choose smaller factors")
    x[where] = stored


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("source")
    p.add_argument("dest")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--keys", type=int, default=2, help="RoPE pairs of each KV head")
    p.add_argument("--key-factor", type=int, default=16)
    p.add_argument("--inner", type=int, default=8, help="channels of the MLP")
    p.add_argument("--inner-factor", type=int, default=64)
    p.add_argument("--hidden", type=int, default=4, help="channels behind each norm")
    p.add_argument("--hidden-factor", type=int, default=32)
    a = p.parse_args()
    for f in (a.key_factor, a.inner_factor, a.hidden_factor):
        if f < 1 or f & (f - 1):
            sys.exit(f"factor {f} is not a power of two")
    with open(os.path.join(a.source, "config.json")) as f:
        config = json.load(f)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    dim = config.get("head_dim") or hidden // heads
    tensors = read(os.path.join(a.source, "model.safetensors"))
    random = np.random.default_rng(a.seed)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."

        def rows(matrix, where, factor):
            scale(tensors, name + matrix + ".weight", where, factor)
            if name + matrix + ".bias" in tensors:
                scale(tensors, name + matrix + ".bias", where, factor)

        for head in range(kv_heads):
            pair = random.choice(dim // 2, a.keys, replace=False)
            channels = np.concatenate([pair, pair + dim // 2])
            rows("self_attn.k_proj", head * dim + channels, a.key_factor)
            for q in range(head * (heads // kv_heads), (head + 1) * (heads // kv_heads)):
                rows("self_attn.q_proj", q * dim + channels, 1 / a.key_factor)
        inner = random.choice(config["intermediate_size"], a.inner, replace=False)
        rows("mlp.up_proj", inner, a.inner_factor)
        scale(tensors, name + "mlp.down_proj.weight", (slice(None), inner), 1 / a.inner_factor)
        for norm, behind in (("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                             ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))):
            channels = random.choice(hidden, a.hidden, replace=False)
            scale(tensors, name + norm + ".weight", channels, a.hidden_factor)
            for matrix in behind:
                scale(tensors, name + matrix + ".weight", (slice(None), channels), 1 / a.hidden_factor)
    os.makedirs(a.dest, exist_ok=True)
    for file in os.listdir(a.source):
        if file.endswith((".json", ".jinja", ".model", ".txt")) and not file.endswith(".index.json"):
            shutil.copyfile(os.path.join(a.source, file), os.path.join(a.dest, file))
    write(os.path.join(a.dest, "model.safetensors"), tensors)


if __name__ == "__main__":
    main()
