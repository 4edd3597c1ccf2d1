/* template_unicode.c - what Python's str knows about characters: decoding, white space, printability, case. Case mapping is
 * the full one where a letter becomes several (ß -> SS); the table holds those, utf8proc knows the rest. */
#include "text/template_internal.h"

#include <utf8proc.h>

size_t qtr_tpl_decode(const char *data, size_t len, uint32_t *cp) {
  const uint8_t *s = (const uint8_t *)data;
  uint32_t c = s[0];
  size_t need = c < 0x80 ? 1 : c >= 0xc2 && c < 0xe0 ? 2 : c >= 0xe0 && c < 0xf0 ? 3 : c >= 0xf0 && c < 0xf5 ? 4 : 0;
  *cp = c;
  if (need == 1) return 1;
  if (need == 0 || need > len) goto broken;
  c &= 0xffu >> (need + 1);
  for (size_t i = 1; i < need; i++) {
    if ((s[i] & 0xc0) != 0x80) goto broken;
    c = c << 6 | (s[i] & 0x3fu);
  }
  if ((need == 3 && c < 0x800) || (need == 4 && (c < 0x10000 || c > 0x10ffff)) || (c >= 0xd800 && c < 0xe000)) goto broken;
  *cp = c;
  return need;
broken:
  *cp = 0xfffd;
  return 1;
}

bool qtr_tpl_is_utf8(const char *data, size_t len, size_t *offset) {
  for (size_t i = 0; i < len;) {
    uint32_t cp;
    size_t n = qtr_tpl_decode(data + i, len - i, &cp);
    if (n == 1 && cp >= 0x80) {
      *offset = i;
      return false;
    }
    i += n;
  }
  return true;
}

size_t qtr_tpl_encode(uint32_t cp, char out[4]) {
  if (cp < 0x80) {
    out[0] = (char)cp;
    return 1;
  }
  if (cp < 0x800) {
    out[0] = (char)(0xc0 | cp >> 6);
    out[1] = (char)(0x80 | (cp & 0x3f));
    return 2;
  }
  if (cp < 0x10000) {
    out[0] = (char)(0xe0 | cp >> 12);
    out[1] = (char)(0x80 | (cp >> 6 & 0x3f));
    out[2] = (char)(0x80 | (cp & 0x3f));
    return 3;
  }
  out[0] = (char)(0xf0 | cp >> 18);
  out[1] = (char)(0x80 | (cp >> 12 & 0x3f));
  out[2] = (char)(0x80 | (cp >> 6 & 0x3f));
  out[3] = (char)(0x80 | (cp & 0x3f));
  return 4;
}

bool qtr_tpl_is_space(uint32_t cp) {
  if (cp < 0x80) return cp == ' ' || (cp >= 9 && cp <= 13) || (cp >= 28 && cp <= 31);
  return cp == 0x85 || cp == 0xa0 || cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 || cp == 0x2029 ||
         cp == 0x202f || cp == 0x205f || cp == 0x3000;
}

bool qtr_tpl_is_line_break(uint32_t cp) {
  return (cp >= 10 && cp <= 13) || (cp >= 28 && cp <= 30) || cp == 0x85 || cp == 0x2028 || cp == 0x2029;
}

static utf8proc_category_t category(uint32_t cp) { return utf8proc_category((utf8proc_int32_t)cp); }

bool qtr_tpl_is_printable(uint32_t cp) {
  if (cp < 0x80) return cp >= 0x20 && cp != 0x7f;
  switch (category(cp)) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZS:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP: return false;
    default: return true;
  }
}

bool qtr_tpl_is_alpha(uint32_t cp) {
  utf8proc_category_t c = category(cp);
  return c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_LO;
}

bool qtr_tpl_is_case_ignorable(uint32_t cp) {
  if (cp < 0x80) return cp == '\'' || cp == '.' || cp == ':' || cp == '^' || cp == '`';
  utf8proc_category_t c = category(cp);
  return c == UTF8PROC_CATEGORY_MN || c == UTF8PROC_CATEGORY_ME || c == UTF8PROC_CATEGORY_CF || c == UTF8PROC_CATEGORY_LM ||
         c == UTF8PROC_CATEGORY_SK || cp == 0xb7 || cp == 0x2019;
}

bool qtr_tpl_is_digit(uint32_t cp) { return cp < 0x80 ? cp >= '0' && cp <= '9' : category(cp) == UTF8PROC_CATEGORY_ND; }

bool qtr_tpl_is_numeric(uint32_t cp) {
  utf8proc_category_t c = category(cp);
  return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL || c == UTF8PROC_CATEGORY_NO;
}

bool qtr_tpl_is_identifier(uint32_t cp, bool first) {
  if (cp < 0x80) {
    return (cp >= 'a' && cp <= 'z') || (cp >= 'A' && cp <= 'Z') || cp == '_' || (!first && cp >= '0' && cp <= '9');
  }
  utf8proc_category_t c = category(cp);
  if (qtr_tpl_is_alpha(cp) || c == UTF8PROC_CATEGORY_NL) return true;
  return !first &&
         (c == UTF8PROC_CATEGORY_MN || c == UTF8PROC_CATEGORY_MC || c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_PC);
}

bool qtr_tpl_is_upper(uint32_t cp) {
  return cp < 0x80 ? cp >= 'A' && cp <= 'Z' : category(cp) == UTF8PROC_CATEGORY_LU || utf8proc_isupper((utf8proc_int32_t)cp);
}
bool qtr_tpl_is_lower(uint32_t cp) {
  return cp < 0x80 ? cp >= 'a' && cp <= 'z' : category(cp) == UTF8PROC_CATEGORY_LL || utf8proc_islower((utf8proc_int32_t)cp);
}
bool qtr_tpl_is_cased(uint32_t cp) {
  return qtr_tpl_is_upper(cp) || qtr_tpl_is_lower(cp) || category(cp) == UTF8PROC_CATEGORY_LT;
}

/* Letters whose capital is more than one code point (Unicode's SpecialCasing.txt), in order. */
static const struct {
  uint16_t letter, upper[3], title[3];
} several[] = {{0xdf, {0x53, 0x53}, {0x53, 0x73}},
               {0x149, {0x2bc, 0x4e}, {0x2bc, 0x4e}},
               {0x1f0, {0x4a, 0x30c}, {0x4a, 0x30c}},
               {0x390, {0x399, 0x308, 0x301}, {0x399, 0x308, 0x301}},
               {0x3b0, {0x3a5, 0x308, 0x301}, {0x3a5, 0x308, 0x301}},
               {0x587, {0x535, 0x552}, {0x535, 0x582}},
               {0x1e96, {0x48, 0x331}, {0x48, 0x331}},
               {0x1e97, {0x54, 0x308}, {0x54, 0x308}},
               {0x1e98, {0x57, 0x30a}, {0x57, 0x30a}},
               {0x1e99, {0x59, 0x30a}, {0x59, 0x30a}},
               {0x1e9a, {0x41, 0x2be}, {0x41, 0x2be}},
               {0x1f50, {0x3a5, 0x313}, {0x3a5, 0x313}},
               {0x1f52, {0x3a5, 0x313, 0x300}, {0x3a5, 0x313, 0x300}},
               {0x1f54, {0x3a5, 0x313, 0x301}, {0x3a5, 0x313, 0x301}},
               {0x1f56, {0x3a5, 0x313, 0x342}, {0x3a5, 0x313, 0x342}},
               {0x1f80, {0x1f08, 0x399}, {0x1f88}},
               {0x1f81, {0x1f09, 0x399}, {0x1f89}},
               {0x1f82, {0x1f0a, 0x399}, {0x1f8a}},
               {0x1f83, {0x1f0b, 0x399}, {0x1f8b}},
               {0x1f84, {0x1f0c, 0x399}, {0x1f8c}},
               {0x1f85, {0x1f0d, 0x399}, {0x1f8d}},
               {0x1f86, {0x1f0e, 0x399}, {0x1f8e}},
               {0x1f87, {0x1f0f, 0x399}, {0x1f8f}},
               {0x1f88, {0x1f08, 0x399}, {0x1f88}},
               {0x1f89, {0x1f09, 0x399}, {0x1f89}},
               {0x1f8a, {0x1f0a, 0x399}, {0x1f8a}},
               {0x1f8b, {0x1f0b, 0x399}, {0x1f8b}},
               {0x1f8c, {0x1f0c, 0x399}, {0x1f8c}},
               {0x1f8d, {0x1f0d, 0x399}, {0x1f8d}},
               {0x1f8e, {0x1f0e, 0x399}, {0x1f8e}},
               {0x1f8f, {0x1f0f, 0x399}, {0x1f8f}},
               {0x1f90, {0x1f28, 0x399}, {0x1f98}},
               {0x1f91, {0x1f29, 0x399}, {0x1f99}},
               {0x1f92, {0x1f2a, 0x399}, {0x1f9a}},
               {0x1f93, {0x1f2b, 0x399}, {0x1f9b}},
               {0x1f94, {0x1f2c, 0x399}, {0x1f9c}},
               {0x1f95, {0x1f2d, 0x399}, {0x1f9d}},
               {0x1f96, {0x1f2e, 0x399}, {0x1f9e}},
               {0x1f97, {0x1f2f, 0x399}, {0x1f9f}},
               {0x1f98, {0x1f28, 0x399}, {0x1f98}},
               {0x1f99, {0x1f29, 0x399}, {0x1f99}},
               {0x1f9a, {0x1f2a, 0x399}, {0x1f9a}},
               {0x1f9b, {0x1f2b, 0x399}, {0x1f9b}},
               {0x1f9c, {0x1f2c, 0x399}, {0x1f9c}},
               {0x1f9d, {0x1f2d, 0x399}, {0x1f9d}},
               {0x1f9e, {0x1f2e, 0x399}, {0x1f9e}},
               {0x1f9f, {0x1f2f, 0x399}, {0x1f9f}},
               {0x1fa0, {0x1f68, 0x399}, {0x1fa8}},
               {0x1fa1, {0x1f69, 0x399}, {0x1fa9}},
               {0x1fa2, {0x1f6a, 0x399}, {0x1faa}},
               {0x1fa3, {0x1f6b, 0x399}, {0x1fab}},
               {0x1fa4, {0x1f6c, 0x399}, {0x1fac}},
               {0x1fa5, {0x1f6d, 0x399}, {0x1fad}},
               {0x1fa6, {0x1f6e, 0x399}, {0x1fae}},
               {0x1fa7, {0x1f6f, 0x399}, {0x1faf}},
               {0x1fa8, {0x1f68, 0x399}, {0x1fa8}},
               {0x1fa9, {0x1f69, 0x399}, {0x1fa9}},
               {0x1faa, {0x1f6a, 0x399}, {0x1faa}},
               {0x1fab, {0x1f6b, 0x399}, {0x1fab}},
               {0x1fac, {0x1f6c, 0x399}, {0x1fac}},
               {0x1fad, {0x1f6d, 0x399}, {0x1fad}},
               {0x1fae, {0x1f6e, 0x399}, {0x1fae}},
               {0x1faf, {0x1f6f, 0x399}, {0x1faf}},
               {0x1fb2, {0x1fba, 0x399}, {0x1fba, 0x345}},
               {0x1fb3, {0x391, 0x399}, {0x1fbc}},
               {0x1fb4, {0x386, 0x399}, {0x386, 0x345}},
               {0x1fb6, {0x391, 0x342}, {0x391, 0x342}},
               {0x1fb7, {0x391, 0x342, 0x399}, {0x391, 0x342, 0x345}},
               {0x1fbc, {0x391, 0x399}, {0x1fbc}},
               {0x1fc2, {0x1fca, 0x399}, {0x1fca, 0x345}},
               {0x1fc3, {0x397, 0x399}, {0x1fcc}},
               {0x1fc4, {0x389, 0x399}, {0x389, 0x345}},
               {0x1fc6, {0x397, 0x342}, {0x397, 0x342}},
               {0x1fc7, {0x397, 0x342, 0x399}, {0x397, 0x342, 0x345}},
               {0x1fcc, {0x397, 0x399}, {0x1fcc}},
               {0x1fd2, {0x399, 0x308, 0x300}, {0x399, 0x308, 0x300}},
               {0x1fd3, {0x399, 0x308, 0x301}, {0x399, 0x308, 0x301}},
               {0x1fd6, {0x399, 0x342}, {0x399, 0x342}},
               {0x1fd7, {0x399, 0x308, 0x342}, {0x399, 0x308, 0x342}},
               {0x1fe2, {0x3a5, 0x308, 0x300}, {0x3a5, 0x308, 0x300}},
               {0x1fe3, {0x3a5, 0x308, 0x301}, {0x3a5, 0x308, 0x301}},
               {0x1fe4, {0x3a1, 0x313}, {0x3a1, 0x313}},
               {0x1fe6, {0x3a5, 0x342}, {0x3a5, 0x342}},
               {0x1fe7, {0x3a5, 0x308, 0x342}, {0x3a5, 0x308, 0x342}},
               {0x1ff2, {0x1ffa, 0x399}, {0x1ffa, 0x345}},
               {0x1ff3, {0x3a9, 0x399}, {0x1ffc}},
               {0x1ff4, {0x38f, 0x399}, {0x38f, 0x345}},
               {0x1ff6, {0x3a9, 0x342}, {0x3a9, 0x342}},
               {0x1ff7, {0x3a9, 0x342, 0x399}, {0x3a9, 0x342, 0x345}},
               {0x1ffc, {0x3a9, 0x399}, {0x1ffc}},
               {0xfb00, {0x46, 0x46}, {0x46, 0x66}},
               {0xfb01, {0x46, 0x49}, {0x46, 0x69}},
               {0xfb02, {0x46, 0x4c}, {0x46, 0x6c}},
               {0xfb03, {0x46, 0x46, 0x49}, {0x46, 0x66, 0x69}},
               {0xfb04, {0x46, 0x46, 0x4c}, {0x46, 0x66, 0x6c}},
               {0xfb05, {0x53, 0x54}, {0x53, 0x74}},
               {0xfb06, {0x53, 0x54}, {0x53, 0x74}},
               {0xfb13, {0x544, 0x546}, {0x544, 0x576}},
               {0xfb14, {0x544, 0x535}, {0x544, 0x565}},
               {0xfb15, {0x544, 0x53b}, {0x544, 0x56b}},
               {0xfb16, {0x54e, 0x546}, {0x54e, 0x576}},
               {0xfb17, {0x544, 0x53d}, {0x544, 0x56d}}};

size_t qtr_tpl_map_case(uint32_t cp, enum letter_case to, uint32_t out[3]) {
  if (cp < 0x80) {
    bool changes = to == CASE_LOWER || to == CASE_FOLD ? cp >= 'A' && cp <= 'Z' : cp >= 'a' && cp <= 'z';
    out[0] = changes ? cp ^ 0x20 : cp;
    return 1;
  }
  if (to == CASE_LOWER && cp == 0x130) { /* I with a dot above keeps the dot */
    out[0] = 'i';
    out[1] = 0x307;
    return 2;
  }
  if (to == CASE_FOLD) {
    int bound = 0;
    utf8proc_ssize_t n =
        utf8proc_decompose_char((utf8proc_int32_t)cp, (utf8proc_int32_t *)out, 3, UTF8PROC_CASEFOLD, &bound);
    if (n >= 1 && n <= 3) return (size_t)n;
    to = CASE_LOWER;
  }
  size_t low = 0, high = sizeof several / sizeof *several;
  while (to != CASE_LOWER && low < high) {
    size_t middle = (low + high) / 2;
    if (several[middle].letter == cp) {
      const uint16_t *letters = to == CASE_UPPER ? several[middle].upper : several[middle].title;
      size_t n = 0;
      for (; n < 3 && letters[n]; n++) out[n] = letters[n];
      return n;
    }
    if (several[middle].letter < cp) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  utf8proc_int32_t c = (utf8proc_int32_t)cp;
  out[0] = (uint32_t)(to == CASE_LOWER ? utf8proc_tolower(c) : to == CASE_UPPER ? utf8proc_toupper(c) : utf8proc_totitle(c));
  return 1;
}
