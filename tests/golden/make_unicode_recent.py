#!/usr/bin/env python3
"""Writes src/text/unicode_recent.c: the code points that the reference (PyPI tokenizers, Oniguruma) knows
and Unicode 14 (Python 3.11's unicodedata, PCRE2 10.42) does not, with their general category. Run it again when the reference learns a new Unicode."""
import sys
import unicodedata

from tokenizers import Regex, pre_tokenizers

assert unicodedata.unidata_version == "14.0.0", "needs Python 3.11 or 3.12-: the base is Unicode 14"
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co".split()
points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
text = "".join(map(chr, points))


def members(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return [ord(t) for t, _ in split.pre_tokenize_str(text)]


new = {}
for category in CATEGORIES:
    for c in members(r"\p{%s}" % category):
        if unicodedata.category(chr(c)) == "Cn":
            new[c] = category
rows = []
for c in sorted(new):
    if rows and rows[-1][1] == c - 1 and rows[-1][2] == new[c]:
        rows[-1][1] = c
    else:
        rows.append([c, c, new[c]])
out = [
    "/* unicode_recent.c - code points that Unicode 16 has and Unicode 14 has not, with their general category. Made by",
    " * tests/golden/make_unicode_recent.py. The reference tokenizers know Unicode 16, the PCRE2 of a stable distribution may not. */",
    '#include "text/unicode.h"',
    "",
    "const struct qtr_unicode_recent qtr_unicode_recent[] = {",
]
out += ['    {0x%05X, 0x%05X, "%s"},' % tuple(row) for row in rows]
out += ["};", "const size_t qtr_n_unicode_recent = sizeof qtr_unicode_recent / sizeof qtr_unicode_recent[0];"]
open(sys.argv[1], "w").write("\n".join(out) + "\n")
print(len(rows), "ranges")
