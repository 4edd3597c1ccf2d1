#!/usr/bin/env python3
"""Makes tests/golden/tokenizers: tiny vocabularies trained here, and <name>.cases.json with what the reference (PyPI tokenizers,
sentencepiece) makes of some texts. The unit tests read both, so they need neither Python nor anybody's model files."""
import io
import json
import os
import random
import sys

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizers")
TEXT = """It's the rain that they've been waiting for, isn't it? I'll say so: we'd have 1234567 reasons, you'RE right.
The quick brown fox jumps over the lazy dog; the dog does not mind.  Two spaces,   three spaces, and	a tab.
Le garçon s'est levé très tôt. Über den Wolken muß die Freiheit wohl grenzenlos sein. Съешь же ещё этих мягких булок.
日本語の文章もある。 今天天气很好。 안녕하세요 세계. नमस्ते दुनिया. สวัสดีชาวโลก
for (int i = 0; i < n; i++) {
    sum += x[i] * 0.5;
}
the then them these there their they that this those than thing think through the other another whether weather
""" * 4
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")


def texts(specials):
    r = random.Random(20261121)
    sets = [
        list(range(32, 127)), [9, 10, 13, 32, 32, 0x85, 0xA0, 0x180E, 0x2003, 0x2028, 0x3000], list(range(0xC0, 0x250)),
        list(range(0x300, 0x330)), list(range(0x4E00, 0x4E80)), list(range(0x1F600, 0x1F640)), list(map(ord, "'sStTreREllLLvVdDmMſ")),
        list(map(ord, "0123456789²¼Ⅷ٣")), list(range(0x1D400, 0x1D420)), list(range(0, 32)),
    ]
    out = ["", " ", "  ", "a", "Hello", " Hello  World ", "don't DON'T don'ſ", "1234567 12 3", "x\n\n \n  y", "\t\ttabs", "é e\u0301", "\u1e9b\u0323",
           "🦙🦙 and 👩‍👩‍👧", "the their them", "日本語です", "\u0000\u0001", "ꭰ\U0001e500\U000323af", "▁under ▁ bar", "a\u00a0b\u2003c",
           "for (int i = 0;\n    i++)\n"]
    for _ in range(24):
        use = r.sample(sets, 3)
        out.append("".join(chr(r.choice(r.choice(use))) for _ in range(r.choice([2, 5, 12, 30]))))
    for s in specials:
        out += [s, "a " + s + " b", s + s + "x", "zz" + s + "zz", "  " + s + "  "]
    return out


def long_words():
    """Words that go the way of long ones: a queue from 65 bytes on, lists by rank from 4,096 characters on."""
    r = random.Random(7)
    return ["".join(r.choice("therangio") for _ in range(n)) for n in (65, 900, 6000)] + ["the" * 1500 + "a" * 100, " " * 5000]


def write(name, tokenizer, specials, skip_decode=False):
    path = os.path.join(OUT, name + ".json")
    data = json.loads(tokenizer.to_str())
    open(path, "w", encoding="utf-8").write(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n")
    tokenizer = Tokenizer.from_file(path)
    cases = []
    for text in texts(specials):
        case = {"text": text}
        for add in (False, True):
            for parse in (False, True):
                tokenizer.encode_special_tokens = not parse
                ids = tokenizer.encode(text, add_special_tokens=add).ids
                case["ids" + ("_add" if add else "") + ("_parse" if parse else "")] = ids
        if not skip_decode:
            case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
        cases.append(case)
    cases += [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False).ids} for text in long_words()]
    dump(name, cases)


def dump(name, cases):
    with open(os.path.join(OUT, name + ".cases.json"), "w", encoding="utf-8") as f:
        f.write("[\n" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) + "\n]\n")


def train(model, normalizer, pre, size, alphabet=(), specials=(), limit=None):
    t = Tokenizer(model)
    if normalizer:
        t.normalizer = normalizer
    if pre:
        t.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(alphabet), special_tokens=list(specials), show_progress=False, **({"limit_alphabet": limit} if limit else {}))
    t.train_from_iterator(TEXT.split("\n"), trainer)
    return t


def bytes_split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def template(bos, id):
    return processors.TemplateProcessing(single=bos + " $A", pair=bos + " $A " + bos + " $B:1", special_tokens=[(bos, id)])


alphabet = pre_tokenizers.ByteLevel.alphabet()

t = train(models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=True), 400, alphabet, ["<|endoftext|>"])
t.decoder = decoders.ByteLevel()
write("gpt2", t, ["<|endoftext|>"])

t = train(models.BPE(ignore_merges=True), None, bytes_split(LLAMA3), 420, alphabet, ["<|begin_of_text|>", "<|eot_id|>"])
t.decoder = decoders.ByteLevel()
t.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<|begin_of_text|>", 0)])
write("llama3", t, ["<|begin_of_text|>", "<|eot_id|>", "<|eot"])

t = train(models.BPE(), normalizers.NFC(), bytes_split(QWEN2), 400, alphabet)
t.decoder = decoders.ByteLevel()
t.add_special_tokens(["<|im_start|>", "<|im_end|>"])
t.add_tokens([AddedToken("<tool_call>", normalized=False, special=False), AddedToken("word", single_word=True, normalized=True),
              AddedToken("<l>", lstrip=True, normalized=False), AddedToken("<r>", rstrip=True, normalized=False)])
write("qwen2", t, ["<|im_start|>", "<tool_call>", "word", "<l>", "<r>"])

# Llama-2: bytes first, then pieces; the trainer knows neither, so the model is put together here.
words = train(models.BPE(), normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), pre_tokenizers.Metaspace(), 300, limit=90)
m = json.loads(words.to_str())["model"]
vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
for b in range(256):
    vocab["<0x%02X>" % b] = len(vocab)
for token in sorted(m["vocab"], key=m["vocab"].get):
    vocab[token] = len(vocab)
merges = [tuple(x) for x in m["merges"]]
t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
t.post_processor = template("<s>", 1)
t.add_special_tokens([AddedToken(x, normalized=False, special=True) for x in ("<unk>", "<s>", "</s>")])
write("llama2", t, ["<s>", "</s>"])

# Metaspace, without byte fallback: unknown characters are fused, or not.
vocab = {"<unk>": 0}
for token in sorted(m["vocab"], key=m["vocab"].get):
    vocab[token] = len(vocab)
t = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=False))
t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
t.decoder = decoders.Metaspace(prepend_scheme="first")
t.add_special_tokens(["<sep>"])
write("metaspace", t, ["<sep>"])


def train_sentencepiece(name, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT.split("\n")), model_writer=model, minloglevel=2, **options)
    open(os.path.join(OUT, name + ".model"), "wb").write(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


identity = dict(model_type="bpe", normalization_rule_name="identity", character_coverage=0.98)
for name, options in {
    "pieces-bytes": dict(vocab_size=400, byte_fallback=True, remove_extra_whitespaces=False, user_defined_symbols=["<|user|>", "  "]),
    "pieces-unknown": dict(vocab_size=160, split_digits=True),
    "pieces-plain": dict(vocab_size=380, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False),
}.items():
    p = train_sentencepiece(name, **identity, **options)
    cases = [{"text": s, "ids": p.encode(s)} for s in texts(["<|user|>"]) if "\0" not in s]
    cases += [{"text": text, "ids": p.encode(text)} for text in long_words()]
    for c in cases:
        if p.unk_id() not in c["ids"]:
            c["decoded"] = p.decode(c["ids"])
    dump(name, cases)
train_sentencepiece("refused-unigram", model_type="unigram", vocab_size=120, normalization_rule_name="identity", character_coverage=0.98)
print(*sorted("%s %d" % (f, os.path.getsize(os.path.join(OUT, f))) for f in os.listdir(OUT)), sep="\n")
