/* qoq.c - defaults of the algorithm by model family, and the steps as a user names them (qoq.h). */
#include "quant/qoq.h"

#include "base/status.h"

#include <stdio.h>
#include <string.h>

/* alpha of down_proj's smoothing (beta is 1 - alpha) and how SmoothAttention is done, by model (F.9, DeepCompressor's
 * scripts). Models are told apart by what config.json says. */
struct family {
  const char *model_type;
  int32_t hidden, vocab; /* 0 = any */
  bool llama3_rope;      /* Llama 3.1 */
  float chan_alpha, group_alpha;
  enum qtr_smoothing chan_keys, group_keys;
};
static const struct family families[] = {
    {"llama", 4096, 128256, true, 0.05f, 0.35f, QTR_SMOOTH_GRID, QTR_SMOOTH_GRID},   /* Llama 3.1 8B */
    {"llama", 8192, 128256, true, 0.05f, 0.3f, QTR_SMOOTH_GRID, QTR_SMOOTH_GRID},    /* 70B */
    {"llama", 4096, 128256, false, 0.1f, 0.3f, QTR_SMOOTH_MANUAL, QTR_SMOOTH_GRID},  /* Llama 3 8B */
    {"llama", 8192, 128256, false, 0.1f, 0.35f, QTR_SMOOTH_MANUAL, QTR_SMOOTH_GRID}, /* 70B */
    {"llama", 4096, 32000, false, 0.05f, 0.2f, QTR_SMOOTH_GRID, QTR_SMOOTH_MANUAL},  /* Llama 2 7B */
    {"llama", 5120, 32000, false, 0.05f, 0.35f, QTR_SMOOTH_GRID, QTR_SMOOTH_MANUAL}, /* 13B */
    {"llama", 8192, 32000, false, 0.1f, 0.35f, QTR_SMOOTH_GRID, QTR_SMOOTH_MANUAL},  /* 70B */
    {"llama", 6656, 32000, false, 0.1f, 0.25f, QTR_SMOOTH_GRID, QTR_SMOOTH_MANUAL},  /* Llama 30B */
    {"llama", 7168, 64000, false, 0.15f, 0.35f, QTR_SMOOTH_GRID, QTR_SMOOTH_MANUAL}, /* Yi 34B */
    {"mistral", 4096, 0, false, 0.0f, 0.15f, QTR_SMOOTH_GRID, QTR_SMOOTH_MANUAL},    /* Mistral 7B */
};
static const struct family any = {"", 0, 0, false, 0.1f, 0.3f, QTR_SMOOTH_GRID, QTR_SMOOTH_GRID};

void qtr_qoq_options_init(struct qtr_qoq_options *o, enum qtr_linear_format format, const struct qtr_config *config) {
  const struct family *f = &any;
  for (size_t i = 0; i < sizeof families / sizeof families[0] && config; i++) {
    const struct family *k = &families[i];
    if (strcmp(k->model_type, config->model_type) == 0 && k->hidden == config->hidden_size &&
        (k->vocab == 0 || k->vocab == config->vocab_size) && k->llama3_rope == (config->rope_scaling == QTR_ROPE_LLAMA3)) {
      f = k;
      break;
    }
  }
  bool groups = format == QTR_LINEAR_W4A8_G128, w4 = groups || format == QTR_LINEAR_W4A8,
       quantised = format > QTR_LINEAR_BF16;
  float alpha = groups ? f->group_alpha : w4 ? f->chan_alpha : 0.1f;
  *o = (struct qtr_qoq_options){
      .n_samples = 128,
      .length = 1024,
      .seed = 42,
      .rotate = true,
      .rotate_heads = w4,
      .reorder = groups,
      .clip = w4,
      .gptq = quantised,
      .n_grid = 20,
      .damp = w4 && !groups ? 0.03f : 0.01f, /* measured: docs/accuracy.md */
      .keys = {.mode = w4 ? groups ? f->group_keys : f->chan_keys : QTR_SMOOTH_OFF, .alpha = 0.5f},
      .down = {.mode = quantised ? QTR_SMOOTH_MANUAL : QTR_SMOOTH_OFF, .alpha = alpha, .beta = 1 - alpha},
      .out = {.alpha = alpha, .beta = 1 - alpha},
      .input = {.alpha = 0.5f, .beta = 0.5f}};
}

/* Where a step's switch is: a bool, or the mode of a smoothing. */
static bool *step_flag(struct qtr_qoq_options *o, const char *name, size_t n, struct qtr_smooth_options **smooth) {
  const struct {
    const char *name;
    bool *flag;
    struct qtr_smooth_options *smooth;
  } steps[] = {{"rotate", &o->rotate, NULL},    {"rotate-heads", &o->rotate_heads, NULL},
               {"smooth-keys", NULL, &o->keys}, {"smooth-out", NULL, &o->out},
               {"smooth-down", NULL, &o->down}, {"smooth-input", NULL, &o->input},
               {"reorder", &o->reorder, NULL},  {"clip", &o->clip, NULL},
               {"gptq", &o->gptq, NULL},        {"correct", &o->correct, NULL}};
  *smooth = NULL;
  for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
    if (strlen(steps[i].name) != n || memcmp(steps[i].name, name, n) != 0) continue;
    *smooth = steps[i].smooth;
    return steps[i].flag;
  }
  return NULL;
}

enum qtr_status qtr_qoq_parse_steps(struct qtr_qoq_options *o, const char *list, struct qtr_error *err) {
  if (*list != '+' && *list != '-') {
    o->rotate = o->rotate_heads = o->reorder = o->clip = o->gptq = o->correct = false;
    struct qtr_smooth_options *const all[] = {&o->keys, &o->out, &o->down, &o->input};
    for (size_t i = 0; i < 4; i++) all[i]->mode = QTR_SMOOTH_OFF;
  }
  while (*list) {
    bool on = *list != '-';
    if (*list == '+' || *list == '-') list++;
    size_t n = strcspn(list, ",");
    struct qtr_smooth_options *smooth;
    bool *flag = step_flag(o, list, n, &smooth);
    if (flag) {
      *flag = on;
    } else if (smooth) {
      if (!on || smooth->mode == QTR_SMOOTH_OFF) smooth->mode = on ? QTR_SMOOTH_MANUAL : QTR_SMOOTH_OFF;
    } else if (n > 0) {
      char shown[40];
      return qtr_fail(
          err, QTR_ERR_ARGUMENT,
          "unknown step \"%s\"; there are rotate, rotate-heads, smooth-keys, smooth-out, smooth-down, smooth-input, "
          "reorder, clip, gptq, correct",
          qtr_printable(list, n, shown, sizeof shown));
    }
    list += n + (list[n] == ',');
  }
  if (o->rotate && o->input.mode != QTR_SMOOTH_OFF) {
    return qtr_fail(err, QTR_ERR_ARGUMENT,
                    "smooth-input works on a norm's gain, which rotate folds away: choose one of them");
  }
  return QTR_OK;
}

enum qtr_status qtr_qoq_parse_smoothing(struct qtr_smooth_options *options, const char *text, struct qtr_error *err) {
  int used = 0;
  float alpha, beta;
  if (strcmp(text, "grid") == 0) {
    options->mode = QTR_SMOOTH_GRID;
  } else if (strcmp(text, "off") == 0) {
    options->mode = QTR_SMOOTH_OFF;
  } else if (sscanf(text, "%f,%f%n", &alpha, &beta, &used) == 2 && text[used] == 0 && alpha >= 0 && alpha <= 1 &&
             beta >= 0 && beta <= 1) {
    *options = (struct qtr_smooth_options){.mode = QTR_SMOOTH_MANUAL, .alpha = alpha, .beta = beta};
  } else {
    return qtr_fail(err, QTR_ERR_ARGUMENT, "\"%.40s\" is no smoothing: write grid, off, or alpha,beta such as 0.3,0.7",
                    text);
  }
  return QTR_OK;
}
