/* precision.c - the names of precisions, QServe's spelling: w4a8kv4 (model.h, spec D.7). */
#include "base/status.h"
#include "model/model.h"

#include <ctype.h>
#include <string.h>
#include <strings.h>

/* Reads "<tag><number>" at *p; the tag's case does not matter. */
static bool read_field(const char **p, const char *tag, int32_t *bits) {
  size_t n = strlen(tag);
  if (strncasecmp(*p, tag, n) != 0 || !isdigit((unsigned char)(*p)[n])) return false;
  *p += n;
  *bits = 0;
  for (int i = 0; i < 2 && isdigit((unsigned char)**p); i++) *bits = *bits * 10 + (*(*p)++ - '0');
  return true;
}

enum qtr_status qtr_precision_parse(const char *text, struct qtr_precision *precision, struct qtr_error *err) {
  struct qtr_precision q = {0};
  const char *p = text;
  bool ok = read_field(&p, "w", &q.weight_bits) && read_field(&p, "a", &q.act_bits);
  if (ok && *p)
    ok = read_field(&p, "kv", &q.kv_bits) && !*p;
  else if (ok)
    q.kv_bits = q.weight_bits == 16 ? 16 : 8;
  bool weights = (q.weight_bits == 4 && q.act_bits == 8) || (q.weight_bits == 8 && q.act_bits == 8) ||
                 (q.weight_bits == 16 && q.act_bits == 16);
  bool kv = q.kv_bits == 4 || q.kv_bits == 8 || q.kv_bits == 16;
  if (!ok || !weights || !kv) {
    char shown[48];
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "unknown precision \"%s\"; write w4a8, w8a8 or w16a16, then kv4, kv8, kv16 or nothing, as in w4a8kv4",
                    qtr_printable(text, strlen(text), shown, sizeof shown));
  }
  *precision = q;
  return QTR_OK;
}
