#!/usr/bin/env python3
"""A model directory with random W4A8KV4 weights (groups of 128) of a real model's shape, for measuring a server at its speed.

    python3 bench/random_model.py shapes/llama-3-8b.json models/demo OUT

The shape comes from the config; vocabulary, tokenizer and chat template come from the second directory, so that every token
is text. What it says means nothing. Only python3; Llama-3-8B takes 3.4 GiB of disk. Layout: docs/quantisation.md."""
import json, math, os, shutil, struct, sys

BLOCK = os.urandom((16 << 20) + 12346)  # even; read again and again, each time from elsewhere
# Bytes of fp16 numbers of 1/64 … 1/32, positive and negative: the high byte keeps its sign and two bits of the fraction.
HIGH = bytes((b & 0x83) | 0x24 for b in range(256))


class Noise:
    at = 0

    def take(self, n):
        while n > 0:
            part = BLOCK[self.at : self.at + min(n, 1 << 22)]
            self.at = (self.at + len(part)) % len(BLOCK)
            n -= len(part)
            yield part


def constant(value, n):
    return [value * n]


def small_f16(noise, n):
    for part in noise.take(2 * n):
        numbers = bytearray(part)
        numbers[1::2] = numbers[1::2].translate(HIGH)
        yield numbers


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    shape, words, out = sys.argv[1:]
    config = json.load(open(shape))
    demo = json.load(open(f"{words}/config.json"))
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], demo["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    dim = config.get("head_dim", hidden // heads)
    if hidden % 128 or inner % 128:
        sys.exit(f"{shape}: its widths {hidden} and {inner} are no multiples of 128")
    if config["architectures"] not in (["LlamaForCausalLM"], ["MistralForCausalLM"]):
        sys.exit(f"{shape}: only Llama and Mistral are written here")
    config.update({k: demo[k] for k in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if k in demo})
    config["tie_word_embeddings"] = False
    config["quantization_config"] = {"quant_method": "qoq", "precision": "w4a8kv4", "method": "random", "wbits": 4, "abits": 8, "kv_bits": 4,
                                     "group_size": 128, "head_bits": 16, "embed_bits": 16}
    noise, tensors = Noise(), []  # (name, dtype, shape, bytes, what writes them)

    def f16(name, *shape):
        n = math.prod(shape)
        tensors.append((name, "F16", shape, 2 * n, lambda: constant(struct.pack("<e", 1), n) if len(shape) == 1 else small_f16(noise, n)))

    def linear(name, n_out, n_in):  # codes 14 q - 105: within int8, without a bias, and no permutation of the scales matters
        groups = n_in // 128 * n_out
        tensors.append((f"{name}.qweight", "I8", (n_out, n_in // 2), n_out * n_in // 2, lambda: noise.take(n_out * n_in // 2)))
        tensors.append((f"{name}.s1_scales", "F16", (n_out,), 2 * n_out, lambda: constant(struct.pack("<e", 1 / math.sqrt(n_in) / 64), n_out)))
        tensors.append((f"{name}.s2_scales", "I8", (n_in // 128, n_out), groups, lambda: constant(struct.pack("b", 14), groups)))
        tensors.append((f"{name}.s2_zeros", "I8", (n_in // 128, n_out), groups, lambda: constant(struct.pack("b", -105), groups)))

    f16("model.embed_tokens.weight", vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        f16(layer + "input_layernorm.weight", hidden)
        linear(layer + "self_attn.q_proj", heads * dim, hidden)
        linear(layer + "self_attn.k_proj", kv_heads * dim, hidden)
        linear(layer + "self_attn.v_proj", kv_heads * dim, hidden)
        linear(layer + "self_attn.o_proj", hidden, heads * dim)
        f16(layer + "post_attention_layernorm.weight", hidden)
        linear(layer + "mlp.gate_proj", inner, hidden)
        linear(layer + "mlp.up_proj", inner, hidden)
        linear(layer + "mlp.down_proj", hidden, inner)
    f16("model.norm.weight", hidden)
    f16("lm_head.weight", vocab, hidden)

    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, dims, n, _ in tensors:
        header[name] = {"dtype": dtype, "shape": dims, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for *_, parts in tensors:
            for part in parts():
                f.write(part)
    json.dump(config, open(f"{out}/config.json", "w"), indent=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{words}/{name}", out)
    print(f"{out}: {at / 2**30:.2f} GiB", file=sys.stderr)


main()
