#!/usr/bin/env python3
"""Writes a GGUF file of the Llama-3.2-1B shape with random fp16 weights, for peer_llama_cpp.py (needs PyPI gguf and numpy):

make_peer_gguf.py OUT-f16.gguf && llama-quantize OUT-f16.gguf OUT.gguf Q4_0
"""
import sys

import gguf
import numpy as np

hidden, inner, layers, vocab, heads, kv_heads, dim = 2048, 8192, 16, 128256, 32, 8, 64
rng = np.random.default_rng(0)


def matrix(rows, columns, gain=1.0):
    return (rng.standard_normal((rows, columns), dtype=np.float32) * (gain / np.sqrt(columns))).astype(np.float16)


w = gguf.GGUFWriter(sys.argv[1], "llama")
w.add_name("random")
w.add_context_length(131072)
w.add_embedding_length(hidden)
w.add_block_count(layers)
w.add_feed_forward_length(inner)
w.add_head_count(heads)
w.add_head_count_kv(kv_heads)
w.add_rope_freq_base(500000.0)
w.add_rope_dimension_count(dim)
w.add_layer_norm_rms_eps(1e-5)
w.add_vocab_size(vocab)
w.add_file_type(1)
w.add_tokenizer_model("gpt2")
w.add_tokenizer_pre("llama-bpe")
w.add_token_list([f"tok{i}" for i in range(vocab)])
w.add_token_types([1] * vocab)
w.add_token_merges(["t o", "to k"])
w.add_bos_token_id(0)
w.add_eos_token_id(1)
w.add_tensor("token_embd.weight", matrix(vocab, hidden, 0.02 * np.sqrt(hidden)))
w.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
for i in range(layers):
    p = f"blk.{i}."
    w.add_tensor(p + "attn_norm.weight", np.ones(hidden, np.float32))
    w.add_tensor(p + "ffn_norm.weight", np.ones(hidden, np.float32))
    w.add_tensor(p + "attn_q.weight", matrix(heads * dim, hidden))
    w.add_tensor(p + "attn_k.weight", matrix(kv_heads * dim, hidden))
    w.add_tensor(p + "attn_v.weight", matrix(kv_heads * dim, hidden))
    w.add_tensor(p + "attn_output.weight", matrix(hidden, heads * dim, 0.2))
    w.add_tensor(p + "ffn_gate.weight", matrix(inner, hidden))
    w.add_tensor(p + "ffn_up.weight", matrix(inner, hidden))
    w.add_tensor(p + "ffn_down.weight", matrix(hidden, inner, 0.2))
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
