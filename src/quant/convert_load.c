/* convert_load.c - reads the projections of foreign checkpoints: the settings of GPTQ and AWQ, their packed tensors, and
 * DeepCompressor's weights with the scales beside them (convert_internal.h; spec A.5.1). Untrusted: every shape and index is
 * checked before it is used. */
#include "quant/convert_internal.h"

#include "base/file.h"
#include "base/status.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define MAX_CONFIG_BYTES ((size_t)16 << 20)

/* ---- GPTQ and AWQ: settings ------------------------------------------------------------------------- */

static void copy_word(const json_t *value, char out[16]) {
  const char *text = json_string_value(value);
  if (text) (void)qtr_printable(text, strlen(text), out, 16);
}

static json_t *first_of(const json_t *object, const char *a, const char *b) {
  json_t *value = json_object_get(object, a);
  return value ? value : json_object_get(object, b);
}

static enum qtr_status read_settings(const json_t *q, const char *path, struct qtr_int4_config *c, struct qtr_error *err) {
  copy_word(json_object_get(q, "quant_method"), c->method);
  copy_word(first_of(q, "checkpoint_format", "version"), c->format);
  if (json_is_true(json_object_get(q, "is_marlin_format"))) (void)snprintf(c->format, sizeof c->format, "marlin");
  const json_t *bits = first_of(q, "bits", "w_bit"), *group = first_of(q, "group_size", "q_group_size");
  json_int_t n_bits = json_integer_value(bits), n_group = json_integer_value(group);
  if ((bits && (!json_is_integer(bits) || n_bits < 1 || n_bits > 16)) ||
      (group && (!json_is_integer(group) || n_group < -1 || n_group > 1 << 24))) {
    return qtr_fail(err, QTR_ERR_FORMAT, "%s: bits and group_size must be whole numbers", path);
  }
  c->bits = (int32_t)n_bits;
  c->group_size = (int32_t)n_group;
  return QTR_OK;
}

enum qtr_status qtr_int4_config_read(const char *dir, struct qtr_int4_config *c, struct qtr_error *err) {
  static const char *const files[] = {"config.json", "quantize_config.json", "quant_config.json"};
  *c = (struct qtr_int4_config){0};
  enum qtr_status status = QTR_OK;
  bool found = false;
  for (size_t i = 0; i < sizeof files / sizeof *files && !found && !status; i++) {
    char *path = qtr_path_join(dir, files[i]), *text = NULL;
    size_t len = 0;
    json_t *root = NULL;
    if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
    if (qtr_file_exists(path) && !(status = qtr_file_read(path, MAX_CONFIG_BYTES, &text, &len, err))) {
      json_error_t error;
      root = json_loadb(text, len, 0, &error);
      const json_t *q = i == 0 ? json_object_get(root, "quantization_config") : root;
      found = json_is_object(q);
      if (found) status = read_settings(q, path, c, err);
    }
    json_decref(root);
    free(text);
    free(path);
  }
  return status;
}

static const char *layout_of(enum qtr_convert_kind kind) { return kind == QTR_CONVERT_GPTQ ? "GPTQ" : "AWQ (gemm)"; }

enum qtr_status qtr_int4_recognise(struct qtr_source *s, const struct qtr_int4_config *c, enum qtr_convert_kind *kind,
                                   int32_t *group_size, unsigned *plus, struct qtr_error *err) {
  static const char name[] = "model.layers.0.self_attn.q_proj";
  const size_t out = (size_t)s->config->n_heads * (size_t)s->config->head_dim, in = (size_t)s->config->hidden_size;
  if (c->method[0] && strcmp(c->method, "gptq") != 0 && strcmp(c->method, "awq") != 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "quantization_config says \"%s\"; gptq and awq are imported", c->method);
  }
  if (c->bits && c->bits != 4) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "the weights have %d bits; W4A8 takes those of 4", (int)c->bits);
  }
  const struct qtr_tensor *q = qtr_source_find(s, name, ".qweight"), *scales = qtr_source_find(s, name, ".scales");
  if (!q || !scales || q->n_dims != 2 || scales->n_dims != 2) {
    return qtr_fail(err, QTR_ERR_FORMAT, "%s has no matrices qweight and scales: neither GPTQ nor AWQ wrote this", name);
  }
  bool gptq = q->shape[0] == in / 8 && q->shape[1] == out, awq = q->shape[0] == in && q->shape[1] == out / 8;
  if (!gptq && !awq) {
    bool rows = q->shape[1] == out && in > 0 && q->shape[0] * 32 % in == 0;
    bool columns = q->shape[0] == in && out > 0 && q->shape[1] * 32 % out == 0;
    size_t bits = rows ? q->shape[0] * 32 / in : columns ? q->shape[1] * 32 / out : 0;
    if (bits) return qtr_fail(err, QTR_ERR_UNSUPPORTED, "the weights have %zu bits; W4A8 takes those of 4", bits);
    return qtr_fail(err, QTR_ERR_FORMAT,
                    "tensor %s.qweight has shape [%zu, %zu]; GPTQ's is [%zu, %zu] and AWQ's (gemm) [%zu, %zu]", name,
                    q->shape[0], q->shape[1], in / 8, out, in, out / 8);
  }
  *kind = gptq ? QTR_CONVERT_GPTQ : QTR_CONVERT_AWQ;
  if (c->method[0] && strcmp(c->method, gptq ? "gptq" : "awq") != 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "quantization_config says \"%s\", but the tensors are laid out as %s", c->method,
                    layout_of(*kind));
  }
  bool known = !c->format[0] || (gptq ? strcmp(c->format, "gptq") == 0 || strcmp(c->format, "gptq_v2") == 0
                                      : strcasecmp(c->format, "gemm") == 0);
  if (!known) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "the weights are packed for \"%s\"; %s is imported", c->format,
                    gptq ? "gptq or gptq_v2" : "gemm");
  }
  *plus = gptq && strcmp(c->format, "gptq_v2") != 0 ? 1 : 0;
  size_t groups = scales->shape[0], group = groups > 0 && in % groups == 0 ? in / groups : 0;
  bool whole = group == in && (in != QTR_GROUP || c->group_size == -1);
  if (!whole && group != QTR_GROUP) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "groups of %zu weights: W4A8 takes groups of 128, or one for a whole row",
                    group);
  }
  *group_size = whole ? -1 : QTR_GROUP;
  if (c->group_size != 0 && c->group_size != *group_size && (size_t)c->group_size != group) {
    return qtr_fail(err, QTR_ERR_FORMAT, "quantization_config says group_size %d, but %s.scales has %zu rows: groups of %zu",
                    (int)c->group_size, name, groups, group);
  }
  return QTR_OK;
}

/* ---- GPTQ and AWQ: one projection ------------------------------------------------------------------ */

struct packed {
  const struct qtr_tensor *qweight, *qzeros, *scales, *g_idx;
};

static enum qtr_status find_packed(struct qtr_source *s, const struct qtr_slot *slot, enum qtr_convert_kind kind,
                                   int32_t group_size, struct packed *p, struct qtr_error *err) {
  const size_t out = slot->n_out, in = slot->n_in, group = group_size == -1 ? in : (size_t)group_size;
  bool gptq = kind == QTR_CONVERT_GPTQ;
  *p = (struct packed){0};
  if (out % 8 != 0 || in % 8 != 0 || in % group != 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "%s has %zu rows and %zu columns: no multiples of 8 and of the group of %zu",
                    slot->name, out, in, group);
  }
  const size_t weight[2] = {gptq ? in / 8 : in, gptq ? out : out / 8}, zero[2] = {in / group, out / 8},
               scale[2] = {in / group, out};
  enum qtr_status status;
  if ((status = qtr_source_get(s, slot->name, ".qweight", 2, weight, &p->qweight, err)) ||
      (status = qtr_source_get(s, slot->name, ".qzeros", 2, zero, &p->qzeros, err)) ||
      (status = qtr_source_get(s, slot->name, ".scales", 2, scale, &p->scales, err))) {
    return status;
  }
  if (p->qweight->dtype != QTR_DTYPE_I32 || p->qzeros->dtype != QTR_DTYPE_I32 || p->scales->dtype > QTR_DTYPE_F64) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED,
                    "%s: qweight, qzeros and scales are %s, %s and %s; I32, I32 and a float are expected", slot->name,
                    qtr_dtype_name(p->qweight->dtype), qtr_dtype_name(p->qzeros->dtype), qtr_dtype_name(p->scales->dtype));
  }
  if (!gptq || !qtr_source_find(s, slot->name, ".g_idx")) return QTR_OK;
  if ((status = qtr_source_get(s, slot->name, ".g_idx", 1, &in, &p->g_idx, err))) return status;
  if (p->g_idx->dtype == QTR_DTYPE_I32) return QTR_OK;
  return qtr_fail(err, QTR_ERR_UNSUPPORTED, "tensor %s has dtype %s, I32 is expected", p->g_idx->name,
                  qtr_dtype_name(p->g_idx->dtype));
}

enum qtr_status qtr_int4_check(struct qtr_source *s, const struct qtr_slot *slot, enum qtr_convert_kind kind,
                               int32_t group_size, struct qtr_error *err) {
  struct packed p;
  return find_packed(s, slot, kind, group_size, &p, err);
}

/* NULL when the inputs are in order. */
static enum qtr_status read_order(const struct qtr_tensor *t, size_t n_in, size_t group, uint32_t **g_idx,
                                  struct qtr_error *err) {
  *g_idx = NULL;
  uint32_t *index = malloc(n_in * sizeof *index + 1);
  if (!index) return qtr_fail_memory(err, t->name, n_in * sizeof *index);
  bool in_order = true;
  for (size_t i = 0; i < n_in; i++) {
    int32_t g;
    memcpy(&g, (const uint8_t *)t->data + 4 * i, sizeof g);
    if (g < 0 || (size_t)g >= n_in / group) {
      free(index);
      return qtr_fail(err, QTR_ERR_FORMAT, "tensor %s: input %zu is in group %d of %zu", t->name, i, (int)g, n_in / group);
    }
    index[i] = (uint32_t)g;
    in_order &= (size_t)g == i / group;
  }
  if (in_order) {
    free(index);
  } else {
    *g_idx = index;
  }
  return QTR_OK;
}

enum qtr_status qtr_int4_load_order(struct qtr_source *s, const struct qtr_slot *slot, size_t group, uint32_t **g_idx,
                                    struct qtr_error *err) {
  *g_idx = NULL;
  if (!qtr_source_find(s, slot->name, ".g_idx")) return QTR_OK;
  struct packed p;
  enum qtr_status status =
      find_packed(s, slot, QTR_CONVERT_GPTQ, group == slot->n_in ? -1 : (int32_t)group, &p, err); /* it was checked once */
  return status ? status : read_order(p.g_idx, slot->n_in, group, g_idx, err);
}

enum qtr_status qtr_int4_load(struct qtr_source *s, const struct qtr_slot *slot, enum qtr_convert_kind kind,
                              int32_t group_size, unsigned plus, struct qtr_int4_matrix *m, struct qtr_error *err) {
  struct packed p;
  const size_t group = group_size == -1 ? slot->n_in : (size_t)group_size, groups = slot->n_in / group;
  enum qtr_status status = find_packed(s, slot, kind, group_size, &p, err);
  if (status || (status = qtr_int4_create(slot->n_out, slot->n_in, group, m, err))) return status;
  float *scale = malloc(groups * slot->n_out * sizeof *scale + 1); /* (groups, n_out) */
  if (!scale) {
    status = qtr_fail_memory(err, slot->name, groups * slot->n_out * sizeof *scale);
    goto done;
  }
  if (kind == QTR_CONVERT_GPTQ) {
    qtr_gptq_unpack(p.qweight->data, p.qzeros->data, plus, m);
  } else {
    qtr_awq_unpack(p.qweight->data, p.qzeros->data, m);
  }
  if ((status = qtr_tensor_to_floats(p.scales, scale, groups * slot->n_out, err))) goto done;
  for (size_t g = 0; g < groups; g++) {
    for (size_t n = 0; n < slot->n_out; n++) m->scale[n * groups + g] = scale[g * slot->n_out + n];
  }
  if (p.g_idx) status = read_order(p.g_idx, slot->n_in, group, &m->g_idx, err);
done:
  free(scale);
  if (status) qtr_int4_free(m);
  return status;
}

/* ---- DeepCompressor and LMQuant --------------------------------------------------------------------- */

/* A tensor of scale.pt of n_out x groups values, whatever ones its shape has between (A.5.1: [oc, 1, ic/128, 1]). out:
 * malloc'ed. */
static enum qtr_status read_scale(const struct qtr_tensor *t, size_t n_out, size_t groups, float **out,
                                  struct qtr_error *err) {
  size_t squeezed[2] = {1, 1}, k = 0;
  bool good = true;
  for (size_t d = 0; d < t->n_dims; d++) {
    if (t->shape[d] == 1) continue;
    good &= k < 2;
    if (k < 2) squeezed[k++] = t->shape[d];
  }
  good &= n_out == 1 ? squeezed[0] * squeezed[1] == groups : squeezed[0] == n_out && squeezed[1] == groups;
  if (!good) {
    return qtr_fail(err, QTR_ERR_FORMAT, "scale.pt: tensor %s has %zu dimensions, %zu x %zu; [%zu, 1, %zu, 1] is expected",
                    t->name, t->n_dims, squeezed[0], squeezed[1], n_out, groups);
  }
  *out = malloc(n_out * groups * sizeof **out + 1);
  if (!*out) return qtr_fail_memory(err, t->name, n_out * groups * sizeof **out);
  return qtr_tensor_to_floats(t, *out, n_out * groups, err);
}

enum qtr_status qtr_fake_read(struct qtr_source *model, struct qtr_source *scales, const struct qtr_slot *slot,
                              struct qtr_threads *team, struct qtr_fake_load *load, struct qtr_error *err) {
  const size_t shape[2] = {slot->n_out, slot->n_in};
  const struct qtr_tensor *w, *s0, *s1, *zero, *scaled;
  *load = (struct qtr_fake_load){0};
  enum qtr_status status = qtr_source_get(model, slot->name, ".weight", 2, shape, &w, err);
  if (status) return qtr_error_prefix(err, "model.pt");
  if (w->dtype > QTR_DTYPE_F64) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "model.pt: tensor %s has dtype %s; fake-quantised weights are floats", w->name,
                    qtr_dtype_name(w->dtype));
  }
  s0 = qtr_source_find(scales, slot->name, ".weight.scale.0");
  s1 = qtr_source_find(scales, slot->name, ".weight.scale.1");
  zero = qtr_source_find(scales, slot->name, ".weight.zero");
  scaled = qtr_source_find(scales, slot->name, ".weight.scaled_zero");
  if (!s0) return qtr_fail(err, QTR_ERR_NOT_FOUND, "scale.pt has no tensor %s.weight.scale.0", slot->name);
  if (zero && scaled) {
    return qtr_fail(err, QTR_ERR_FORMAT, "scale.pt has both %s.weight.zero and .scaled_zero", slot->name);
  }
  if (s1 && slot->n_in % QTR_GROUP != 0) {
    return qtr_fail(err, QTR_ERR_UNSUPPORTED, "%s has groups, but its %zu columns are no multiple of 128", slot->name,
                    slot->n_in);
  }
  size_t groups = s1 ? slot->n_in / QTR_GROUP : 1;
  load->scaled = scaled != NULL;
  load->type = w->dtype;
  if (!(load->w = malloc(slot->n_out * slot->n_in * sizeof *load->w + 1))) {
    status = qtr_fail_memory(err, slot->name, slot->n_out * slot->n_in * sizeof *load->w);
    goto done;
  }
  qtr_source_floats(w, load->w, team);
  if ((status = read_scale(s0, slot->n_out, 1, &load->s0, err)) ||
      (s1 && (status = read_scale(s1, slot->n_out, groups, &load->s1, err)))) {
    goto done;
  }
  if (zero || scaled) status = read_scale(zero ? zero : scaled, slot->n_out, groups, &load->zero, err);
done:
  if (status) qtr_fake_free(load);
  return status;
}

void qtr_fake_free(struct qtr_fake_load *load) {
  free(load->w);
  free(load->s0);
  free(load->s1);
  free(load->zero);
  *load = (struct qtr_fake_load){0};
}
