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

size_t qtr_tpl_map_case(uint32_t cp, enum letter_case to, uint32_t out[3]) {
  if (cp < 0x80) {
    bool changes = to == CASE_LOWER ? cp >= 'A' && cp <= 'Z' : cp >= 'a' && cp <= 'z';
    out[0] = changes ? cp ^ 0x20 : cp;
    return 1;
  }
  utf8proc_int32_t c = (utf8proc_int32_t)cp;
  out[0] = (uint32_t)(to == CASE_LOWER ? utf8proc_tolower(c) : to == CASE_UPPER ? utf8proc_toupper(c) : utf8proc_totitle(c));
  return 1;
}
