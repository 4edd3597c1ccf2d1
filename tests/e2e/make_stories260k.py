#!/usr/bin/env python3
"""Converts llama2.c's stories260K.bin and tok512.bin to a Hugging Face directory (fp32 safetensors, SentencePiece model).

usage: make_stories260k.py STORIES_BIN TOKENIZER_BIN OUTPUT_DIR
llama2.c rotates neighbouring pairs, Hugging Face the two halves: the rows of q and k are reordered accordingly.
"""
import json
import os
import struct
import sys

import numpy as np


def varint(n):
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number, wire, payload):
    head = varint(number << 3 | wire)
    return head + (varint(len(payload)) + payload if wire == 2 else payload)


def sentencepiece(path, n_vocab):
    """tok512.bin: int32 longest, then n times (float score, int32 length, bytes)."""
    data = open(path, "rb").read()
    at, out = 4, b""
    for i in range(n_vocab):
        score, length = struct.unpack_from("<fi", data, at)
        piece = data[at + 8 : at + 8 + length]
        at += 8 + length
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        if i < 3:
            piece = [b"<unk>", b"<s>", b"</s>"][i]
        elif i < 259:
            piece = b"<0x%02X>" % (i - 3)
        else:
            piece = piece.replace(b" ", "\u2581".encode())
        body = field(1, 2, piece) + field(2, 5, struct.pack("<f", score)) + field(3, 0, varint(kind))
        out += field(1, 2, body)
    trainer = field(3, 0, varint(2)) + field(35, 0, varint(1)) + field(40, 0, varint(0)) + field(41, 0, varint(1)) + field(42, 0, varint(2))
    normalizer = field(1, 2, b"identity") + field(3, 0, varint(1)) + field(4, 0, varint(0)) + field(5, 0, varint(1))
    return out + field(2, 2, trainer) + field(3, 2, normalizer)


def main():
    stories, tokenizer, output = sys.argv[1:4]
    raw = open(stories, "rb").read()
    dim, hidden, layers, heads, kv_heads, vocab, seq = struct.unpack_from("<7i", raw)
    shared, vocab = vocab > 0, abs(vocab)
    data, at = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape):
        nonlocal at
        n = int(np.prod(shape))
        at += n
        return data[at - n : at].reshape(shape)

    d = dim // heads
    kv = kv_heads * d
    halves = lambda w, n: w.reshape(n, d // 2, 2, dim).transpose(0, 2, 1, 3).reshape(n * d, dim)
    embed = take(vocab, dim)
    att_norm, wq, wk = take(layers, dim), take(layers, dim, dim), take(layers, kv, dim)
    wv, wo, ffn_norm = take(layers, kv, dim), take(layers, dim, dim), take(layers, dim)
    w1, w2, w3, norm = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim), take(dim)
    tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": norm}
    for i in range(layers):
        p = f"model.layers.{i}."
        tensors |= {
            p + "input_layernorm.weight": att_norm[i],
            p + "post_attention_layernorm.weight": ffn_norm[i],
            p + "self_attn.q_proj.weight": halves(wq[i], heads),
            p + "self_attn.k_proj.weight": halves(wk[i], kv_heads),
            p + "self_attn.v_proj.weight": wv[i],
            p + "self_attn.o_proj.weight": wo[i],
            p + "mlp.gate_proj.weight": w1[i],
            p + "mlp.down_proj.weight": w2[i],
            p + "mlp.up_proj.weight": w3[i],
        }
    if not shared:
        raise SystemExit("an untied classifier is not expected here")
    os.makedirs(output, exist_ok=True)
    header, body = {}, b""
    for name, t in tensors.items():
        blob = np.ascontiguousarray(t).tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [len(body), len(body) + len(blob)]}
        body += blob
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(output, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + body)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "intermediate_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": seq, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }
    json.dump(config, open(os.path.join(output, "config.json"), "w"), indent=1)
    open(os.path.join(output, "tokenizer.model"), "wb").write(sentencepiece(tokenizer, vocab))


main()
