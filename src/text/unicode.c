/* unicode.c - UTF-8 and character classes (unicode.h). Categories come from libutf8proc, completed with unicode_recent.c up
 * to Unicode 16, which the reference tokenizers know. */
#include "text/unicode.h"

#include <string.h>
#include <utf8proc.h>

size_t qtr_utf8_step(const uint8_t *bytes, size_t n, bool *valid) {
  *valid = false;
  if (n == 0) return 0;
  uint8_t lead = bytes[0];
  if (lead < 0x80) {
    *valid = true;
    return 1;
  }
  if (lead < 0xc2 || lead > 0xf4) return 1;
  size_t length = qtr_utf8_length(lead);
  /* The second byte excludes overlong forms, surrogates and what lies above U+10FFFF. */
  uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  for (size_t i = 1; i < length; i++) {
    if (i == n) return 0;
    if (bytes[i] < low || bytes[i] > high) return i;
    low = 0x80;
    high = 0xbf;
  }
  *valid = true;
  return length;
}

size_t qtr_utf8_valid_prefix(const char *text, size_t len) {
  const uint8_t *bytes = (const uint8_t *)text;
  size_t i = 0;
  while (i < len) {
    uint64_t eight;
    while (len - i >= sizeof eight && (memcpy(&eight, bytes + i, sizeof eight), (eight & 0x8080808080808080u) == 0)) i += 8;
    if (i == len) break;
    bool valid;
    size_t n = qtr_utf8_step(bytes + i, len - i, &valid);
    if (!valid) return i;
    i += n;
  }
  return len;
}

uint32_t qtr_utf8_next(const char *text, size_t *n_bytes) {
  const uint8_t *s = (const uint8_t *)text;
  size_t n = qtr_utf8_length(s[0]);
  *n_bytes = n;
  if (n == 1) return s[0];
  if (n == 2) return (uint32_t)(s[0] & 0x1f) << 6 | (s[1] & 0x3fu);
  if (n == 3) return (uint32_t)(s[0] & 0x0f) << 12 | (s[1] & 0x3fu) << 6 | (s[2] & 0x3fu);
  return (uint32_t)(s[0] & 0x07) << 18 | (s[1] & 0x3fu) << 12 | (s[2] & 0x3fu) << 6 | (s[3] & 0x3fu);
}

size_t qtr_utf8_previous(const char *text, size_t end) {
  do {
    end--;
  } while (end > 0 && ((uint8_t)text[end] & 0xc0) == 0x80);
  return end;
}

size_t qtr_utf8_encode(uint32_t c, char out[4]) {
  uint8_t *s = (uint8_t *)out;
  if (c < 0x80) {
    s[0] = (uint8_t)c;
    return 1;
  }
  if (c < 0x800) {
    s[0] = (uint8_t)(0xc0 | c >> 6);
    s[1] = (uint8_t)(0x80 | (c & 0x3f));
    return 2;
  }
  if (c < 0x10000) {
    s[0] = (uint8_t)(0xe0 | c >> 12);
    s[1] = (uint8_t)(0x80 | (c >> 6 & 0x3f));
    s[2] = (uint8_t)(0x80 | (c & 0x3f));
    return 3;
  }
  s[0] = (uint8_t)(0xf0 | c >> 18);
  s[1] = (uint8_t)(0x80 | (c >> 12 & 0x3f));
  s[2] = (uint8_t)(0x80 | (c >> 6 & 0x3f));
  s[3] = (uint8_t)(0x80 | (c & 0x3f));
  return 4;
}

/* Bytes that stand for themselves: ! to ~, U+00A1 to U+00AC, U+00AE to U+00FF. The 68 others follow from U+0100 on. */
uint32_t qtr_byte_to_char(uint8_t byte) {
  if (byte < 0x21) return 0x100u + byte;
  if (byte < 0x7f) return byte;
  if (byte < 0xa1) return 0x100u + 0x21u + (byte - 0x7fu);
  return byte == 0xad ? 0x143u : byte;
}

int qtr_char_to_byte(uint32_t c) {
  if ((c >= 0x21 && c < 0x7f) || (c >= 0xa1 && c <= 0xff && c != 0xad)) return (int)c;
  if (c < 0x100 || c > 0x143) return -1;
  if (c == 0x143) return 0xad;
  return c < 0x121 ? (int)(c - 0x100) : (int)(c - 0x121 + 0x7f);
}

bool qtr_is_space(uint32_t c) {
  if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
  return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
         c == 0x202f || c == 0x205f || c == 0x3000;
}

/* General category as its first letter and second letter, e.g. "Lo". */
static const char *category(uint32_t c) {
  const char *name = utf8proc_category_string((utf8proc_int32_t)c);
  if (name[0] != 'C' || name[1] != 'n') return name;
  size_t low = 0, high = qtr_n_unicode_recent;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (qtr_unicode_recent[middle].last < c) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < qtr_n_unicode_recent && qtr_unicode_recent[low].first <= c ? qtr_unicode_recent[low].category : name;
}

bool qtr_is_numeric(uint32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  return category(c)[0] == 'N';
}

bool qtr_is_punctuation(uint32_t c) {
  if (c < 0x80) return (c > ' ' && c < '0') || (c > '9' && c < 'A') || (c > 'Z' && c < 'a') || (c > 'z' && c < 0x7f);
  return category(c)[0] == 'P';
}

bool qtr_is_word(uint32_t c) {
  if (c < 0x80) return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || c == '_';
  /* Other_Alphabetic is a part of M, but for the circled and squared letters. */
  if ((c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) || (c >= 0x1f150 && c <= 0x1f169) ||
      (c >= 0x1f170 && c <= 0x1f189) || c == 0x200c || c == 0x200d) {
    return true;
  }
  const char *name = category(c);
  return name[0] == 'L' || name[0] == 'M' || (name[0] == 'N' && name[1] != 'o') || (name[0] == 'P' && name[1] == 'c');
}
