#!/usr/bin/env python3
"""Checkpoints of other quantisers, made from known integers (numpy only), and what `quattuor convert` must make of them.

  make_import.py vectors FILE          tests/golden/import/vectors.safetensors: one small matrix of each variant with its integers
  make_import.py make DIR VARIANT …    DIR/VARIANT as that quantiser writes it, DIR/VARIANT.expected: what has to come of it.
                                       VARIANT:HOW makes DIR/VARIANT:HOW, with one fault of SPOILS
  make_import.py check DIR OUT …       OUT holds exactly that (pairs); where it cannot, the weights are as near as any choice of
                                       s1 and the old codes come
  make_import.py acts DIR              DIR/FORM/acts.pt in each form that is known, DIR/scales.json: what each holds; prints the forms
  make_import.py list                  names of the variants

Quantisation and the way back follow the text of the specification: F.6 (formulas), A.5.1 (files), A.2 - A.4 (the result). GPTQ
and AWQ are packed here from their published layouts (src/quant/int4.h tells them).
"""
import json
import os
import struct
import sys
import zipfile

import numpy as np

f16, f32, f64 = np.float16, np.float32, np.float64
HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 256, 384, 4, 2, 64, 48, 2
PROJECTIONS = {"self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
               "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
               "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}


# ---- files ----------------------------------------------------------------------------------------------------------------

SAFE = {"float16": "F16", "float32": "F32", "int8": "I8", "uint8": "U8", "int32": "I32"}
STORAGE = {"float16": "Half", "float32": "Float", "int8": "Char", "uint8": "Byte", "int32": "Int", "int64": "Long"}


def write_safetensors(path, tensors):
    header, blobs, at = {}, [], 0
    for name, x in tensors.items():
        blob = np.ascontiguousarray(x).tobytes()
        header[name] = {"dtype": SAFE[x.dtype.name], "shape": list(x.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_torch(path, tensors):
    """What torch.save makes of a dictionary: a zip of stored entries, a pickle in protocol 2 and raw storages. Values are arrays,
    floats, None, and dictionaries, lists and tuples of these."""
    def integer(x):
        return b"J" + struct.pack("<i", x)

    def text(x):
        return b"X" + struct.pack("<I", len(x)) + x.encode()

    def value(x):
        if x is None:
            return [b"N"]
        if isinstance(x, float):
            return [b"G", struct.pack(">d", x)]
        if isinstance(x, dict):
            return [b"}", *(part for k, v in x.items() for part in (text(k), *value(v), b"s"))]
        if isinstance(x, (list, tuple)):
            begin, end = (b"](", b"e") if isinstance(x, list) else (b"(", b"t")
            return [begin, *(part for v in x for part in value(v)), end]
        strides = [int(np.prod(x.shape[i + 1:])) for i in range(x.ndim)]
        blobs.append(np.ascontiguousarray(x).tobytes())
        return [b"ctorch._utils\n_rebuild_tensor_v2\n((", text("storage"),
                b"ctorch\n" + STORAGE[x.dtype.name].encode() + b"Storage\n", text(str(len(blobs) - 1)), text("cpu"), integer(x.size),
                b"tQ", integer(0), b"(", *map(integer, x.shape), b"t(", *map(integer, strides),
                b"t\x89ccollections\nOrderedDict\n)RtR"]

    blobs = []
    out = [b"\x80\x02", *value(tensors), b"."]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr("archive/data.pkl", b"".join(out))
        z.writestr("archive/byteorder", "little")
        for i, blob in enumerate(blobs):
            z.writestr(f"archive/data/{i}", blob)
        z.writestr("archive/version", "3\n")


# ---- QServe's layout (A.2 - A.4) ----------------------------------------------------------------------------------------------


def pack_w4(q):
    """codes [oc][ic] -> qweight int8 [oc][ic/2], A.3."""
    oc, ic = q.shape
    r, k = np.meshgrid(np.arange(oc), np.arange(ic), indexing="ij")
    off = (r // 32 * (ic // 32) + k // 32) * 512 + ((r % 8) * 4 + k // 4 % 4) * 16 + k // 16 % 2 * 8 + r // 8 % 2 * 4 + k % 4
    out = np.zeros(oc * ic // 2, np.uint8)
    low = r // 16 % 2 == 0
    out[off[low]] |= q[low].astype(np.uint8)
    out[off[~low]] |= q[~low].astype(np.uint8) << 4
    return out.view(np.int8).reshape(oc, ic // 2)


def disk_s2(x, order="qserve"):
    """[oc][groups] -> [groups][oc] in the order of A.4.2, or in DeepCompressor's of A.4.3."""
    r = np.arange(x.shape[0])
    at = 32 * (r // 32) + (4 * (r % 8) + r // 8 % 4 if order == "qserve" else 16 * (r // 16 % 2) + 2 * (r % 8) + r // 8 % 2)
    out = np.empty_like(x)
    out[at] = x
    return np.ascontiguousarray(out.T).astype(np.uint8).view(np.int8)


def qserve(name, e, order="qserve"):
    """The tensors of one projection from its integers."""
    if "w8" in e:
        return {name + ".weight": e["w8"].astype(np.int8), name + ".dequant_scale": e["s"].astype(f32)}
    out = {name + ".qweight": pack_w4(e["q"]), name + ".s1_scales": e["s"].astype(f16)}
    if "s2" in e:
        out[name + ".s2_scales"] = disk_s2(e["s2"], order)
        out[name + ".s2_zeros"] = disk_s2((-e["z2"]) % 256, order)
    else:
        out[name + ".s1_szeros"] = e["szero"].astype(f16)
    return out


# ---- quantisers (F.6): float weights -> (fake weights, tensors of scale.pt, integers of the result) --------------------------


def half_scale(x):
    s = x.astype(f16)
    s[s == 0] = 1
    return s.astype(f64)


def ranges(w, axis, clamp):
    low, high = w.min(axis), w.max(axis)
    return (np.minimum(low, 0), np.maximum(high, 0)) if clamp else (low, high)


def channel_prescale(w, signed):
    """PreScale: q - z times s. signed: LMQuant's zint4, else DeepCompressor's uint4."""
    floor = -8 if signed else 0
    low, high = ranges(w, 1, True)
    s = half_scale((high - low) / 15)
    z = np.clip(np.rint(floor - low / s), floor, floor + 15)
    q = np.clip(np.rint(w / s[:, None]) + z[:, None], floor, floor + 15)
    fake = ((q - z[:, None]) * s[:, None]).astype(f16)
    up = 8 if signed else 0
    scale = {".weight.scale.0": s.astype(f16).reshape(-1, 1, 1, 1), ".weight.zero": z.astype(np.int8).reshape(-1, 1, 1, 1)}
    return fake, scale, {"q": q + up, "s": s, "szero": ((z + up) * s)}


def channel_symmetric(w):
    """Signed codes without any zero: scale.pt holds None."""
    s = half_scale(np.abs(w).max(1) / 7)
    q = np.clip(np.rint(w / s[:, None]), -8, 7)
    scale = {".weight.scale.0": s.astype(f16).reshape(-1, 1, 1, 1), ".weight.zero": None}
    return (q * s[:, None]).astype(f16), scale, {"q": q + 8, "s": s, "szero": 8 * s}


def channel_postscale(w, half_arithmetic):
    """PostScale: q * s - z with z in fp16. half_arithmetic: the product is rounded, too, as fp16 tensors do it."""
    low, high = ranges(w, 1, False)
    s = half_scale((high - low) / 15)
    z = (-low).astype(f16).astype(f64)
    q = np.clip(np.rint((w + z[:, None]) / s[:, None]), 0, 15)
    product = q * s[:, None]
    if half_arithmetic:
        product = product.astype(f16).astype(f64)
    scale = {".weight.scale.0": s.astype(f32).reshape(-1, 1, 1, 1), ".weight.scaled_zero": z.astype(f16).reshape(-1, 1, 1, 1)}
    return (product - z[:, None]).astype(f16), scale, {"q": q, "s": s, "szero": z}


def channel_postscale_signed(w):
    """PostScale with codes -8 ... 7: 8 is added to them and 8 s to the zero (A.5.3)."""
    low, high = ranges(w, 1, False)
    s = half_scale((high - low) / 15)
    z = (-8 * s - low).astype(f16).astype(f64)
    q = np.clip(np.rint((w + z[:, None]) / s[:, None]), -8, 7)
    scale = {".weight.scale.0": s.astype(f16).reshape(-1, 1, 1, 1), ".weight.scaled_zero": z.astype(f16).reshape(-1, 1, 1, 1)}
    return (q * s[:, None] - z[:, None]).astype(f16), scale, {"q": q + 8, "s": s, "szero": z + 8 * s}


def group_levels(w, protect):
    oc, ic = w.shape
    s1 = half_scale(np.abs(w).max(1) / protect)
    x = np.clip(w / s1[:, None], -protect, protect).reshape(oc, ic // 128, 128)
    low, high = ranges(x, 2, True)
    return s1, x, low, high, np.clip(np.rint((high - low) / 15), 1, 127)


def group_result(w, s1, s2, w8, zero, stored_q, z2):
    oc, ic = w.shape
    fake = (w8.reshape(oc, ic) * s1[:, None]).astype(f16)
    scale = {".weight.scale.0": s1.astype(f16).reshape(-1, 1, 1, 1), ".weight.scale.1": s2.reshape(oc, 1, ic // 128, 1).astype(f32)}
    for name, z in zero.items():
        scale[".weight." + name] = None if z is None else z.reshape(oc, 1, ic // 128, 1)
    return fake, scale, {"q": stored_q.reshape(oc, ic), "s": s1, "s2": s2, "z2": z2}


def group_prescale(w, signed):
    floor = -8 if signed else 0
    s1, x, low, _, s2 = group_levels(w, 119)
    z = np.clip(np.rint(floor - low / s2), floor, floor + 15)
    q = np.clip(np.rint(x / s2[..., None]) + z[..., None], floor, floor + 15)
    up = 8 if signed else 0
    return group_result(w, s1, s2, (q - z[..., None]) * s2[..., None], {"zero": z.astype(np.int8)}, q + up, (z + up) * s2)


def group_postscale(w):
    s1, x, low, _, s2 = group_levels(w, 120)
    z = np.rint(-low)
    q = np.clip(np.rint((x + z[..., None]) / s2[..., None]), 0, 15)
    return group_result(w, s1, s2, q * s2[..., None] - z[..., None], {"scaled_zero": z.astype(f16)}, q, z)


def group_symmetric(w):
    """Signed codes, all zeros None: 8 is added to the codes and 8 s2 is the zero."""
    s1, x, low, high, _ = group_levels(w, 112)
    s2 = np.clip(np.rint(np.maximum(-low, high) / 7), 1, 16)
    q = np.clip(np.rint(x / s2[..., None]), -7, 7)
    return group_result(w, s1, s2, q * s2[..., None], {"scaled_zero": None}, q + 8, 8 * s2)


def byte(w):
    s = half_scale(np.abs(w).max(1) / 127)
    q = np.clip(np.rint(w / s[:, None]), -127, 127)
    scale = {".weight.scale.0": s.astype(f16).reshape(-1, 1, 1, 1), ".weight.zero": np.zeros((len(w), 1, 1, 1), np.int8)}
    return (q * s[:, None]).astype(f16), scale, {"w8": q, "s": s}


FAKE = {"lmquant-channel": lambda w: channel_prescale(w, True), "prescale-channel": lambda w: channel_prescale(w, False),
        "symmetric-channel": channel_symmetric, "postscale-channel": lambda w: channel_postscale(w, False),
        "postscale-channel-half": lambda w: channel_postscale(w, True), "postscale-channel-signed": channel_postscale_signed,
        "lmquant-g128": lambda w: group_prescale(w, True), "prescale-g128": lambda w: group_prescale(w, False),
        "postscale-g128": group_postscale, "symmetric-g128": group_symmetric, "w8": byte}


# ---- GPTQ and AWQ ---------------------------------------------------------------------------------------------------------------


def int4_groups(w, group, rng, exact):
    """Codes, zeros and scales in groups of input columns. exact: the scales of a row are whole multiples of one number."""
    oc, ic = w.shape
    x = w.reshape(oc, ic // group, group)
    low, high = ranges(x, 2, True)
    scale = half_scale((high - low) / 15)
    if exact and group == 128:
        unit = 2.0 ** np.floor(np.log2(scale.max(1) / 8) - 5)  # six bits, times at most 8: fp16 holds it
        unit = np.maximum(np.rint(scale.max(1) / 8 / unit) * unit, 2.0 ** -24)
        scale = np.clip(np.rint(scale / unit[:, None]), 2, 8) * unit[:, None]  # 15 * 8 fits int8 whatever the zero
        assert (scale.astype(f16) == scale).all()
    z = np.clip(np.rint(-low / scale), 1, 15)
    q = np.clip(np.rint(x / scale[..., None]) + z[..., None], 0, 15)
    if exact and group != 128:  # z * s in fp16: few bits in s
        scale = (scale.astype(f32).view(np.uint32) & 0xFFFE0000).view(f32).astype(f64)
    return q.reshape(oc, ic), z, scale


def pack_words(x, order):
    """[..., 8 n] nibbles -> [..., n] int32, nibble i from position order[i] of each eight."""
    x = x.astype(np.uint32).reshape(*x.shape[:-1], -1, 8)
    out = np.zeros(x.shape[:-1], np.uint32)
    for i, k in enumerate(order):
        out |= x[..., k] << np.uint32(4 * i)
    return out.view(np.int32)


def gptq(q, z, scale, g_idx, plus):
    natural = range(8)
    return {".qweight": np.ascontiguousarray(pack_words(q, natural).T), ".qzeros": pack_words(z.T - plus, natural),
            ".scales": np.ascontiguousarray(scale.T).astype(f16), ".g_idx": g_idx.astype(np.int32)}


def awq(q, z, scale):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {".qweight": pack_words(np.ascontiguousarray(q.T), order), ".qzeros": pack_words(np.ascontiguousarray(z.T), order),
            ".scales": np.ascontiguousarray(scale.T).astype(f16)}


def best_s2(q, z, scale):
    """Every fp16 s1 of the range that could serve, and the s2 that fit it: the least squared error there is, with its s1.
    Slow and plain on purpose."""
    oc, groups = scale.shape
    x = q.reshape(oc, groups, 128)
    energy = ((x - z[..., None]) ** 2).sum(2)
    high, low = x.max(2), x.min(2)
    limit = np.minimum(127, np.floor(255 / np.maximum(high, 1)))
    limit = np.minimum(limit, np.where(z > 0, np.floor(255 / np.maximum(z, 1)), 127))
    limit = np.minimum(limit, np.where(high > z, np.floor(127 / np.maximum(high - z, 1)), 127))
    limit = np.minimum(limit, np.where(z > low, np.floor(128 / np.maximum(z - low, 1)), 127))
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(f16).astype(f64)
    cost = np.empty(oc)
    for r in range(oc):
        s1 = halves[(halves > scale[r].max() / 160) & (halves < scale[r].max() * 1.1)]
        s2 = np.minimum(np.rint(scale[r] / s1[:, None]), limit[r])
        cost[r] = (energy[r] * (s2 * s1[:, None] - scale[r]) ** 2).sum(1).min()
    return cost


# ---- whole models -------------------------------------------------------------------------------------------------------------


def awkward(rng, shape):
    w = rng.normal(size=shape) * 0.1
    w[0] = 0                                     # nothing
    w[1] = np.abs(w[1]) + 0.05                   # only positive
    w[2] = -np.abs(w[2]) - 0.05                  # only negative
    w[3] *= 3e-3                                 # small: fp16 subnormals among the scales
    w[4, 5] = 8.0                                # one outlier
    return w.astype(f32).astype(f64)


CONFIG = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=HIDDEN,
              intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
              vocab_size=VOCAB, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, torch_dtype="float16")
INT4 = {  # method, format, group, exact, desc_act, settings file
    "gptq-exact": ("gptq", "gptq", 128, True, "no", "config.json"), "gptq": ("gptq", "gptq", 128, False, "no", "quantize_config.json"),
    "gptq-v2": ("gptq", "gptq_v2", 128, True, "no", "config.json"), "gptq-plain": ("gptq", "gptq", 0, True, "no", None),
    "gptq-channel": ("gptq", "gptq", -1, True, "no", "config.json"), "gptq-act-down": ("gptq", "gptq", 128, True, "down", "config.json"),
    "gptq-act-all": ("gptq", "gptq", 128, True, "all", "config.json"),
    "awq-exact": ("awq", "gemm", 128, True, "no", "config.json"), "awq": ("awq", "GEMM", 128, False, "no", "quant_config.json"),
    "awq-plain": ("awq", "", 0, True, "no", None)}
QSERVE = {"qserve-channel": "lmquant-channel", "qserve-g128": "postscale-g128", "qserve-w8": "w8",
          "qserve-deepcompressor": "lmquant-g128", "qserve-safetensors": "prescale-g128"}


K1 = "model.layers.1.self_attn.k_proj"
SPOILS = {  # name -> what it does to (tensors, scale.pt, quantization_config)
    "off-grid": lambda t, s, q: t[K1 + ".weight"].__setitem__((7, 9), t[K1 + ".weight"][7, 9] + f16(0.4) * s[K1 + ".weight.scale.0"][7, 0, 0, 0]),
    "no-scale": lambda t, s, q: s.pop(K1 + ".weight.scale.0"),
    "scale-shape": lambda t, s, q: s.update({K1 + ".weight.scale.0": np.ones((1, 1, 1, 1), f16)}),
    "scale-zero": lambda t, s, q: s[K1 + ".weight.scale.0"].__setitem__((5, 0, 0, 0), 0),
    "extra-scale": lambda t, s, q: s.update({"model.layers.2.mlp.up_proj.weight.scale.0": np.ones((8, 1, 1, 1), f16)}),
    "mixed-levels": lambda t, s, q: s.pop(K1 + ".weight.scale.1"),
    "no-weight": lambda t, s, q: t.pop(K1 + ".weight"),
    "no-tensor": lambda t, s, q: t.pop(K1 + ".qzeros"),
    "extra-tensor": lambda t, s, q: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8, f16)}),
    "shape": lambda t, s, q: t.update({K1 + ".scales": t[K1 + ".scales"][:, :-8]}),
    "type": lambda t, s, q: t.update({K1 + ".qweight": t[K1 + ".qweight"].view(f32)}),
    "negative": lambda t, s, q: t[K1 + ".scales"].__setitem__((0, 3), -1),
    "infinite": lambda t, s, q: t[K1 + ".scales"].__setitem__((0, 3), np.inf),
    "group-index": lambda t, s, q: t[K1 + ".g_idx"].__setitem__(5, 77),
    "bits": lambda t, s, q: q.update(bits=8), "group": lambda t, s, q: q.update(group_size=64),
    "method": lambda t, s, q: q.update(quant_method="bitsandbytes"), "format": lambda t, s, q: q.update(checkpoint_format="marlin"),
    "other": lambda t, s, q: q.update(quant_method="awq"), "nonsense": lambda t, s, q: q.update(bits="four")}


def make(directory, variant, spoil=None):
    rng = np.random.default_rng(sum(variant.encode()))
    os.makedirs(directory, exist_ok=True)
    source, expected = {}, {}

    def same(name, x):
        source[name] = expected[name] = x.astype(f16)

    same("model.embed_tokens.weight", rng.normal(size=(VOCAB, HIDDEN)))
    same("model.norm.weight", 1 + 0.1 * rng.normal(size=HIDDEN))
    same("lm_head.weight", rng.normal(size=(VOCAB, HIDDEN)))
    config, scales, moved = dict(CONFIG), {}, {}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        same(p + "input_layernorm.weight", 1 + 0.1 * rng.normal(size=HIDDEN))
        same(p + "post_attention_layernorm.weight", 1 + 0.1 * rng.normal(size=HIDDEN))
        same(p + "self_attn.q_proj.bias", rng.normal(size=HEADS * HEAD_DIM))
        same(p + "mlp.up_proj.bias", rng.normal(size=INNER))
        source[p + "self_attn.rotary_emb.inv_freq"] = rng.normal(size=HEAD_DIM // 2).astype(f32)
        if variant in QSERVE:
            k, v = rng.uniform(0.01, 0.1, 2)
            source[p + "self_attn.kv_scale_quant_orig"] = expected[p + "self_attn.kv_scale_quant_orig"] = np.array([k, v], f32)
        down_order = None
        if variant in INT4 and INT4[variant][4] != "no":
            down_order = rng.permutation(INNER)  # place in the order of groups -> input
        for name, shape in PROJECTIONS.items():
            w = awkward(rng, shape)
            if variant in FAKE or variant in QSERVE:
                fake, scale, e = FAKE[QSERVE.get(variant, variant)](w)
                expected.update(qserve(p + name, e))
                if variant in QSERVE:
                    source.update(qserve(p + name, e, "deepcompressor" if "deepcompressor" in variant else "qserve"))
                else:
                    source[p + name + ".weight"] = fake
                    scales.update({p + name + k: v for k, v in scale.items()})
                continue
            method, form, group, exact, act, _ = INT4[variant]
            size = shape[1] if group == -1 else 128
            q, z, s = int4_groups(w, size, rng, exact)
            g_idx, order = np.arange(shape[1]) // size, None
            if act == "all" or (act == "down" and name == "mlp.down_proj"):
                order = down_order if name == "mlp.down_proj" else rng.permutation(shape[1])
                g_idx = np.empty(shape[1], int)
                g_idx[order] = np.arange(shape[1]) // size
                natural = np.empty_like(q)
                natural[:, order] = q  # the file holds inputs in their own order, groups wherever
                packed = natural
            else:
                packed = q
            if method == "gptq":
                source.update({p + name + k: v for k, v in gptq(packed, z, s, g_idx, 0 if form == "gptq_v2" else 1).items()})
                if variant == "gptq-plain":
                    del source[p + name + ".g_idx"]
            else:
                source.update({p + name + k: v for k, v in awq(packed, z, s).items()})
            if variant == "gptq-plain" and name not in ("self_attn.q_proj", "mlp.up_proj"):  # as AutoGPTQ does
                source[p + name + ".bias"] = np.zeros(shape[0], f16)
            if down_order is not None:
                stable = np.argsort(g_of(down_order), kind="stable")
                if name in ("mlp.gate_proj", "mlp.up_proj"):
                    q, z, s, packed = q[stable], z[stable], s[stable], packed[stable]
                    if name == "mlp.up_proj":
                        expected[p + name + ".bias"] = expected[p + name + ".bias"][stable]
                if name == "mlp.down_proj":
                    q = packed[:, stable]
            full = p + name
            if order is not None and name != "mlp.down_proj":  # rounded anew: nothing exact to expect
                moved[full] = "rounded"
                expected[full + ".float"] = ((packed - np.take_along_axis(z, g_idx[None].repeat(len(q), 0), 1)) *
                                             np.take_along_axis(s, g_idx[None].repeat(len(q), 0), 1)).astype(f32)
            elif size != 128 or shape[1] == 128 and group == -1:
                expected.update(qserve(full, {"q": q, "s": s[:, 0], "szero": (z * s)[:, 0]}))
            else:
                expected.update({full + ".codes": q.astype(np.uint8), full + ".zero": z.astype(np.uint8), full + ".group": s.astype(f32)})
                moved[full] = "exact" if exact else "moved"
    if variant in INT4 and INT4[variant][5]:
        method, form, group, _, act, file = INT4[variant]
        settings = dict(quant_method=method, bits=4, group_size=group, sym=False)
        if method == "gptq":
            settings.update(desc_act=act != "no", checkpoint_format=form)
        else:
            settings.update(zero_point=True, version=form)
        if spoil:
            SPOILS[spoil](source, scales, settings)
        if file == "config.json":
            config["quantization_config"] = settings
        else:
            if file == "quant_config.json":
                settings = dict(w_bit=4, q_group_size=group, zero_point=True, version=form)
            settings.pop("quant_method", None)
            json.dump(settings, open(os.path.join(directory, file), "w"))
    elif spoil:
        SPOILS[spoil](source, scales, {})
    json.dump(config, open(os.path.join(directory, "config.json"), "w"))
    json.dump({"model": {}}, open(os.path.join(directory, "tokenizer.json"), "w"))
    path = os.path.join(directory, "model.safetensors")
    if variant in FAKE:
        write_torch(os.path.join(directory, "model.pt"), source)
        write_torch(os.path.join(directory, "scale.pt"), scales)
    elif variant in QSERVE and variant != "qserve-safetensors":
        write_torch(os.path.join(directory, "quant_model.pt" if "deepcompressor" in variant else "pytorch_model.bin"), source)
    else:
        write_safetensors(path, source)
    os.makedirs(directory + ".expected", exist_ok=True)
    write_safetensors(os.path.join(directory + ".expected", "expected.safetensors"), expected)
    json.dump(moved, open(os.path.join(directory + ".expected", "moved.json"), "w"))


def g_of(order):
    g = np.empty(len(order), int)
    g[order] = np.arange(len(order)) // 128
    return g


def check(directory, out):
    sys.dont_write_bytecode = True
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))
    import oracle_reader
    model = oracle_reader.Model(out)
    model.check()
    expected = oracle_reader.read_safetensors(os.path.join(directory + ".expected", "expected.safetensors"))
    moved = json.load(open(os.path.join(directory + ".expected", "moved.json")))
    used, n_exact, n_moved, n_rounded, n_changed, worst = set(), 0, 0, 0, 0, 0.0
    for name, x in expected.items():
        if name.rsplit(".", 1)[0] in moved and name.rsplit(".", 1)[1] in ("codes", "zero", "group", "float"):
            continue
        used.add(name)
        got = model.tensors[name]
        assert got.dtype == x.dtype and got.shape == x.shape, f"{name}: {got.dtype} {got.shape}, expected {x.dtype} {x.shape}"
        assert (got == x).all(), f"{name}: {np.count_nonzero(got != x)} differ"
    for name, how in moved.items():
        q, s2, z2 = model.integers(name)
        s1 = model.tensors[name + ".s1_scales"].astype(f64)
        used |= {name + suffix for suffix in (".qweight", ".s1_scales", ".s2_scales", ".s2_zeros")}
        if how == "rounded":
            want = expected[name + ".float"].astype(f64)
            d = np.linalg.norm(model.weight(name) - want) / np.linalg.norm(want)
            assert 0 < d < 0.2, f"{name}: {d}"
            n_rounded += 1
            continue
        want_q, want_z = expected[name + ".codes"], expected[name + ".zero"].astype(f64)
        want_s = expected[name + ".group"].astype(f64)
        kept = (q == want_q).reshape(len(q), -1, 128).all(2) & (z2 == want_z * s2)
        x = want_q.reshape(len(q), -1, 128) - want_z[..., None]
        energy = (x ** 2).sum(2)
        assert kept[(s2 > 5) & (energy > 0)].all(), f"{name}: codes changed"
        n_changed += np.count_nonzero(~kept)
        cost = ((model.weight(name) - (x * want_s[..., None]).reshape(q.shape)) ** 2).sum(1)
        if how == "exact":
            assert (cost == 0).all(), f"{name}: {np.count_nonzero(cost)} rows moved"
            n_exact += 1
        else:
            best = best_s2(want_q.astype(f64), want_z, want_s)
            assert (cost <= best * 1.001 + 1e-12 * (energy * want_s ** 2).sum(1)).all(), \
                f"{name}: row {np.argmax(cost - best)}: {cost[np.argmax(cost - best)]} against {best[np.argmax(cost - best)]}"
            worst = max(worst, (cost.sum() / (energy * want_s ** 2).sum()) ** 0.5)
            n_moved += 1
    assert used == set(model.tensors), f"unexpected: {sorted(set(model.tensors) - used)[:4]}"
    about = json.load(open(os.path.join(out, "config.json")))["quantization_config"]
    assert about["quant_method"] == "qoq" and about["producer"] == "quattuor"
    for stale in ("quantize_config.json", "quant_config.json"):
        assert not os.path.exists(os.path.join(out, stale)), f"{stale} came along"
    detail = f": {n_exact} matrices exact, {n_moved} with scales moved (by {worst:.4f} at most, codes of " \
             f"{n_changed} groups), {n_rounded} rounded"
    print(f"{len(used)} tensors as expected" + (detail if moved else ""))


def acts(folder):
    """A.2.5: the ranges of keys and values as LMQuant and DeepCompressor keep them, beside those of other activations."""
    rng = np.random.default_rng(5)
    k, v = (rng.uniform(1, 60, LAYERS).astype(f32) for _ in range(2))
    forms = {"lmquant": lambda x: {"dynamic_range.0.max": np.array([[x]], f32), "dynamic_range.0.min": None},
             "deepcompressor": lambda x: {"dynamic_range": [{"min": None, "max": np.array(x, f32)}], "scale": None},
             "tuple": lambda x: {"dynamic_range": ({"min": np.array(-x, f32), "max": np.array(x / 2, f32), "ratio": 1.0},)},
             "single": lambda x: {"dynamic_range": {"max": float(x)}},
             "channels": lambda x: {"dynamic_range": [{"max": np.array([[x / 3, x, x / 2]], f32)}]}}
    for name, form in forms.items():
        os.makedirs(os.path.join(folder, name))
        ranges = {f"model.layers.{i}.{at}": form(x) for i in range(LAYERS) for at, x in (
            ("self_attn.k_rotary_emb.output", k[i]), ("self_attn.v_proj.output", v[i]), ("mlp.down_proj.input", f32(7)))}
        write_torch(os.path.join(folder, name, "acts.pt"), ranges)
    scale = lambda x: {str(i): float(x[i] / f32(127)) for i in range(LAYERS)}
    with open(os.path.join(folder, "scales.json"), "w") as f:
        json.dump({"kv_cache": {"dtype": "int8", "scaling_factor": {"k_scale": scale(k), "v_scale": scale(v)}}}, f)
    print(" ".join(forms))


def vectors(path):
    rng, out = np.random.default_rng(11), {}
    for variant, quantise in FAKE.items():
        w = awkward(rng, (32, 256 if "g128" in variant else 64))
        fake, scale, e = quantise(w)
        out[variant + ".w"] = fake
        out.update({variant + k.replace(".weight", ""): v for k, v in scale.items() if v is not None})
        if "w8" in e:
            out.update({variant + ".codes": e["w8"].astype(np.int8)})
            continue
        out.update({variant + ".codes": e["q"].astype(np.uint8), variant + ".s1_scales": e["s"].astype(f16)})
        if "s2" in e:
            out.update({variant + ".s2": e["s2"].astype(np.uint8), variant + ".z2": e["z2"].astype(np.uint8)})
        else:
            out[variant + ".s1_szeros"] = e["szero"].astype(f16)
    q, z, s = int4_groups(awkward(rng, (32, 256)), 128, rng, False)
    out.update({"int4.codes": q.astype(np.uint8), "int4.zero": z.astype(np.uint8), "int4.cost": best_s2(q, z, s)[:, None].astype(f32)})
    out.update({"gptq" + k: v for k, v in gptq(q, z, s, np.arange(256) // 128, 1).items()})
    out.update({"awq" + k: v for k, v in awq(q, z, s).items()})
    write_safetensors(path, out)
    print(f"{path}: {os.path.getsize(path)} bytes")


if __name__ == "__main__":
    if sys.argv[1] == "vectors":
        vectors(sys.argv[2])
    elif sys.argv[1] == "make":
        for name in sys.argv[3:]:
            make(os.path.join(sys.argv[2], name), *name.split(":"))
    elif sys.argv[1] == "check":
        for source, result in zip(sys.argv[2::2], sys.argv[3::2]):
            print(os.path.basename(result), end=": ", flush=True)
            check(source, result)
    elif sys.argv[1] == "acts":
        acts(sys.argv[2])
    else:
        print("\n".join([*FAKE, *QSERVE, *INT4]))
