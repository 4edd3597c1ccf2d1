/* unicode.h - UTF-8 and the character classes that the reference tokenizers use. Private to src/text. */
#ifndef QTR_TEXT_UNICODE_H
#define QTR_TEXT_UNICODE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Offset of the first byte that is not part of valid UTF-8 (no surrogates, no overlong forms), len when all is valid. */
size_t qtr_utf8_valid_prefix(const char *text, size_t len);

/* Bytes of the character that `lead` starts in valid UTF-8 (1..4). */
static inline size_t qtr_utf8_length(uint8_t lead) { return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4; }
/* The character at text, which is valid UTF-8; *n_bytes gets its length. */
uint32_t qtr_utf8_next(const char *text, size_t *n_bytes);
/* Where the character that ends before `end` starts; text is valid UTF-8 and end > 0. */
size_t qtr_utf8_previous(const char *text, size_t end);
size_t qtr_utf8_encode(uint32_t c, char out[4]);

/* What an incomplete or wrong sequence is: the number of bytes at the start of bytes[0..n) that make one character (*valid),
 * or that one U+FFFD replaces (Unicode 3.9, maximal subparts); 0 when more bytes are needed to tell. */
size_t qtr_utf8_step(const uint8_t *bytes, size_t n, bool *valid);

/* Byte-level alphabet of GPT-2: every byte is a printable character below U+0144. */
uint32_t qtr_byte_to_char(uint8_t byte);
int qtr_char_to_byte(uint32_t c); /* -1: not in the alphabet */

/* Unicode White_Space, as Rust's char::is_whitespace and Oniguruma's \s. */
bool qtr_is_space(uint32_t c);
bool qtr_is_numeric(uint32_t c);     /* Nd, Nl, No */
bool qtr_is_punctuation(uint32_t c); /* ASCII punctuation and P* */
bool qtr_is_word(uint32_t c);        /* \w: Alphabetic, M, Nd, Pc, Join_Control */

/* Code points that Unicode 16 has and Unicode 14 has not. */
struct qtr_unicode_recent {
  uint32_t first, last;
  char category[3]; /* "Lo" */
};
extern const struct qtr_unicode_recent qtr_unicode_recent[];
extern const size_t qtr_n_unicode_recent;

#endif
