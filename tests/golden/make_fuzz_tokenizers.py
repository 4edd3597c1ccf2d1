#!/usr/bin/env python3
"""Seeds for fuzz_text_tokenizer and fuzz_text_sentencepiece: small tokenizers with every part that the readers know."""
import json
import os
import struct

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fuzz", "corpus")
TEXT = "ab  abc\u00e9 ▁a<s>1234 don't\n\n x".encode()
MODEL = {"type": "BPE", "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5, "\u2581": 6, "\u2581ab": 7, "\u0120": 8, "1": 9, "\u0120ab": 10},
         "merges": ["a b", "ab c", "\u2581 ab", ["\u0120", "ab"]], "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
for b in (0xC3, 0xA9, 0x0A):
    MODEL["vocab"]["<0x%02X>" % b] = len(MODEL["vocab"])
ADDED = [dict(id=20, content="<s>", special=True, lstrip=True, rstrip=True, single_word=False, normalized=False),
         dict(id=21, content="x", special=False, lstrip=False, rstrip=False, single_word=True, normalized=True)]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(regex, behavior, invert=False):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
seeds = {
    "llama3": dict(pre_tokenizer={"type": "Sequence", "pretokenizers": [split(LLAMA3, "Isolated"), BYTES]}, decoder={"type": "ByteLevel"},
                   post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
                                   "special_tokens": {"<s>": {"id": "<s>", "ids": [20], "tokens": ["<s>"]}}}),
    "gpt2": dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, decoder={"type": "ByteLevel"},
                 post_processor={"type": "RobertaProcessing", "cls": ["<s>", 20], "sep": ["a", 1]}),
    "llama2": dict(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
                   decoder={"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                                                             {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
    "metaspace": dict(normalizer={"type": "NFKC"}, pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
                      decoder={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}),
    "classes": dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}]},
                    pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "MergedWithNext"},
                                                                         {"type": "CharDelimiterSplit", "delimiter": "x"}, {"type": "WhitespaceSplit"}]}),
    "words": dict(normalizer={"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, pre_tokenizer={"type": "Sequence", "pretokenizers": [
        split(r"\w+|[^\w\s]+|\p{Han}{2,}+", "MergedWithPrevious", True), split(r"(?<=\p{Lu})\b|^.|\x41[\S\h]", "Contiguous"), {"type": "Whitespace"}]}),
}
for folder in ("fuzz_text_tokenizer", "fuzz_text_sentencepiece"):
    os.makedirs(os.path.join(ROOT, folder), exist_ok=True)
for name, parts in seeds.items():
    data = {"added_tokens": ADDED, **parts, "model": {**MODEL, "ignore_merges": name == "llama3"}}
    with open(os.path.join(ROOT, "fuzz_text_tokenizer", name), "wb") as f:
        f.write(json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\0" + TEXT)


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text, score, kind):
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def model(byte_fallback, prefix, squeeze):
    out = piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("</s>", 0.0, 3) + piece("<u>", 0.0, 4)
    for b in (0xC3, 0xA9, 0x0A):
        out += piece("<0x%02X>" % b, 0.0, 6)
    for i, text in enumerate(["\u2581a", "ab", "abc", "\u2581ab", "\u2581\u2581", "don", "\u2581", "a", "b", "c", "1", "d", "o"]):
        out += piece(text, float(-i), 1)
    return out + field(2, field(3, 2) + field(35, byte_fallback)) + field(3, field(3, prefix) + field(4, squeeze))


for name, options in {"bytes": (1, 1, 0), "unknown": (0, 1, 1), "plain": (1, 0, 0)}.items():
    with open(os.path.join(ROOT, "fuzz_text_sentencepiece", name), "wb") as f:
        f.write(bytes([len(TEXT)]) + TEXT + model(*options))
