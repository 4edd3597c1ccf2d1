#!/usr/bin/env python3
"""An independent reader of QServe checkpoints (numpy only), written from the text of the specification, sections A.2 - A.4.

  oracle_reader.py DIR [--float SOURCE] [--kv-scales yes|no]

Checks that every tensor of A.2 is there with its name, shape and dtype and nothing else is, that codes, scales and zeros keep the
bounds that the kernels rely on (B.2, B.3), unpacks and dequantises each projection, and with --float prints how far it is from
the float model in SOURCE. Other oracles use the class Model.
"""
import argparse
import json
import os
import sys

import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8, "F64": np.float64,
          "I32": np.int32}
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
               "mlp.down_proj"]


def read_safetensors(path):
    """Name -> array; bf16 as the float32 values. Offsets must be gapless and in order, as the format asks."""
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(n))
        data = f.read()
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        a, b = e["data_offsets"]
        assert a == end and b <= len(data), f"{name}: offsets {a}, {b} after {end}"
        end = b
        x = np.frombuffer(data[a:b], DTYPES[e["dtype"]]).reshape(e["shape"])
        if e["dtype"] == "BF16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = x
    assert end == len(data), "bytes after the last tensor"
    return tensors


def unpack(qweight, oc, ic):
    """qweight [oc][ic/2] -> codes [oc][ic] (A.3): rows 32 N + 16 a + 8 b + c, columns 32 K + 16 d + 4 e + f."""
    p = np.ascontiguousarray(qweight).view(np.uint8).reshape(oc // 32, ic // 32, 8, 4, 2, 2, 4)  # N K c e d b f
    both = np.stack([p & 15, p >> 4])  # a N K c e d b f
    return np.ascontiguousarray(both.transpose(1, 0, 6, 3, 2, 5, 4, 7)).reshape(oc, ic)  # N a b c K d e f


def natural(s2):
    """[groups][oc] as stored -> [oc][groups] (A.4.2), bytes as 0 ... 255."""
    r = np.arange(s2.shape[1])
    return s2.view(np.uint8)[:, 32 * (r // 32) + 4 * (r % 8) + r // 8 % 4].T.astype(np.int32)


class Model:
    def __init__(self, directory):
        self.config = json.load(open(os.path.join(directory, "config.json")))
        self.about = self.config["quantization_config"]
        self.tensors = read_safetensors(os.path.join(directory, "model.safetensors"))
        c = self.config
        heads, hidden, inner = c["num_attention_heads"], c["hidden_size"], c["intermediate_size"]
        d, kv = c.get("head_dim") or hidden // heads, c.get("num_key_value_heads") or heads
        self.shapes = dict(zip(PROJECTIONS, [(heads * d, hidden), (kv * d, hidden), (kv * d, hidden), (hidden, heads * d),
                                             (inner, hidden), (inner, hidden), (hidden, inner)]))
        self.names = [f"model.layers.{i}.{p}" for i in range(c["num_hidden_layers"]) for p in PROJECTIONS]

    def shape(self, name):
        return self.shapes[name.split(".", 3)[3]]

    def integers(self, name):
        """(codes, s2, z2) of a g128 projection, (codes, None, None) per channel, int8 weights of W8A8."""
        oc, ic = self.shape(name)
        if name + ".weight" in self.tensors:
            return self.tensors[name + ".weight"], None, None
        q = unpack(self.tensors[name + ".qweight"], oc, ic)
        if name + ".s2_scales" not in self.tensors:
            return q, None, None
        return q, natural(self.tensors[name + ".s2_scales"]), (-natural(self.tensors[name + ".s2_zeros"])) % 256

    def weight(self, name):
        """What the kernels multiply with (B.2 - B.4), in double."""
        get = lambda suffix: self.tensors[name + suffix].astype(np.float64)
        q, s2, z2 = self.integers(name)
        if name + ".dequant_scale" in self.tensors:
            return q * get(".dequant_scale").astype(np.float16).astype(np.float64)[:, None]
        if s2 is None and name + ".qweight" in self.tensors:
            return q * get(".s1_scales")[:, None] - get(".s1_szeros")[:, None]
        if s2 is None:
            return q.astype(np.float64)
        oc, ic = q.shape
        w8 = q.reshape(oc, -1, 128).astype(np.int32) * s2[..., None] - z2[..., None]
        wrapped = (w8 % 256).astype(np.uint8).view(np.int8)
        assert (wrapped == w8).all(), f"{name}: q * s2 - z leaves int8"
        return w8.reshape(oc, ic) * get(".s1_scales")[:, None]

    def check(self, kv_scales=None):
        bits, group = self.about["wbits"], self.about["group_size"]
        c, left = self.config, dict(self.tensors)

        def take(name, dtypes, shape):
            assert name in left, f"tensor {name} is missing"
            x = left.pop(name)
            assert x.shape == tuple(shape), f"{name}: shape {x.shape}, expected {tuple(shape)}"
            assert x.dtype in dtypes, f"{name}: dtype {x.dtype}"
            assert x.dtype == np.int8 or np.isfinite(x).all(), f"{name}: not finite"

        half, byte = (np.float16,), (np.int8,)
        for table, width in (("model.embed_tokens", self.about["embed_bits"]), ("lm_head", self.about["head_bits"])):
            rows = left[table + ".weight"].shape[0]
            assert rows >= c["vocab_size"]
            take(table + ".weight", byte if width == 8 else half, (rows, c["hidden_size"]))
            if width == 8:
                take(table + ".dequant_scale", (np.float32,), (rows,))
        take("model.norm.weight", half, (c["hidden_size"],))
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            take(p + "input_layernorm.weight", half, (c["hidden_size"],))
            take(p + "post_attention_layernorm.weight", half, (c["hidden_size"],))
            if kv_scales or (kv_scales is None and p + "self_attn.kv_scale_quant_orig" in left):
                x = self.tensors[p + "self_attn.kv_scale_quant_orig"]
                take(p + "self_attn.kv_scale_quant_orig", (np.float32, np.float16), (2,))
                assert (x > 0).all()
            for name in PROJECTIONS:
                oc, ic = self.shapes[name]
                if p + name + ".bias" in left:
                    take(p + name + ".bias", half, (oc,))
                if bits == 16:
                    take(p + name + ".weight", half, (oc, ic))
                elif bits == 8:
                    take(p + name + ".weight", byte, (oc, ic))
                    take(p + name + ".dequant_scale", (np.float32, np.float16), (oc,))
                else:
                    take(p + name + ".qweight", byte, (oc, ic // 2))
                    take(p + name + ".s1_scales", half, (oc,))
                    if group == -1:
                        take(p + name + ".s1_szeros", half, (oc,))
                        continue
                    take(p + name + ".s2_scales", byte, (ic // 128, oc))
                    take(p + name + ".s2_zeros", byte, (ic // 128, oc))
                    q, s2, z2 = self.integers(p + name)
                    assert (s2 <= 127).all(), f"{p + name}: s2 is a signed byte"
                    high = q.reshape(oc, -1, 128).astype(np.int16) * s2[..., None].astype(np.int16)
                    assert (high <= 255).all(), f"{p + name}: q * s2 carries"
                    w8 = high - z2[..., None].astype(np.int16)
                    assert (w8 >= -128).all() and (w8 <= 127).all(), f"{p + name}: q * s2 - z leaves int8"
        assert not left, f"unexpected tensors {sorted(left)[:5]}"

    def compare(self, source):
        """Relative error of all projections against a float model directory."""
        floats, squared, norm = read_safetensors(os.path.join(source, "model.safetensors")), 0.0, 0.0
        for name in self.names:
            w = floats[name + ".weight"].astype(np.float64)
            squared += ((self.weight(name) - w) ** 2).sum()
            norm += (w ** 2).sum()
        return (squared / norm) ** 0.5 if norm else 0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--float", dest="source")
    parser.add_argument("--kv-scales", choices=["yes", "no"])
    a = parser.parse_args()
    model = Model(a.directory)
    model.check({"yes": True, "no": False, None: None}[a.kv_scales])
    text = f"{model.about['precision']}, group {model.about['group_size']}: {len(model.tensors)} tensors as the specification has them"
    print(text + (f", relative error {model.compare(a.source):.5f}" if a.source else ""))
    sys.exit(0)
