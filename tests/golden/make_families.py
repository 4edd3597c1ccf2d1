#!/usr/bin/env python3
"""Tiny random models of every family with golden fp32 logits by transformers, made once: make_families.py
(needs torch, transformers, safetensors).

Writes tests/golden/families/<name>/: config.json, weights as safetensors, golden.json with "tokens", "logits" (the last four
positions; weights in the type they are stored in, arithmetic in fp32) and "max_len" (the number of tokens: what a `dynamic`
rotary scaling is made for). The config.json are written here in the words of the releases they imitate, not by transformers, so
that older spellings (rope_scaling with "type", torch_dtype, absent keys) are read as transformers reads them.
"""
import json
import os
import shutil

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "families")
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=32, intermediate_size=64,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96, max_position_embeddings=128,
             rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, torch_dtype="bfloat16")
MISTRAL = dict(LLAMA, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
QWEN2 = dict(LLAMA, architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False, sliding_window=128,
             max_window_layers=1, rope_theta=1000000.0, rms_norm_eps=1e-6)


def without(config, *keys):
    return {k: v for k, v in config.items() if k not in keys}


FAMILIES = {
    # Llama 1: no num_key_value_heads, no rope_theta, no tie_word_embeddings; fp16
    "llama1": (dict(without(LLAMA, "num_key_value_heads", "tie_word_embeddings"), torch_dtype="float16", rms_norm_eps=1e-6,
                    pad_token_id=-1), torch.float16, 40),
    "llama2-fp32": (dict(LLAMA, torch_dtype="float32", pretraining_tp=1, rope_scaling=None), torch.float32, 24),
    "llama3": (dict(LLAMA, rope_theta=500000.0, num_key_value_heads=1, eos_token_id=[2, 5]), torch.bfloat16, 40),
    "llama31-rope": (dict(LLAMA, rope_theta=500000.0, rope_scaling=dict(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32, rope_type="llama3")),
        torch.bfloat16, 100),
    # Llama 3.2: tied, explicit head_dim, no lm_head in the file
    "llama32-tied": (dict(LLAMA, tie_word_embeddings=True, head_dim=16, num_key_value_heads=2, rope_theta=500000.0,
                          rope_scaling=dict(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                            original_max_position_embeddings=64, rope_type="llama3")), torch.bfloat16, 80),
    "linear": (dict(LLAMA, rope_scaling=dict(type="linear", factor=4.0)), torch.float16, 60),
    "dynamic-short": (dict(LLAMA, rope_scaling=dict(type="dynamic", factor=2.0), max_position_embeddings=64), torch.bfloat16, 40),
    "dynamic-long": (dict(LLAMA, rope_scaling=dict(type="dynamic", factor=2.0), max_position_embeddings=32), torch.bfloat16, 90),
    "rope-parameters": (dict(without(LLAMA, "torch_dtype"), dtype="bfloat16", rope_parameters=dict(
        rope_type="linear", factor=2.0, rope_theta=50000.0)), torch.bfloat16, 50),
    "biases": (dict(LLAMA, attention_bias=True, mlp_bias=True), torch.bfloat16, 24),
    "mistral": (dict(MISTRAL, rope_theta=1000000.0, head_dim=12), torch.bfloat16, 40),
    "qwen2": (QWEN2, torch.bfloat16, 40),
    "qwen2-tied": (dict(QWEN2, tie_word_embeddings=True, num_key_value_heads=4), torch.float16, 24),
    "yi-sharded": (dict(LLAMA, rope_theta=5000000.0), torch.bfloat16, 24),
}


def randomise(model, generator):
    """Weights that give every part a say: attention that looks around, norms that are not one, biases that matter."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * x)
            elif name.endswith("bias"):
                p.copy_(0.3 * x)
            elif "embed_tokens" in name or "lm_head" in name:
                p.copy_(x / (p.shape[1] ** 0.5 if model.config.tie_word_embeddings or "lm_head" in name else 1))
            else:
                p.copy_(x * (1.3 if "q_proj" in name or "k_proj" in name else 1.0) / p.shape[1] ** 0.5)


def save(directory, tensors, sharded):
    if not sharded:
        save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
        return
    names, half = sorted(tensors), len(tensors) // 2
    weight_map = {}
    for i, part in enumerate((names[:half], names[half:])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, os.path.join(directory, file), metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f)


def main():
    for number, (name, (config, dtype, n_tokens)) in enumerate(FAMILIES.items()):
        directory = os.path.join(HERE, name)
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        with open(os.path.join(directory, "config.json"), "w") as f:
            json.dump(config, f, indent=1)
            f.write("\n")
        generator = torch.Generator().manual_seed(1000 + number)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), attn_implementation="eager").float().eval()
        randomise(model, generator)
        stored = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
        if config.get("tie_word_embeddings"):
            del stored["lm_head.weight"]
        save(directory, stored, "sharded" in name)
        # back through the files and through transformers' own loader: what is compared is what is stored
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        tokens = torch.randint(0, config["vocab_size"], (n_tokens,), generator=generator).tolist()
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -4:]
        with open(os.path.join(directory, "golden.json"), "w") as f:
            rows = [[float(f"{x:.7g}") for x in row] for row in logits.tolist()]
            json.dump({"tokens": tokens, "logits": rows, "max_len": n_tokens}, f)
            f.write("\n")
        print(f"{name:16} {type(model).__name__:20} logits std {logits.std():.3f}")


main()
