#!/usr/bin/env python3
"""An independent reader of what `quattuor quantize` writes (numpy only; PyPI's safetensors too where it is installed).

  oracle_checkpoint.py make DIR [float32|float16|bfloat16]   writes a small random Hugging Face model with awkward rows
  oracle_checkpoint.py check SOURCE QUANTISED               recomputes spec F.6 from the source and compares

`check` reads with oracle_reader.py, written from the text of the specification, and wants names, shapes, dtypes and bounds as there,
every code, scale and zero equal to its own arithmetic, the invariants of A.2, and everything that is not quantised equal to fp16 of
the source.
"""
import json
import os
import sys

import numpy as np

sys.dont_write_bytecode = True
from oracle_reader import PROJECTIONS, Model, natural, read_safetensors, unpack


def write_safetensors(path, tensors, dtype):
    header, blobs, at = {}, [], 0
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for name, x in tensors.items():
        x = x.astype(np.float32)
        if dtype == "bfloat16":
            bits = x.view(np.uint32)
            blob = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
        else:
            blob = x.astype(dtype).tobytes()
        header[name] = {"dtype": names[dtype], "shape": list(x.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def make(directory, dtype):
    rng = np.random.default_rng(7)
    hidden, inner, heads, kv_heads, head_dim, vocab, layers = 128, 384, 4, 2, 32, 96, 2
    config = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", hidden_size=hidden,
                  intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                  vocab_size=vocab, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True,
                  torch_dtype=dtype, a_field_nobody_knows={"kept": [1, 2.5, None]})
    shapes = dict(zip(PROJECTIONS, [(heads * head_dim, hidden), (kv_heads * head_dim, hidden), (kv_heads * head_dim, hidden),
                                    (hidden, heads * head_dim), (inner, hidden), (inner, hidden), (hidden, inner)]))
    tensors = {"model.embed_tokens.weight": rng.normal(size=(vocab, hidden)), "model.norm.weight": 1 + rng.normal(size=hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, shape in shapes.items():
            w = rng.normal(size=shape) * 0.1
            w[0] = 0                                    # nothing
            w[1] = np.abs(w[1]) + 0.05                  # only positive
            w[2] = -np.abs(w[2]) - 0.05                 # only negative
            w[3] *= 1e-5                                # scales at the bottom of fp16
            w[4, 5] = 40.0                              # one outlier
            w[5] = np.where(np.arange(shape[1]) % 2, 120.5, -119.5)  # the corners of the protective range
            w[6] = rng.integers(-1, 2, size=shape[1])   # ties
            tensors[p + name + ".weight"] = w
            if name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
                tensors[p + name + ".bias"] = rng.normal(size=shape[0])
        tensors[p + "input_layernorm.weight"] = 1 + 0.1 * rng.normal(size=hidden)
        tensors[p + "post_attention_layernorm.weight"] = 1 + 0.1 * rng.normal(size=hidden)
        tensors[p + "self_attn.rotary_emb.inv_freq"] = rng.normal(size=head_dim // 2)
    os.makedirs(directory, exist_ok=True)
    write_safetensors(os.path.join(directory, "model.safetensors"), tensors, dtype)
    files = {"config.json": json.dumps(config), "tokenizer.json": '{"model": {}}', "tokenizer_config.json": "{}",
             "generation_config.json": '{"eos_token_id": [1, 2]}', "chat_template.jinja": "{{ messages }}",
             "tokenizer.model": "\x00\x01", "README.md": "not copied", "model.safetensors.index.json": "{}"}
    for name, text in files.items():
        with open(os.path.join(directory, name), "w") as f:
            f.write(text)


f16 = np.float16
f32 = np.float32


def half_scale(x):
    s = x.astype(f16)
    s[s == 0] = 1
    return s


def check_w4(w, get):
    oc, ic = w.shape
    q = unpack(get("qweight"), oc, ic)
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    s = half_scale(high / f32(15) - low / f32(15))
    z = (-low).astype(f16)
    want = np.clip(np.rint((w + z.astype(f32)[:, None]) / s.astype(f32)[:, None]), 0, 15)
    same(get("s1_scales"), s, "s1_scales")
    same(get("s1_szeros"), z, "s1_szeros")
    same(q, want, "codes")
    assert (get("s1_szeros") >= 0).all()
    return q * s.astype(f32)[:, None] - z.astype(f32)[:, None]


def check_w4_g128(w, get):
    oc, ic = w.shape
    q = unpack(get("qweight"), oc, ic).reshape(oc, -1, 128).astype(np.int32)
    s1 = half_scale(np.abs(w).max(1) / f32(120))
    x = np.clip(w / s1.astype(f32)[:, None], -120, 120).reshape(oc, -1, 128).astype(f32)
    low, high = np.minimum(x.min(2), 0), np.maximum(x.max(2), 0)
    s2, z2 = np.maximum(np.rint((high - low) / f32(15)), 1), np.rint(-low)
    want = np.clip(np.rint((x + z2[..., None]) / s2[..., None]), 0, 15)
    same(get("s1_scales"), s1, "s1_scales")
    stored_s2, stored_z = natural(get("s2_scales")), natural(get("s2_zeros"))
    same(stored_s2, s2, "s2_scales")
    same((-stored_z) % 256, z2, "s2_zeros")
    same(q, want, "codes")
    assert (stored_s2 >= 1).all() and (stored_s2 <= 127).all() and (q * stored_s2[..., None] <= 255).all()
    exact = q * stored_s2[..., None] - z2[..., None].astype(np.int32)
    assert (exact >= -127).all() and (exact <= 127).all()
    w8 = ((q * stored_s2[..., None] + stored_z[..., None]) % 256).astype(np.uint8).view(np.int8)  # what the kernels do
    assert (w8 == exact).all()
    return w8.reshape(oc, ic).astype(f32) * s1.astype(f32)[:, None]


def check_w8(w, get):
    s = half_scale(np.abs(w).max(1) / f32(127))
    scale = get("dequant_scale")
    assert scale.dtype == np.float32
    same(scale, s.astype(f32), "dequant_scale")
    q = get("weight")
    assert q.dtype == np.int8
    same(q, np.clip(np.rint(w / s.astype(f32)[:, None]), -127, 127), "codes")
    return q.astype(f32) * scale[:, None]


def same(got, want, what):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    bad = np.argwhere(got.astype(np.float64) != want.astype(np.float64))
    assert len(bad) == 0, f"{what}: {len(bad)} differ, first at {bad[0]}: {got[tuple(bad[0])]}, expected {want[tuple(bad[0])]}"


def check(source_dir, out_dir):
    source = read_safetensors(os.path.join(source_dir, "model.safetensors"))
    out = read_safetensors(os.path.join(out_dir, "model.safetensors"))
    try:
        from safetensors import safe_open
        with safe_open(os.path.join(out_dir, "model.safetensors"), framework="numpy") as f:
            assert set(f.keys()) == set(out)
            for name in f.keys():
                assert (f.get_tensor(name) == out[name]).all(), name
    except ImportError:
        print("(PyPI's safetensors is not installed: read with numpy alone)")
    Model(out_dir).check(kv_scales=False)
    config = json.load(open(os.path.join(source_dir, "config.json")))
    got = json.load(open(os.path.join(out_dir, "config.json")))
    about = got.pop("quantization_config")
    config.pop("quantization_config", None)
    assert got == config, "config.json lost or changed a field"
    assert about["quant_method"] == "qoq"
    bits, group = about["wbits"], about["group_size"]
    for name in os.listdir(source_dir):
        kept = (name.endswith((".json", ".jinja")) and not name.endswith(".index.json")) or name == "tokenizer.model"
        assert os.path.exists(os.path.join(out_dir, name)) == (kept or name == "model.safetensors"), name
        if kept and name != "config.json":
            a, b = (open(os.path.join(d, name), "rb").read() for d in (source_dir, out_dir))
            assert a == b, name
    used, squared, norm = set(), 0.0, 0.0

    def take(prefix):
        def get(suffix):
            used.add(f"{prefix}.{suffix}")
            return out[f"{prefix}.{suffix}"]
        return get

    def plain(name, want):
        used.add(name)
        assert out[name].dtype == np.float16, name
        same(out[name], want.astype(f32).astype(f16), name)

    head = source.get("lm_head.weight", source["model.embed_tokens.weight"])
    for name, w, width in (("model.embed_tokens", source["model.embed_tokens.weight"], about["embed_bits"]),
                           ("lm_head", head, about["head_bits"])):
        if width == 8:
            check_w8(w.astype(f32), take(name))
        else:
            plain(name + ".weight", w)
    plain("model.norm.weight", source["model.norm.weight"])
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        plain(p + "input_layernorm.weight", source[p + "input_layernorm.weight"])
        plain(p + "post_attention_layernorm.weight", source[p + "post_attention_layernorm.weight"])
        for name in PROJECTIONS:
            w = source[p + name + ".weight"].astype(f32)
            if p + name + ".bias" in source:
                plain(p + name + ".bias", source[p + name + ".bias"])
            if bits == 16:
                plain(p + name + ".weight", w)
                continue
            checker = check_w8 if bits == 8 else check_w4 if group == -1 else check_w4_g128
            try:
                approx = checker(w, take(p + name))
            except AssertionError as e:
                raise AssertionError(f"{p + name}: {e}") from None
            squared += float(((w - approx).astype(np.float64) ** 2).sum())
            norm += float((w.astype(np.float64) ** 2).sum())
    assert used == set(out), f"unexpected tensors: {sorted(set(out) - used)[:5]}"
    print(f"{about['precision']} group {group}: {len(out)} tensors agree, relative error {(squared / norm) ** 0.5 if norm else 0:.5f}")


if sys.argv[1] == "make":
    make(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "bfloat16")
else:
    check(sys.argv[2], sys.argv[3])
