/* The quantiser on directories: what it writes, what it refuses and how it names it, and that nothing half-done stays
 * behind. The numbers themselves are checked by test_quant_rtn.c and, independently, by tests/e2e/oracle_checkpoint.py. */
#include "base/file.h"
#include "base/half.h"
#include "checkpoint/safetensors_write.h"
#include "quant/quantize.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

enum { HIDDEN = 128, INNER = 96, VOCAB = 40, LAYERS = 2 };

static const char config_text[] =
    "{\"architectures\": [\"LlamaForCausalLM\"], \"hidden_size\": 128, \"intermediate_size\": 96, \"num_hidden_layers\": 2, "
    "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"vocab_size\": 40, \"max_position_embeddings\": 64, "
    "\"rms_norm_eps\": 1e-05, \"tie_word_embeddings\": true, \"mystery\": [1.5, \"kept\"]}";

/* What to spoil in the source. */
struct spoil {
  const char *tensor; /* gets `value` as its third element */
  float value;
  const char *extra; /* one more tensor */
  const char *missing;
  bool untied_head;
};

struct fixture {
  char *root, *source, *out;
};

static int make_fixture(void **state) {
  struct fixture *f = calloc(1, sizeof *f);
  if (!f || !(f->root = strdup("qtr-quant-XXXXXX")) || !mkdtemp(f->root)) return -1;
  f->source = qtr_path_join(f->root, "source");
  f->out = qtr_path_join(f->root, "out");
  *state = f;
  return 0;
}

static int remove_fixture(void **state) {
  struct fixture *f = *state;
  char command[256];
  (void)snprintf(command, sizeof command, "rm -r '%s'", f->root);
  int rc = system(command);
  free(f->root);
  free(f->source);
  free(f->out);
  free(f);
  return rc;
}

static void put_text(const char *dir, const char *name, const char *text) {
  char *path = qtr_path_join(dir, name);
  assert_int_equal(qtr_file_write(path, text, strlen(text), NULL), QTR_OK);
  free(path);
}

static size_t add(struct qtr_st_entry *e, size_t n, const struct spoil *spoil, const char *name, size_t n_dims, size_t d0,
                  size_t d1) {
  if (spoil->missing && strcmp(spoil->missing, name) == 0) return n;
  e[n] = (struct qtr_st_entry){.dtype = QTR_DTYPE_BF16, .n_dims = n_dims, .shape = {d0, d1}};
  (void)snprintf(e[n].name, sizeof e[n].name, "%s", name);
  return n + 1;
}

/* A tiny model in bf16, uniform weights of a fixed sequence. */
static void make_source(const struct fixture *f, struct spoil spoil) {
  static const struct {
    const char *name;
    size_t n_out, n_in;
  } projections[] = {{"self_attn.q_proj", HIDDEN, HIDDEN}, {"self_attn.k_proj", 64, HIDDEN},
                     {"self_attn.v_proj", 64, HIDDEN},     {"self_attn.o_proj", HIDDEN, HIDDEN},
                     {"mlp.gate_proj", INNER, HIDDEN},     {"mlp.up_proj", INNER, HIDDEN},
                     {"mlp.down_proj", HIDDEN, INNER}};
  struct qtr_st_entry entry[64];
  char name[160];
  size_t n = add(entry, 0, &spoil, "model.embed_tokens.weight", 2, VOCAB, HIDDEN);
  for (int i = 0; i < LAYERS; i++) {
    for (size_t p = 0; p < 7; p++) {
      (void)snprintf(name, sizeof name, "model.layers.%d.%s.weight", i, projections[p].name);
      n = add(entry, n, &spoil, name, 2, projections[p].n_out, projections[p].n_in);
    }
    (void)snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", i);
    n = add(entry, n, &spoil, name, 1, HIDDEN, 0);
    (void)snprintf(name, sizeof name, "model.layers.%d.post_attention_layernorm.weight", i);
    n = add(entry, n, &spoil, name, 1, HIDDEN, 0);
    (void)snprintf(name, sizeof name, "model.layers.%d.self_attn.rotary_emb.inv_freq", i);
    n = add(entry, n, &spoil, name, 1, 16, 0);
  }
  n = add(entry, n, &spoil, "model.norm.weight", 1, HIDDEN, 0);
  n = add(entry, n, &spoil, "model.layers.1.self_attn.k_proj.bias", 1, 64, 0);
  if (spoil.untied_head) n = add(entry, n, &spoil, "lm_head.weight", 2, VOCAB, HIDDEN);
  if (spoil.extra) n = add(entry, n, &spoil, spoil.extra, 1, 8, 0);
  char *make = malloc(strlen(f->source) + 32);
  assert_non_null(make);
  (void)sprintf(make, "mkdir -p '%s'", f->source);
  assert_int_equal(system(make), 0);
  free(make);
  char *path = qtr_path_join(f->source, "model.safetensors");
  struct qtr_st_writer *w;
  assert_int_equal(qtr_st_create(path, entry, n, NULL, &w, NULL), QTR_OK);
  uint32_t random = 3;
  for (size_t i = 0; i < n; i++) {
    size_t count = entry[i].shape[0] * (entry[i].n_dims == 2 ? entry[i].shape[1] : 1);
    for (size_t k = 0; k < count; k++) {
      random = random * 1664525u + 1013904223u;
      float x = (float)(random >> 8) * 0x1p-24f - 0.5f;
      if (spoil.tensor && strcmp(spoil.tensor, entry[i].name) == 0 && k == 2) x = spoil.value;
      uint16_t half = qtr_bf16_from_f32(x);
      assert_int_equal(qtr_st_write(w, &half, 2, NULL), QTR_OK);
    }
  }
  assert_int_equal(qtr_st_finish(w, NULL), QTR_OK);
  free(path);
  put_text(f->source, "config.json", config_text);
  put_text(f->source, "tokenizer.json", "{}");
  put_text(f->source, "generation_config.json", "{\"eos_token_id\": 3}");
  put_text(f->source, "chat_template.jinja", "hello");
  put_text(f->source, "model.safetensors.index.json", "{}");
  put_text(f->source, "README.md", "not a part");
}

static struct qtr_quantize_options options_for(const struct fixture *f, const char *precision, int32_t group_size) {
  struct qtr_quantize_options o;
  qtr_quantize_options_init(&o);
  o.model_dir = f->source;
  o.output_dir = f->out;
  o.group_size = group_size;
  o.quiet = true;
  assert_int_equal(qtr_precision_parse(precision, &o.precision, NULL), QTR_OK);
  return o;
}

static bool has_file(const char *dir, const char *name) {
  char *path = qtr_path_join(dir, name);
  bool exists = qtr_file_exists(path);
  free(path);
  return exists;
}

struct seen {
  int n;
  double squared, norm;
};

static void observe(const struct qtr_quantize_report *r, void *user) {
  static const char *const order[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
  struct seen *s = user;
  if (s->n == 0) {
    assert_string_equal(r->projection, "embed_tokens");
    assert_int_equal(r->layer, -1);
  } else if (s->n <= 7 * LAYERS) {
    assert_string_equal(r->projection, order[(s->n - 1) % 7]);
    assert_int_equal(r->layer, (s->n - 1) / 7);
    assert_non_null(strstr(r->tensor, r->projection));
    s->squared += r->squared_error;
    s->norm += r->squared_norm;
  } else {
    assert_string_equal(r->projection, "lm_head");
  }
  s->n++;
}

static void test_writes_a_checkpoint(void **state) {
  const struct fixture *f = *state;
  make_source(f, (struct spoil){0});
  struct qtr_quantize_options o = options_for(f, "w4a8kv4", -1);
  struct qtr_quantize_summary summary;
  struct seen seen = {0};
  struct qtr_error err = {0};
  if (qtr_quantize(&o, observe, &seen, &summary, &err)) fail_msg("%s", err.message);
  assert_int_equal(seen.n, 7 * LAYERS + 2);
  assert_true(fabs(summary.relative_error - sqrt(seen.squared / seen.norm)) < 1e-12);
  assert_true(summary.relative_error > 0.01 && summary.relative_error < 0.2);
  assert_string_equal(summary.precision, "w4a8kv4");
  assert_int_equal(summary.group_size, -1);

  assert_true(has_file(f->out, "tokenizer.json") && has_file(f->out, "generation_config.json") &&
              has_file(f->out, "chat_template.jinja"));
  assert_false(has_file(f->out, "README.md") || has_file(f->out, "model.safetensors.index.json") ||
               has_file(f->out, "model.safetensors.tmp"));
  struct qtr_config config;
  if (qtr_config_read(f->out, &config, &err)) fail_msg("%s", err.message);
  assert_string_equal(config.precision, "w4a8kv4");
  assert_string_equal(config.architecture, "LlamaForCausalLM");
  assert_int_equal(config.eos_token[0], 3);
  char *path = qtr_path_join(f->out, "config.json"), *text;
  size_t len;
  assert_int_equal(qtr_file_read(path, 1 << 20, &text, &len, NULL), QTR_OK);
  assert_non_null(strstr(text, "\"mystery\""));
  assert_non_null(strstr(text, "1e-5")); /* not 1.0000000000000001e-05 */
  free(text);
  free(path);

  struct qtr_checkpoint *c;
  enum qtr_linear_format format;
  if (qtr_checkpoint_open(f->out, &c, &err)) fail_msg("%s", err.message);
  assert_int_equal(qtr_checkpoint_count(c), summary.n_tensors);
  assert_int_equal(qtr_checkpoint_format(c, &format, &err), QTR_OK);
  assert_int_equal(format, QTR_LINEAR_W4A8);
  const struct qtr_tensor *t, *head;
  const size_t vocab[2] = {VOCAB, HIDDEN}, packed[2] = {HIDDEN, INNER / 2}, row[1] = {64};
  assert_int_equal(qtr_checkpoint_get(c, "model.embed_tokens.weight", 2, vocab, &t, &err), QTR_OK);
  assert_int_equal(qtr_checkpoint_get(c, "lm_head.weight", 2, vocab, &head, &err), QTR_OK); /* tied, and still written */
  assert_int_equal(t->dtype, QTR_DTYPE_F16);
  assert_memory_equal(t->data, head->data, t->n_bytes);
  assert_int_equal(qtr_checkpoint_get(c, "model.layers.1.mlp.down_proj.qweight", 2, packed, &t, &err), QTR_OK);
  assert_int_equal(t->dtype, QTR_DTYPE_I8);
  assert_int_equal(qtr_checkpoint_get(c, "model.layers.1.self_attn.k_proj.bias", 1, row, &t, &err), QTR_OK);
  assert_int_equal(t->dtype, QTR_DTYPE_F16);
  assert_null(qtr_checkpoint_find(c, "model.layers.0.self_attn.rotary_emb.inv_freq"));
  qtr_checkpoint_close(c);

  /* what it wrote is no source for another run */
  struct qtr_quantize_options again = o;
  again.model_dir = f->out;
  again.output_dir = f->source;
  assert_int_equal(qtr_quantize(&again, NULL, NULL, NULL, &err), QTR_ERR_UNSUPPORTED);
  assert_non_null(strstr(err.message, "already"));
}

static void test_float_and_int8_parts(void **state) {
  const struct fixture *f = *state;
  struct qtr_error err = {0};
  make_source(f, (struct spoil){.untied_head = true});
  struct qtr_quantize_options o = options_for(f, "w16a16", 0);
  o.head_int8 = o.embed_int8 = true;
  if (qtr_quantize(&o, NULL, NULL, NULL, &err)) fail_msg("%s", err.message);
  struct qtr_checkpoint *c;
  enum qtr_linear_format format;
  assert_int_equal(qtr_checkpoint_open(f->out, &c, &err), QTR_OK);
  assert_int_equal(qtr_checkpoint_format(c, &format, &err), QTR_OK);
  assert_int_equal(format, QTR_LINEAR_F16);
  const struct qtr_tensor *t;
  const size_t n = VOCAB;
  assert_int_equal(qtr_checkpoint_find(c, "lm_head.weight")->dtype, QTR_DTYPE_I8);
  assert_int_equal(qtr_checkpoint_get(c, "model.embed_tokens.dequant_scale", 1, &n, &t, &err), QTR_OK);
  assert_int_equal(t->dtype, QTR_DTYPE_F32);
  qtr_checkpoint_close(c);
  /* fp16 output is a float checkpoint: it may be quantised further */
  char *next = qtr_path_join(f->root, "next");
  o = options_for(f, "w8a8kv8", -1);
  o.model_dir = f->out;
  o.output_dir = next;
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_UNSUPPORTED); /* but for its int8 head */
  assert_non_null(strstr(err.message, "embed_tokens"));
  o = options_for(f, "w16a16", 0);
  o.overwrite = true;
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_OK);
  o = options_for(f, "w8a8kv8", -1);
  o.model_dir = f->out;
  o.output_dir = next;
  if (qtr_quantize(&o, NULL, NULL, NULL, &err)) fail_msg("%s", err.message);
  free(next);
}

/* The run must fail so, and leave neither a checkpoint nor a trace of one. */
static void refuse(const struct fixture *f, struct spoil spoil, const char *precision, int32_t group, enum qtr_status status,
                   const char *word) {
  make_source(f, spoil);
  struct qtr_quantize_options o = options_for(f, precision, group);
  struct qtr_error err = {0};
  enum qtr_status got = qtr_quantize(&o, NULL, NULL, NULL, &err);
  if (got != status) fail_msg("%s instead of %s: %s (%s)", qtr_status_name(got), qtr_status_name(status), err.message, word);
  if (!strstr(err.message, word)) fail_msg("\"%s\" does not name %s", err.message, word);
  assert_false(qtr_dir_exists(f->out));
}

static void test_refusals(void **state) {
  const struct fixture *f = *state;
  const struct spoil none = {0};
  /* intermediate_size 96 is no multiple of 128, but of 32 */
  refuse(f, none, "w4a8kv4", 128, QTR_ERR_UNSUPPORTED, "model.layers.0.mlp.down_proj has 128 rows and 96 columns");
  refuse(f, none, "w4a8kv4", 0, QTR_ERR_UNSUPPORTED, "group size -1");
  refuse(f, none, "w4a8kv4", 64, QTR_ERR_ARGUMENT, "group size 64");
  refuse(f, none, "w8a8", 128, QTR_ERR_ARGUMENT, "group size 128");
  refuse(f, (struct spoil){.tensor = "model.layers.1.mlp.up_proj.weight", .value = NAN}, "w4a8", -1, QTR_ERR_FORMAT,
         "model.layers.1.mlp.up_proj.weight");
  refuse(f, (struct spoil){.tensor = "model.layers.0.self_attn.q_proj.weight", .value = INFINITY}, "w8a8", -1,
         QTR_ERR_FORMAT, "model.layers.0.self_attn.q_proj.weight");
  refuse(f, (struct spoil){.tensor = "model.norm.weight", .value = 70000}, "w8a8", -1, QTR_ERR_UNSUPPORTED,
         "model.norm.weight");
  refuse(f, (struct spoil){.tensor = "model.layers.1.mlp.up_proj.weight", .value = 70000}, "w16a16", 0, QTR_ERR_UNSUPPORTED,
         "model.layers.1.mlp.up_proj.weight");
  refuse(f, (struct spoil){.extra = "model.layers.0.self_attn.q_norm.weight"}, "w4a8", -1, QTR_ERR_UNSUPPORTED, "q_norm");
  refuse(f, (struct spoil){.extra = "model.layers.2.mlp.up_proj.weight"}, "w4a8", -1, QTR_ERR_UNSUPPORTED, "model.layers.2");
  refuse(f, (struct spoil){.missing = "model.layers.1.self_attn.v_proj.weight"}, "w4a8", -1, QTR_ERR_NOT_FOUND,
         "v_proj.weight");
  refuse(f, (struct spoil){.missing = "model.norm.weight"}, "w4a8", -1, QTR_ERR_NOT_FOUND, "model.norm.weight");
  struct qtr_quantize_options o = options_for(f, "w4a8", -1);
  struct qtr_error err = {0};
  o.method = "gptq";
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_ARGUMENT);
  assert_non_null(strstr(err.message, "gptq"));
  o = options_for(f, "w4a8", -1);
  o.model_dir = "nowhere-at-all";
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_NOT_FOUND);
  o = options_for(f, "w4a8", -1);
  o.output_dir = "nowhere/at/all";
  make_source(f, none);
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_IO);
}

static void test_output_directory(void **state) {
  const struct fixture *f = *state;
  struct qtr_error err = {0};
  make_source(f, (struct spoil){0});
  struct qtr_quantize_options o = options_for(f, "w8a8kv4", -1);
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_OK);
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_ARGUMENT);
  assert_non_null(strstr(err.message, "exists already"));
  o.overwrite = true;
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_OK);
  o.output_dir = f->source;
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_ARGUMENT);
  assert_non_null(strstr(err.message, "source itself"));
  assert_true(has_file(f->source, "model.safetensors"));
  /* a run that fails after the old file was removed leaves a directory that is no model */
  make_source(f, (struct spoil){.tensor = "model.norm.weight", .value = NAN});
  o.output_dir = f->out;
  assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, &err), QTR_ERR_FORMAT);
  assert_false(has_file(f->out, "model.safetensors") || has_file(f->out, "model.safetensors.tmp"));
  struct qtr_checkpoint *c;
  assert_int_equal(qtr_checkpoint_open(f->out, &c, &err), QTR_ERR_NOT_FOUND);
}

/* The number of threads changes nothing, not even a bit. */
static void test_threads_agree(void **state) {
  const struct fixture *f = *state;
  make_source(f, (struct spoil){0});
  char *data[2];
  size_t n[2];
  char *path = qtr_path_join(f->out, "model.safetensors");
  for (int i = 0; i < 2; i++) {
    struct qtr_quantize_options o = options_for(f, "w4a8", -1);
    o.threads = i ? 7 : 1;
    o.overwrite = true;
    assert_int_equal(qtr_quantize(&o, NULL, NULL, NULL, NULL), QTR_OK);
    assert_int_equal(qtr_file_read(path, 1 << 24, &data[i], &n[i], NULL), QTR_OK);
  }
  assert_int_equal(n[0], n[1]);
  assert_memory_equal(data[0], data[1], n[0]);
  free(data[0]);
  free(data[1]);
  free(path);
}

int main(void) {
#define TEST(f) cmocka_unit_test_setup_teardown(f, make_fixture, remove_fixture)
  const struct CMUnitTest tests[] = {
      TEST(test_writes_a_checkpoint), TEST(test_float_and_int8_parts), TEST(test_refusals),
      TEST(test_output_directory),    TEST(test_threads_agree),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
