#!/usr/bin/env python3
"""Compares `quattuor tokenize` with PyPI tokenizers (tokenizer.json) or sentencepiece (tokenizer.model), on a text file and on
random Unicode.

usage: oracle_tokenizers.py QUATTUOR TOKENIZER TEXT [STRINGS [SEED]]

STRINGS (default 200) random strings of 20 to 400 characters, in files of 50. Exit 0: equal, 1: not, 77: a module is missing."""
import json
import os
import random
import subprocess
import sys
import tempfile

# What kinds of characters a random string is made of: (weight, ranges of code points).
KINDS = [
    (3, [(32, 127)]), (2, [(9, 14), (32, 33), (32, 33), (0x85, 0x86), (0xA0, 0xA1), (0x1680, 0x1681), (0x180E, 0x180F), (0x2000, 0x200D),
                           (0x2028, 0x202A), (0x202F, 0x2030), (0x205F, 0x2061), (0x3000, 0x3001), (0xFEFF, 0xFF00)]),
    (1, [(0xA1, 0x250)]), (1, [(0x300, 0x370)]), (1, [(0x370, 0x530)]), (1, [(0x590, 0x800)]), (1, [(0x900, 0xE00)]), (1, [(0x3040, 0x3100)]),
    (1, [(0x4E00, 0xA000)]), (1, [(0xAC00, 0xD7A4)]), (1, [(0x1F300, 0x1F700)]), (1, [(0x1D400, 0x1D800)]), (1, [(0x2070, 0x2190)]),
    (1, [(0x2580, 0x2590)]), (1, [(48, 58), (0x660, 0x66A), (0xB2, 0xBF), (0x2160, 0x2190)]), (1, [(0, 32)]),
    (2, [(39, 40), (0x73, 0x75), (0x53, 0x55), (0x17F, 0x180), (0x6C, 0x6E), (0x64, 0x66)]), (2, [(0, 0xD800), (0xE000, 0x110000)]),
]


def random_string(r):
    out = ""
    kinds = r.choices([ranges for _, ranges in KINDS], [weight for weight, _ in KINDS], k=r.choice([1, 2, 4]))
    for _ in range(r.choice([20, 60, 400]) // 3):
        ranges = r.choice(kinds)
        out += "".join(chr(r.randrange(*r.choice(ranges))) for _ in range(r.choice([1, 1, 2, 5])))
    return out


def reference(path):
    """A function from text to ids, without BOS and EOS."""
    if path.endswith(".model"):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(path).encode
    from tokenizers import Tokenizer

    data = json.load(open(path, encoding="utf-8"))
    vocab = data["model"]["vocab"]
    merges = []
    for merge in data["model"]["merges"]:
        if isinstance(merge, str) and merge.count(" ") != 1:  # tokens that have spaces: the library wants a pair
            merge = next([merge[:i], merge[i + 1:]] for i, c in enumerate(merge) if c == " " and merge[:i] in vocab and merge[i + 1:] in vocab)
        merges.append(merge.split(" ") if isinstance(merge, str) else merge)
    data["model"]["merges"] = merges
    tokenizer = Tokenizer.from_str(json.dumps(data))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def ours(binary, path, text):
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "text")
        with open(name, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        out = subprocess.run([binary, "tokenize", "--tokenizer", path, "--file", name, "--json"], capture_output=True, check=True).stdout
    return json.loads(out)["token_ids"]


def main():
    if len(sys.argv) < 4:
        print(__doc__)
        return 2
    binary, path, text_file = sys.argv[1:4]
    n = int(sys.argv[4]) if len(sys.argv) > 4 else 200
    r = random.Random(int(sys.argv[5]) if len(sys.argv) > 5 else 1)
    try:
        encode = reference(path)
    except ImportError as e:
        print("skipped: no module", e.name)
        return 77
    texts = [open(text_file, encoding="utf-8", newline="").read()]
    texts += ["\n".join(random_string(r) for _ in range(min(50, n - i))) for i in range(0, n, 50)]
    empty = ours(binary, path, "")  # BOS and EOS, where the command adds them
    for number, text in enumerate(texts):
        expected, found = encode(text), ours(binary, path, text)
        body = found[1:] if empty and found[:1] == empty[:1] and len(empty) == 1 else found
        if body != expected:
            at = next((i for i, (a, b) in enumerate(zip(body, expected)) if a != b), min(len(body), len(expected)))
            print("text %d: %d ids, expected %d; first difference at %d: %s, expected %s"
                  % (number, len(body), len(expected), at, body[at:at + 8], expected[at:at + 8]))
            return 1
    print("%s: %d texts, %d characters: equal" % (os.path.basename(path), len(texts), sum(map(len, texts))))
    return 0


sys.exit(main())
