#!/usr/bin/env python3
"""Makes metrics.json: what the Python packages that published scores come from give for a few hundred texts (rouge_score, nltk,
rouge, fuzzywuzzy, jieba from PyPI), and LongBench's own formulas, written here from its paper and the specification.

  make_metrics.py BOOKS.txt > metrics.json      BOOKS.txt: any public-domain English text, for words to stem
"""
import json
import random
import re
import string
import sys
import tempfile
from collections import Counter

import jieba
from fuzzywuzzy import fuzz
from nltk.stem.porter import PorterStemmer
from rouge import Rouge
from rouge_score import rouge_scorer

rng = random.Random(7)
WORDS = ("the a an of to in is was he she it and with river house old man boat number magic special Number, Fox. golden quiet "
         "harbor 4821 5127 don't re-read isn't U.S. running runs relational conditional hopefully generalization 中文 naïve Ünder").split()


def text(n, stops=0.12):
    out = []
    for _ in range(n):
        out.append(rng.choice(WORDS) + ("." if rng.random() < stops else ""))
    return " ".join(out)


def stems():
    with open(sys.argv[1], encoding="utf-8") as f:
        words = Counter(re.findall("[a-z]+", f.read(3_000_000).lower()))
    chosen = [w for w, _ in words.most_common(1200)] + sorted(w for w, n in words.items() if n == 3)[::7][:600]
    ends = ("ational tional enci anci izer bli alli entli eli ousli ization ation ator alism iveness fulness ousness aliti iviti biliti "
            "fulli logi icate ative alize iciti ical ful ness al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous "
            "ive ize sses ies ss s eed ed ing y e ll ied").split()
    chosen += [b + e for b in ("t", "re", "crea", "geo", "hop", "fall", "contro", "syll", "yy", "enj", "bl", "abc") for e in ends]
    chosen += "sky skies dying lying tying news innings outings cannings proceed exceed succeed howe a be dies died spied flies say".split()
    chosen += ["yyyyyy", "ayayay", "yay", "bayed", "b2b", "x86ing", "4821"]
    stemmer = PorterStemmer()
    return [[w, stemmer.stem(w)] for w in dict.fromkeys(chosen)]


def rouge1():
    scorer = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True)
    needle = "\n\nRemember, the best two things to do in San Francisco are eating a sandwich and sitting in Dolores Park on a sunny day.\n\n"
    pairs = [(needle, "Eat a sandwich and sit in Dolores Park on a sunny day."), ("", "x"), ("x", ""), ("...", "x y"), ("Ünder 4821", "under 4821")]
    pairs += [(text(rng.randint(1, 30)), text(rng.randint(1, 30))) for _ in range(40)]
    return [[answer, reference, scorer.score(reference, answer)["rouge1"].fmeasure] for reference, answer in pairs]


def overlap():
    phrase = "eating a sandwich and sitting in Dolores Park on a sunny day."
    pairs = [(phrase, phrase), ("Sit in Dolores Park\u3000on a sunny day", phrase), ("", phrase), ("x", "")]
    pairs += [(text(rng.randint(1, 20)), text(rng.randint(1, 12))) for _ in range(20)]
    out = []
    for answer, expected in pairs:
        words = expected.lower().split()
        out.append([answer, expected, len(set(answer.lower().split()) & set(words)) / len(words) if words else 0])
    return out


def f1_of(prediction, gold):
    common = sum((Counter(prediction) & Counter(gold)).values())
    if common == 0:
        return 0
    p, r = common / len(prediction), common / len(gold)
    return 2 * p * r / (p + r)


def normalise(s):
    s = "".join(c for c in s.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", s).split()


def f1():
    pairs = [("The cat.", "a cat"), ("", ""), ("the", "the"), ("unanswerable", "Unanswerable!"), ("a\u00a0b the-re", "b there"), ("“the” x", "x"),
             ("中the a文", "the a")]
    pairs += [(text(rng.randint(1, 20)), text(rng.randint(1, 8))) for _ in range(40)]
    return [[a, g, f1_of(normalise(a), normalise(g))] for a, g in pairs]


def rouge_l_of(a, g):
    try:
        return Rouge().get_scores([a], [g], avg=True)["rouge-l"]["f"]
    except Exception:  # as LongBench does: an empty text has no score
        return 0.0


def rouge_l():
    pairs = [("", "x"), ("x", ""), ("...", "x"), (". .", "x. ."), ("a b c.", "c b a"), ("a. b. c", "a b c"), (" ", " "), ("one  two\nthree", "one two three")]
    pairs += [(text(rng.randint(1, 80)), text(rng.randint(1, 60))) for _ in range(60)]
    pairs += [(" ".join(rng.choice("abcde") for _ in range(rng.randint(5, 60))), " ".join(rng.choice("abcdefg") for _ in range(40))) for _ in range(20)]
    return [[a, g, rouge_l_of(a, g)] for a, g in pairs]


def code_of(prediction, gold):
    line = ""
    for one in prediction.lstrip("\n").split("\n"):
        if "`" not in one and "#" not in one and "//" not in one:
            line = one
            break
    return fuzz.ratio(line, gold) / 100


def code():
    def line(n, letters):
        return "".join(rng.choice(letters) for _ in range(n))
    pairs = [("", ""), ("x", ""), ("", "x"), ("\n\n```python\n# c\n  return x\nmore", "  return x;"), ("// a\n# b", "c"), ("int naïve = 1;", "int naive = 2;"), ("日本語のコード", "日本のコード語")]
    for _ in range(40):
        pairs.append((line(rng.randint(1, 60), "abc(). =x"), line(rng.randint(1, 60), "abc(). =xyz")))
    for _ in range(25):  # 200 and more: frequent characters begin no run
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789(){}[];.,+-*/=<>!&|^~?:_ \t"
        gold = line(rng.randint(190, 420), letters + "eeeeee    ")
        answer = "".join(c for c in gold if rng.random() > 0.2) if rng.random() < 0.6 else line(rng.randint(50, 300), letters)
        pairs.append((answer, gold))
    return [[a, g, code_of(a, g)] for a, g in pairs]


def classification_of(prediction, gold, classes):
    named = [c for c in classes if c in prediction]
    named = [c for c in named if c == gold or c not in gold]
    return 1 / len(named) if gold in named else 0


def classification():
    classes = ["Food", "Food and drink", "Number", "Number of something", "Letter like a-z", "Date"]
    out = []
    for _ in range(40):
        prediction = " ".join(rng.choice(classes) for _ in range(rng.randint(0, 3))) + rng.choice(["", " indeed"])
        gold = rng.choice(classes + ["Other"])
        out.append([prediction, gold, classes, classification_of(prediction, gold, classes)])
    return out


def share(numbers, wanted):
    return sum(n == wanted for n in numbers) / len(numbers) if numbers else 0


def retrieval(word):
    out = []
    for _ in range(60):
        n = rng.randint(1, 12)
        gold = rng.choice(["", "see "]) + f"{word}{n}" + rng.choice(["", " x"])
        answer = rng.choice(["", f"{word}{n}", f"{word}{n} or {rng.randint(1, 12)}", f"{n}{n}", f"１２ {n}", f"{n}.{n}，{rng.randint(1, 12)}"])
        out.append([answer, gold, share(re.findall(r"\d+", answer), re.findall(word + r"(\d+)", gold)[0])])
    return out


def count():
    out = []
    for _ in range(60):
        n = rng.randint(1, 9)
        answer = rng.choice(["", f"{n}", f"There are {n}, not {rng.randint(1, 9)}.", f"{n}{n}", "none"])
        out.append([answer, str(n), share(re.findall(r"\d+", answer), str(n))])
    return out


ZH_DICT = """我们 500 r
我 900
们 100
中文 300
分词 200
文分 50
测试 250
一个 700
一 800
个 600
今天 400
天气 350
今天天气 20
天 90
气 80
很好 120
很 300
好 310
北京 260
北京大学 180
大学 240
大学生 90
学生 270
生 60
研究 220
研究生 140
命 30
生命 150
起源 110
的 2000
"""
ZH_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃〈〉《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def chinese():
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as f:
        f.write(ZH_DICT)
        f.flush()
        tokenizer = jieba.Tokenizer(f.name)
        tokenizer.initialize()
        cut = lambda s: list(tokenizer.cut(s, HMM=False))

        def bare(words):
            drop = set(string.punctuation + ZH_PUNCTUATION)
            words = ["".join("".join(c for c in w.lower() if c not in drop).split()) for w in words]
            return [w for w in words if w]
        parts = ["我们", "研究生命的起源", "北京大学生", "今天天气很好", "中文分词测试", "一个", "，", "。", "“好”", "ABC12", "GPU", "！", " "]
        cases = []
        for _ in range(40):
            a = "".join(rng.choice(parts) for _ in range(rng.randint(0, 8)))
            g = "".join(rng.choice(parts) for _ in range(rng.randint(1, 6)))
            cases.append({"answer": a, "gold": g, "words": cut(a), "f1": f1_of(bare(cut(a)), bare(cut(g))),
                          "rouge_l": rouge_l_of(" ".join(cut(a)), " ".join(cut(g)))})
        return {"dictionary": ZH_DICT, "cases": cases}


json.dump({"stems": stems(), "rouge1": rouge1(), "overlap": overlap(), "f1": f1(), "rouge_l": rouge_l(), "code": code(),
           "classification": classification(), "retrieval": retrieval("Paragraph "), "retrieval_zh": retrieval("段落"), "count": count(),
           "chinese": chinese()}, sys.stdout, ensure_ascii=False, separators=(",", ":"))
print()
