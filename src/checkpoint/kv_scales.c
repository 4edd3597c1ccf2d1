/* kv_scales.c - reads and writes files of static KV8 scales (kv_scales.h; spec A.2.5, C.3.2). */
#include "checkpoint/kv_scales.h"

#include "base/checked.h"
#include "base/file.h"
#include "base/half.h"
#include "base/status.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILE_BYTES ((size_t)64 << 20)
#define MAX_RANKS 1024

static enum qtr_status create(const struct qtr_config *config, int32_t n_heads, struct qtr_kv_scales *s,
                              struct qtr_error *err) {
  *s = (struct qtr_kv_scales){.n_layers = config->n_layers, .n_heads = n_heads};
  size_t n = (size_t)config->n_layers * 2 * (size_t)n_heads; /* both are capped by the configuration's checks */
  s->scale = calloc(n, sizeof *s->scale);
  return s->scale ? QTR_OK : qtr_fail_memory(err, "KV scales", n * sizeof *s->scale);
}

void qtr_kv_scales_free(struct qtr_kv_scales *s) {
  free(s->scale);
  s->scale = NULL;
  s->n_layers = s->n_heads = 0;
}

static float *at(const struct qtr_kv_scales *s, int32_t layer, int value) {
  return s->scale + ((size_t)layer * 2 + (size_t)value) * (size_t)s->n_heads;
}

float qtr_kv_scales_tensor(const struct qtr_kv_scales *s, int32_t layer, int value) {
  float most = 0;
  for (int32_t h = 0; h < s->n_heads; h++) most = fmaxf(most, at(s, layer, value)[h]);
  return most;
}

/* As the engine will round it (A.2.5): positive and finite in fp16. */
static bool usable(double x) {
  float half = qtr_f16_round((float)x);
  return half > 0 && isfinite(half);
}

/* ---- JSON ------------------------------------------------------------------------------------------ */

static size_t count_values(const json_t *v) {
  return json_is_array(v) ? json_array_size(v) : json_is_object(v) ? json_object_size(v) : 1;
}

static const json_t *value_at(const json_t *v, size_t i) {
  char key[24];
  if (json_is_array(v)) return json_array_get(v, i);
  if (!json_is_object(v)) return v;
  (void)snprintf(key, sizeof key, "%zu", i);
  return json_object_get(v, key);
}

/* {"0": S, …}["layer"] */
static const json_t *layer_of(const json_t *map, int32_t layer) {
  char key[16];
  (void)snprintf(key, sizeof key, "%d", (int)layer);
  return json_object_get(map, key);
}

static enum qtr_status check_layers(const json_t *map, const char *name, int32_t n_layers, struct qtr_error *err) {
  if (!json_is_object(map)) return qtr_fail(err, QTR_ERR_FORMAT, "scaling_factor has no object \"%s\"", name);
  for (int32_t i = 0; i < n_layers; i++) {
    if (!layer_of(map, i)) return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" has no layer %d of %d", name, (int)i, (int)n_layers);
  }
  if (json_object_size(map) == (size_t)n_layers) return QTR_OK;
  return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" has %zu layers, the model %d", name, json_object_size(map), (int)n_layers);
}

/* One or several values a head; several give the largest. */
static enum qtr_status read_layer(const json_t *v, const char *name, int32_t layer, float *out, int32_t n_heads,
                                  struct qtr_error *err) {
  size_t n = count_values(v), each = n / (size_t)n_heads;
  if (n == 0 || n % (size_t)n_heads != 0) {
    return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\" has %zu values in layer %d; a multiple of %d is expected", name, n,
                    (int)layer, (int)n_heads);
  }
  for (size_t i = 0; i < n; i++) {
    const json_t *x = value_at(v, i);
    if (!json_is_number(x) || !usable(json_number_value(x))) {
      return qtr_fail(err, QTR_ERR_FORMAT, "\"%s\", layer %d, value %zu is no positive number that fp16 holds", name,
                      (int)layer, i);
    }
    out[i / each] = fmaxf(out[i / each], (float)json_number_value(x));
  }
  return QTR_OK;
}

static enum qtr_status check_zeros(const json_t *map, const char *name, struct qtr_error *err) {
  const char *key;
  json_t *v;
  json_object_foreach((json_t *)map, key, v) {
    size_t n = count_values(v);
    for (size_t i = 0; i < n; i++) {
      const json_t *x = value_at(v, i);
      if (json_is_number(x) && json_number_value(x) == 0) continue;
      return qtr_fail(err, QTR_ERR_UNSUPPORTED, "\"%s\" is not 0 in layer %.16s: the static KV8 cache is symmetric", name,
                      key);
    }
  }
  return QTR_OK;
}

static enum qtr_status parse_int8(const json_t *factor, const struct qtr_config *config, struct qtr_kv_scales *s,
                                  struct qtr_error *err) {
  static const char *const names[2] = {"k_scale", "v_scale"}, *const zeros[2] = {"k_zero_point", "v_zero_point"};
  enum qtr_status status = QTR_OK;
  size_t heads = (size_t)config->n_kv_heads;
  bool per_head = heads > 1;
  for (int v = 0; v < 2 && !status; v++) {
    const json_t *map = json_object_get(factor, names[v]);
    status = check_layers(map, names[v], config->n_layers, err);
    for (int32_t i = 0; i < config->n_layers && !status; i++) per_head &= count_values(layer_of(map, i)) % heads == 0;
    if (!status) status = check_zeros(json_object_get(factor, zeros[v]), zeros[v], err);
  }
  if (status || (status = create(config, per_head ? config->n_kv_heads : 1, s, err))) return status;
  for (int v = 0; v < 2 && !status; v++) {
    const json_t *map = json_object_get(factor, names[v]);
    for (int32_t i = 0; i < config->n_layers && !status; i++) {
      status = read_layer(layer_of(map, i), names[v], i, at(s, i, v), s->n_heads, err);
    }
  }
  return status;
}

/* {"rank": {"layer": scale}}, K and V alike. most: the largest number of the fp8 type. */
static enum qtr_status parse_fp8(const json_t *factor, double most, const struct qtr_config *config, struct qtr_kv_scales *s,
                                 struct qtr_error *err) {
  const char *rank;
  json_t *map;
  enum qtr_status status = create(config, 1, s, err);
  if (!status && (json_object_size(factor) == 0 || json_object_size(factor) > MAX_RANKS)) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "scaling_factor has no ranks, or more than %d", MAX_RANKS);
  }
  if (status) return status;
  json_object_foreach((json_t *)factor, rank, map) {
    char name[32];
    (void)snprintf(name, sizeof name, "rank %.16s", rank);
    if ((status = check_layers(map, name, config->n_layers, err))) return status;
    for (int32_t i = 0; i < config->n_layers; i++) {
      const json_t *x = layer_of(map, i);
      double scale = json_number_value(x) * most / 127;
      if (!json_is_number(x) || !usable(scale)) {
        return qtr_fail(err, QTR_ERR_FORMAT, "%s, layer %d: the scale is no positive number that fp16 holds", name, (int)i);
      }
      for (int v = 0; v < 2; v++) *at(s, i, v) = fmaxf(*at(s, i, v), (float)scale);
    }
  }
  return QTR_OK;
}

enum qtr_status qtr_kv_scales_parse(const char *json, size_t len, const struct qtr_config *config, struct qtr_kv_scales *s,
                                    struct qtr_error *err) {
  *s = (struct qtr_kv_scales){0};
  json_error_t error;
  json_t *root = json_loadb(json, len, 0, &error);
  const json_t *cache = json_object_get(root, "kv_cache"), *factor = json_object_get(cache, "scaling_factor");
  const char *dtype = json_string_value(json_object_get(cache, "dtype"));
  enum qtr_status status;
  if (!json_is_object(factor) || !dtype) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "no JSON with kv_cache.dtype and kv_cache.scaling_factor%s%s", root ? "" : ": ",
                      root ? "" : error.text);
  } else if (strcmp(dtype, "int8") == 0) {
    status = parse_int8(factor, config, s, err);
  } else if (strcmp(dtype, "float8_e4m3fn") == 0 || strcmp(dtype, "float8_e5m2") == 0) {
    status = parse_fp8(factor, dtype[8] == '4' ? 448 : 57344, config, s, err);
  } else {
    char shown[32];
    status = qtr_fail(err, QTR_ERR_UNSUPPORTED, "kv_cache.dtype is \"%s\"; int8, float8_e4m3fn and float8_e5m2 are read",
                      qtr_printable(dtype, strlen(dtype), shown, sizeof shown));
  }
  json_decref(root);
  if (status) qtr_kv_scales_free(s);
  return status;
}

/* ---- files ----------------------------------------------------------------------------------------- */

static enum qtr_status read_json(const char *path, const struct qtr_config *config, struct qtr_kv_scales *s,
                                 struct qtr_error *err) {
  char *text = NULL;
  size_t len = 0;
  enum qtr_status status = qtr_file_read(path, MAX_FILE_BYTES, &text, &len, err);
  if (!status && (status = qtr_kv_scales_parse(text, len, config, s, err))) (void)qtr_error_prefix(err, "%s", path);
  free(text);
  return status;
}

/* LMDeploy: one file a layer and rank. */
static enum qtr_status read_binaries(const char *dir, const struct qtr_config *config, struct qtr_kv_scales *s,
                                     struct qtr_error *err) {
  enum qtr_status status = create(config, 1, s, err);
  for (int32_t i = 0; i < config->n_layers && !status; i++) {
    for (int rank = 0; rank < MAX_RANKS && !status; rank++) {
      char name[64], *data = NULL;
      size_t n = 0;
      (void)snprintf(name, sizeof name, "layers.%d.past_kv_scale.%d.weight", (int)i, rank);
      char *path = qtr_path_join(dir, name);
      if (!path) return qtr_fail_memory(err, "a path", strlen(dir));
      bool exists = qtr_file_exists(path);
      if (!exists && rank == 0) {
        status =
            qtr_fail(err, QTR_ERR_NOT_FOUND, "%s: neither kv_cache_scales*.json nor acts.pt nor %s is there", dir, name);
      } else if (exists && !(status = qtr_file_read(path, 64, &data, &n, err))) {
        float x[4] = {0};
        memcpy(x, data, QTR_MIN(n, sizeof x));
        float k = x[0], v = n == 16 ? x[2] : x[1];
        if ((n != 8 && n != 16) || !usable((double)k) || !usable((double)v) ||
            (n == 16 && (x[1] != 0 || x[3] != 0))) { /* NaN is not 0 */
          status = qtr_fail(err, QTR_ERR_FORMAT, "%s: two positive fp32 scales are expected, with zero points of 0 between",
                            path);
        }
        at(s, i, 0)[0] = fmaxf(at(s, i, 0)[0], k);
        at(s, i, 1)[0] = fmaxf(at(s, i, 1)[0], v);
      }
      free(data);
      free(path);
      if (!exists) break;
    }
  }
  return status;
}

/* Raises *most to the largest magnitude in a tensor, if it is there; to infinity where a value is not finite. */
static enum qtr_status raise_to(float *most, const struct qtr_checkpoint *acts, const char *name, struct qtr_error *err) {
  const struct qtr_tensor *t = qtr_checkpoint_find(acts, name);
  if (!t) return QTR_OK;
  size_t n = t->n_bytes / qtr_dtype_bytes(t->dtype);
  float *x = malloc(QTR_MAX(n, 1) * sizeof *x);
  if (!x) return qtr_fail_memory(err, name, n * sizeof *x);
  enum qtr_status status = qtr_tensor_to_floats(t, x, n, err);
  for (size_t i = 0; i < n && !status; i++) *most = isfinite(x[i]) ? fmaxf(*most, fabsf(x[i])) : INFINITY;
  free(x);
  return status;
}

/* The range of one activation over 127. DeepCompressor keeps it at ["dynamic_range"][0]["max"], or without the list, LMQuant
 * at ["dynamic_range.0.max"], which is the same way through the file; ranges of two ends have a "min" as well. */
static enum qtr_status read_range(const struct qtr_checkpoint *acts, int32_t layer, const char *activation, float *scale,
                                  struct qtr_error *err) {
  static const char *const ends[] = {"0.max", "0.min", "max", "min"};
  char name[160];
  float most = 0;
  for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
    (void)snprintf(name, sizeof name, "model.layers.%d.self_attn.%s.output.dynamic_range.%s", (int)layer, activation,
                   ends[i]);
    enum qtr_status status = raise_to(&most, acts, name, err);
    if (status) return status;
  }
  *scale = most / 127;
  if (usable((double)*scale)) return QTR_OK;
  return qtr_fail(err, QTR_ERR_FORMAT, "model.layers.%d.self_attn.%s.output has %s", (int)layer, activation,
                  most == 0 ? "no dynamic_range: it is there when keys and values were quantised statically"
                            : "a dynamic_range that makes no scale which fp16 holds");
}

/* DeepCompressor's and LMQuant's acts.pt (A.2.5). */
static enum qtr_status read_acts(const char *path, const struct qtr_config *config, struct qtr_kv_scales *s,
                                 struct qtr_error *err) {
  struct qtr_checkpoint *acts = NULL;
  enum qtr_status status = qtr_checkpoint_open_nested(path, &acts, err);
  if (status) return status;
  status = create(config, 1, s, err);
  for (int32_t i = 0; i < config->n_layers && !status; i++) {
    status = read_range(acts, i, "k_rotary_emb", at(s, i, 0), err);
    if (!status) status = read_range(acts, i, "v_proj", at(s, i, 1), err);
  }
  if (status) (void)qtr_error_prefix(err, "%s", path);
  if (status) qtr_kv_scales_free(s);
  qtr_checkpoint_close(acts);
  return status;
}

static enum qtr_status read_file(const char *path, const struct qtr_config *config, struct qtr_kv_scales *s,
                                 struct qtr_error *err) {
  size_t n = strlen(path);
  return (n > 3 && strcmp(path + n - 3, ".pt") == 0 ? read_acts : read_json)(path, config, s, err);
}

enum qtr_status qtr_kv_scales_read(const char *path, const struct qtr_config *config, struct qtr_kv_scales *s,
                                   struct qtr_error *err) {
  static const char *const names[] = {"kv_cache_scales_layer_level.json", "kv_cache_scales.json", "acts.pt"};
  *s = (struct qtr_kv_scales){0};
  enum qtr_status status = QTR_OK;
  if (!qtr_dir_exists(path)) return read_file(path, config, s, err);
  for (size_t i = 0; i < sizeof names / sizeof *names && !s->scale && !status; i++) {
    char *inside = qtr_path_join(path, names[i]);
    if (!inside) return qtr_fail_memory(err, "a path", strlen(path));
    if (qtr_file_exists(inside)) status = read_file(inside, config, s, err);
    free(inside);
  }
  if (!status && !s->scale) status = read_binaries(path, config, s, err);
  if (status) qtr_kv_scales_free(s);
  return status;
}

enum qtr_status qtr_kv_scales_find(const struct qtr_checkpoint *checkpoint, const struct qtr_config *config,
                                   struct qtr_kv_scales *s, struct qtr_error *err) {
  int32_t n_found = 0;
  enum qtr_status status = create(config, 1, s, err);
  for (int32_t i = 0; i < config->n_layers && !status; i++) {
    char name[96];
    const struct qtr_tensor *t;
    const size_t shape[1] = {2};
    (void)snprintf(name, sizeof name, "model.layers.%d.self_attn.kv_scale_quant_orig", (int)i);
    if (!qtr_checkpoint_find(checkpoint, name)) continue;
    n_found++;
    if ((status = qtr_checkpoint_get(checkpoint, name, 1, shape, &t, err)) ||
        (status = qtr_tensor_to_floats(t, at(s, i, 0), 2, err))) {
      break;
    }
    if (!usable((double)at(s, i, 0)[0]) || !usable((double)at(s, i, 1)[0])) {
      status = qtr_fail(err, QTR_ERR_FORMAT, "tensor %s: scales must be positive numbers that fp16 holds", name);
    }
  }
  if (!status && n_found > 0 && n_found < config->n_layers) {
    status = qtr_fail(err, QTR_ERR_FORMAT, "only %d of %d layers have self_attn.kv_scale_quant_orig", (int)n_found,
                      (int)config->n_layers);
  }
  if (status || n_found == 0) qtr_kv_scales_free(s);
  return status;
}

/* The shortest decimal that reads back as the same float. */
static double shortest(float x) {
  char text[40];
  for (int digits = 6; digits <= 9; digits++) {
    (void)snprintf(text, sizeof text, "%.*g", digits, (double)x);
    if (strtof(text, NULL) == x) break;
  }
  return strtod(text, NULL);
}

enum qtr_status qtr_kv_scales_write(const char *path, const char *model_type, const struct qtr_kv_scales *s,
                                    struct qtr_error *err) {
  json_t *maps[4] = {json_object(), json_object(), json_object(), json_object()}; /* k, v, and their zero points */
  char layer[16], head[16];
  bool ok = true;
  for (int32_t i = 0; i < s->n_layers; i++) {
    (void)snprintf(layer, sizeof layer, "%d", (int)i);
    for (int v = 0; v < 4; v++) {
      json_t *values = json_object();
      for (int32_t h = 0; h < s->n_heads; h++) {
        (void)snprintf(head, sizeof head, "%d", (int)h);
        ok = json_object_set_new(values, head, json_real(v < 2 ? shortest(at(s, i, v)[h]) : 0.0)) == 0 && ok;
      }
      ok = json_object_set_new(maps[v], layer, values) == 0 && ok;
    }
  }
  json_t *root =
      json_pack("{s:s, s:{s:s, s:{s:o, s:o, s:o, s:o}}}", "model_type", model_type, "kv_cache", "dtype", "int8",
                "scaling_factor", "k_scale", maps[0], "v_scale", maps[1], "k_zero_point", maps[2], "v_zero_point", maps[3]);
  char *text = ok ? json_dumps(root, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) : NULL;
  enum qtr_status status = text ? qtr_file_write(path, text, strlen(text), err) : qtr_fail_memory(err, "KV scales", 4096);
  free(text);
  json_decref(root);
  return status;
}
